"""Pixels for tools: decode a checked picture, encode a new one, find one in the registry."""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict

from PIL import Image as PilImage

from tapo_train.data.images import FORMATS
from tapo_train.errors import ToolArgumentError, ToolError
from tapo_train.tools.base import ToolContext
from tapo_train.types import Image, ImageRef

_CACHE_PIXELS = 32_000_000
"""Decoded pixels kept for the next crop of the same picture (about 100 MB)."""


class ImageDecoder:
    """Decodes by content id and keeps the last few pictures; safe to use from threads."""

    def __init__(self, *, cache_pixels: int = _CACHE_PIXELS) -> None:
        self._cache_pixels = cache_pixels
        self._cached: OrderedDict[str, PilImage.Image] = OrderedDict()
        self._pixels = 0
        self._lock = threading.Lock()

    def decode(self, image: Image) -> PilImage.Image:
        """RGB pixels; the caller must not draw on them.

        Raises:
            ToolError: the bytes are damaged or not one of FORMATS.
        """
        with self._lock:
            if image.sha256 in self._cached:
                self._cached.move_to_end(image.sha256)
                return self._cached[image.sha256]
        try:
            with PilImage.open(io.BytesIO(image.data), formats=FORMATS) as encoded:
                pixels = on_white(encoded)
        except (OSError, SyntaxError, ValueError, PilImage.DecompressionBombError) as error:
            raise ToolError(f"picture {image.sha256[:12]} cannot be decoded: {error}") from error
        with self._lock:
            if image.sha256 not in self._cached:
                self._cached[image.sha256] = pixels
                self._pixels += pixels.width * pixels.height
            while len(self._cached) > 1 and self._pixels > self._cache_pixels:
                _, oldest = self._cached.popitem(last=False)
                self._pixels -= oldest.width * oldest.height
        return pixels


def on_white(picture: PilImage.Image) -> PilImage.Image:
    """RGB pixels; transparency becomes white, for tools and policy alike."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    white = PilImage.new("RGBA", layer.size, "white")
    return PilImage.alpha_composite(white, layer).convert("RGB")


def encode_png(pixels: PilImage.Image) -> bytes:
    """PNG bytes; the same pixels always give the same bytes."""
    buffer = io.BytesIO()
    pixels.save(buffer, format="PNG")
    return buffer.getvalue()


def image_from_bytes(data: bytes, *, width: int, height: int, ref: ImageRef | None = None) -> Image:
    """An `Image` over encoded bytes; without `ref` it is its own root."""
    digest = hashlib.sha256(data).hexdigest()
    ref = ref or ImageRef(root=f"sha256:{digest}")
    return Image(sha256=digest, data=data, width=width, height=height, ref=ref)


def number(value: object) -> object:
    """Refuse what is not a JSON number; pydantic would turn "1" and true into 1.

    The credit stage reads the same arguments and knows only numbers.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    return value


def indexed_image(context: ToolContext, img_idx: int, *, tool: str) -> Image:
    """The picture `img_idx` of the conversation.

    Raises:
        ToolArgumentError: there is none.
    """
    count = len(context.images)
    if count == 0:
        raise ToolArgumentError(f"{tool}: this conversation has no pictures")
    if not 0 <= img_idx < count:
        raise ToolArgumentError(f"{tool}: img_idx must be 0 to {count - 1}, found {img_idx}")
    return context.images[img_idx]
