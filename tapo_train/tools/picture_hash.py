"""Perceptual hashes for the image index; on lookup, a margin of one colour may be ignored."""

from __future__ import annotations

import imagehash
from PIL import Image as PilImage
from PIL import ImageChops

MARGIN_TOLERANCE = 60
"""[0..255] largest channel difference to the corner pixel that still counts as margin."""


def trim_margin(image: PilImage.Image) -> PilImage.Image:
    """Cut away the border that has the colour of the top left pixel."""
    corner = image.getpixel((0, 0))
    margin = PilImage.new("RGB", image.size, corner)
    red, green, blue = ImageChops.difference(image, margin).split()
    contrast = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    box = contrast.point([255 * (value > MARGIN_TOLERANCE) for value in range(256)]).getbbox()
    return image.crop(box) if box else image


def index_hash(image: PilImage.Image) -> int:
    """64-bit DCT hash of a picture as it stands in the index."""
    return int(str(imagehash.phash(image)), 16)


def lookup_hashes(image: PilImage.Image) -> tuple[int, ...]:
    """The hashes a query picture is looked up by: as it is, and without its margin."""
    rgb = image.convert("RGB")
    return index_hash(rgb), index_hash(trim_margin(rgb))
