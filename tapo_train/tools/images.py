"""Pixels for tools: decode a checked picture, encode a new one, find one in the registry."""

from __future__ import annotations

import hashlib
import io
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image as PilImage

from tapo_train.data.images import BROKEN, FORMATS, ImageLimits
from tapo_train.errors import ToolArgumentError, ToolDownError, ToolError
from tapo_train.tools.base import ToolContext
from tapo_train.types import Image, ImageRef

__all__ = [
    "ImageDecoder",
    "ResultPictures",
    "encode_picture",
    "encode_png",
    "image_from_bytes",
    "indexed_image",
    "number",
    "on_white",
    "within_pixels",
]

_CACHE_PIXELS = 32_000_000
"""Decoded pixels kept for the next crop of the same picture (about 100 MB)."""
PNG_PIXELS = 500_000
"""Up to so many a new picture is a PNG; noise of a larger one takes seconds and megabytes."""
JPEG_QUALITY = 95
REDUCING_GAP = 3.0
"""Large pictures are averaged down to 3 times the size first: as good, and much faster."""


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
        except BROKEN as error:
            raise ToolError(f"picture {image.sha256[:12]} cannot be decoded: {error}") from error
        with self._lock:
            if image.sha256 not in self._cached:
                self._cached[image.sha256] = pixels
                self._pixels += pixels.width * pixels.height
            while len(self._cached) > 1 and self._pixels > self._cache_pixels:
                _, oldest = self._cached.popitem(last=False)
                self._pixels -= oldest.width * oldest.height
        return pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultPictures:
    """What a conversation takes of the pictures that a tool answers with.

    Each is opened here, inside the call: one that is damaged would end the run later on.
    """

    decoder: ImageDecoder
    """The policy's: what is decoded here need not be decoded again."""
    max_pixels: int | None = None
    """Of all pictures of one answer together; larger ones are reduced to equal shares."""

    def taken(self, images: Sequence[Image]) -> tuple[Image, ...]:
        """The pictures as the policy gets them. Blocks.

        Raises:
            ToolDownError: one cannot be decoded, or is not what it says of itself.
        """
        return tuple(self._taken(image, len(images)) for image in images)

    def _taken(self, image: Image, num: int) -> Image:
        _require_honest(image)
        try:
            pixels = self.decoder.decode(image)
        except ToolError as error:
            raise ToolDownError(f"it answered with a broken {error}", retryable=False) from error
        if pixels.size != (image.width, image.height):
            raise ToolDownError(
                f"its picture has {pixels.width} x {pixels.height} pixels; it says "
                f"{image.width} x {image.height}",
                retryable=False,
            )
        small = pixels if self.max_pixels is None else within_pixels(pixels, self.max_pixels // num)
        if small is pixels:
            return image
        data = encode_picture(small)
        return image_from_bytes(data, width=small.width, height=small.height, ref=image.ref)


def _require_honest(image: Image) -> None:
    """Before anything is opened: the name is that of the bytes, and the size can be borne."""
    if hashlib.sha256(image.data).hexdigest() != image.sha256:
        raise ToolDownError("its picture has other bytes than its digest says", retryable=False)
    limits = ImageLimits()
    try:
        with PilImage.open(io.BytesIO(image.data), formats=FORMATS) as encoded:
            num = encoded.width * encoded.height
    except BROKEN as error:
        raise ToolDownError(
            f"it answered with a picture that cannot be read: {error}", retryable=False
        ) from error
    if num > limits.max_pixels or len(image.data) > limits.max_bytes:
        raise ToolDownError(
            f"its picture has {num} pixels in {len(image.data)} bytes; at most "
            f"{limits.max_pixels} in {limits.max_bytes} are taken",
            retryable=False,
        )


def within_pixels(pixels: PilImage.Image, most: int) -> PilImage.Image:
    """The picture itself, or reduced in proportion to at most `most` pixels."""
    if pixels.width * pixels.height <= most:
        return pixels
    scale = math.sqrt(most / (pixels.width * pixels.height))
    size = (max(1, int(pixels.width * scale)), max(1, int(pixels.height * scale)))
    return pixels.resize(size, PilImage.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)


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


def encode_picture(pixels: PilImage.Image, *, png_pixels: int = PNG_PIXELS) -> bytes:
    """PNG bytes of a small picture, JPEG of a large one, colours at full resolution."""
    if pixels.width * pixels.height <= png_pixels:
        return encode_png(pixels)
    buffer = io.BytesIO()
    pixels.save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
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
