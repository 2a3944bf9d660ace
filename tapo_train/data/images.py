"""Encoded pictures into `Image`: bounded, and checked.

A task file is somebody else's data, so nothing is opened before it was limited:
bytes before reading, format before decoding, pixels (from the header) before
anything is inflated. Damaged files are found here, with their place, instead of
in the middle of a run. Pixels are not kept.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image as Pillow

from tapo_train.data.rows import shown
from tapo_train.errors import DataError
from tapo_train.types import Image, ImageRef

__all__ = [
    "BROKEN",
    "FORMATS",
    "MISSING",
    "OVERSIZED",
    "UNREADABLE",
    "ImageLimits",
    "extension",
    "read_image",
    "resolve_inside",
]

FORMATS = ("PNG", "JPEG", "WEBP")
"""The only decoders Pillow may try; everything else is refused by name."""

MISSING, UNREADABLE, OVERSIZED = "missing picture", "unreadable picture", "oversized picture"
"""Kinds of a `DataError` about a picture."""

_NO_PATHS = ("data:", "http://", "https://")

BROKEN = (
    OSError,
    SyntaxError,  # Pillow's word for a broken PNG chunk
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Pillow.DecompressionBombError,
    Pillow.DecompressionBombWarning,  # an exception only where warnings are errors
)
"""What Pillow raises of a damaged or hostile file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """What a picture may cost before it is refused."""

    max_bytes: int = 32 * 2**20
    """Encoded size [B]."""
    max_pixels: int = 64_000_000
    """width x height; HR-MMSearch's 4K pictures have 8.3 million."""


def read_image(data: bytes, *, where: str, limits: ImageLimits | None = None) -> Image:
    """Check `data` and describe it.

    Width and height are those of the stored raster: EXIF orientation is not
    applied, neither here nor where the picture is decoded, so boxes mean the same
    everywhere. Of an animated file the first frame counts.

    Raises:
        DataError: too large, of another format than `FORMATS`, or damaged.
    """
    limits = limits or ImageLimits()
    if len(data) > limits.max_bytes:
        raise DataError(
            f"{where}: picture of {len(data)} bytes; at most {limits.max_bytes} are accepted",
            kind=OVERSIZED,
        )
    try:
        width, height = _check(data, limits.max_pixels)
    except BROKEN as error:
        raise DataError(
            f"{where}: not a readable picture ({type(error).__name__}: {error}, "
            f"{len(data)} bytes); wanted an undamaged {', '.join(FORMATS)} file",
            kind=UNREADABLE,
        ) from error
    if width * height > limits.max_pixels:
        raise DataError(
            f"{where}: picture of {width} x {height} pixels; "
            f"at most {limits.max_pixels} pixels are accepted",
            kind=OVERSIZED,
        )
    digest = hashlib.sha256(data).hexdigest()
    return Image(
        sha256=digest,
        data=data,
        width=width,
        height=height,
        ref=ImageRef(root=f"sha256:{digest}"),
    )


def _check(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Return (width, height); decode only if the header promises at most `max_pixels`."""
    with Pillow.open(io.BytesIO(data), formats=FORMATS) as picture:
        size = picture.size
        if size[0] * size[1] > max_pixels:
            return size
        if picture.format == "PNG":
            picture.verify()
            return _inflated(data, size)
        # A JPEG is entropy-decoded to its end but transformed at 1/8 of the size.
        picture.draft("RGB", (max(1, size[0] // 8), max(1, size[1] // 8)))
        picture.load()
        return size


def _inflated(data: bytes, size: tuple[int, int]) -> tuple[int, int]:
    """`size`, after inflating a PNG: its checksums may be right over a broken stream."""
    with Pillow.open(io.BytesIO(data), formats=("PNG",)) as picture:
        picture.load()
    return size


def resolve_inside(roots: Sequence[Path], name: str, *, where: str) -> Path:
    """`name` in the first of `roots` that has it, without links and dots.

    Raises:
        DataError: it leads out of all of them, or is no path.
    """
    if name.startswith(_NO_PATHS):
        raise DataError(f"{where}: found the picture {shown(name)}; wanted the path of a file")
    try:
        bases = [root.resolve() for root in roots]
        found = [(base / name).resolve() for base in bases]
        inside = [path for path in found if any(path.is_relative_to(base) for base in bases)]
        if inside:
            return next((path for path in inside if path.exists()), inside[0])
    except (OSError, ValueError, RuntimeError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{where}: impossible path {shown(name)}: {said}") from error
    raise DataError(
        f"{where}: path {shown(name)} leads out of the data folder; wanted a path that stays "
        f"inside {bases[0]}, or its folder in data.image_roots"
    )


def extension(data: bytes) -> str:
    """File name ending for encoded bytes, from their magic number."""
    if data.startswith(b"\x89PNG"):
        return ".png"
    return ".jpg" if data.startswith(b"\xff\xd8") else ".webp"
