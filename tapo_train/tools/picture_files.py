"""Pictures with titles, read one by one and described for a picture index.

image_index.jsonl   {"title", "image"} per line, paths beside the file
a folder            every PNG, JPEG and WebP below it, by its name without the ending
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as PilImage

from tapo_train.data.images import BROKEN, FORMATS
from tapo_train.errors import DataError
from tapo_train.tools.images import encode_picture, on_white
from tapo_train.tools.index_file import index_lines
from tapo_train.tools.picture_match import brightness_of
from tapo_train.tools.picture_vectors import Floats, Pixels, margin_box, squashed, vectors_of

__all__ = ["Described", "described_pictures", "titled_pictures"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
THUMBNAIL_PNG_PIXELS = 128 * 128
"""Up to so many a thumbnail is a PNG."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """All that an index keeps of a picture."""

    header: bytes
    """JSON: title, width and height of the thumbnail."""
    thumbnail: bytes
    brightness: Pixels
    """[SIDE, SIDE]"""
    margin: Floats
    """[4] left, top, right, bottom of what lies within the margin, shares."""
    vectors: Floats
    """[56, DIMENSIONS] of the regions, and of what lies within the margin."""
    digest: str
    """Of what the picture looks like."""


def described_pictures(source: Path, *, thumbnail_side_px: int) -> Iterator[Described]:
    """Every picture of a file or folder, in order.

    Raises:
        DataError: as `titled_pictures`.
    """
    for title, pixels in titled_pictures(source):
        yield described(title, pixels, thumbnail_side_px=thumbnail_side_px)


def titled_pictures(source: Path) -> Iterator[tuple[str, PilImage.Image]]:
    """Title and RGB pixels of every picture of a file or folder, in order.

    Raises:
        DataError: a line or a picture cannot be read, or a path leads out of the folder.
    """
    for where, title, path in _titled(source):
        try:
            with PilImage.open(path, formats=FORMATS) as encoded:
                pixels = on_white(encoded)
        except BROKEN as error:
            raise _unreadable(where, error) from error
        yield title, pixels


def described(title: str, pixels: PilImage.Image, *, thumbnail_side_px: int) -> Described:
    """One picture, RGB."""
    small = pixels.copy()
    small.thumbnail((thumbnail_side_px, thumbnail_side_px), PilImage.Resampling.LANCZOS)
    whole, box = squashed(pixels), margin_box(pixels)
    inside = vectors_of(squashed(pixels.crop(box)), regions=1)
    header = {"title": title, "width": small.width, "height": small.height}
    return Described(
        header=json.dumps(header).encode(),
        thumbnail=encode_picture(small, png_pixels=THUMBNAIL_PNG_PIXELS),
        brightness=brightness_of(whole),
        margin=np.divide(box, 2 * pixels.size, dtype=np.float32),
        vectors=np.concatenate([vectors_of(whole), inside]),
        digest=hashlib.sha256(whole.tobytes()).hexdigest(),
    )


def _titled(source: Path) -> Iterator[tuple[str, str, Path]]:
    """(place, title, path) of every picture."""
    if source.is_dir():
        paths = [path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES]
        yield from ((str(path), path.stem, path) for path in sorted(paths))
        return
    root = source.parent.resolve()
    for where, line in index_lines(source, "image index"):
        try:
            row = json.loads(line)
            title, name = str(row["title"]), str(row["image"])
            path = (root / name).resolve()
            if not path.is_relative_to(root):
                raise ValueError(f"path {name!r} leads out of {root}")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise _unreadable(where, error) from error
        yield where, title, path


def _unreadable(where: str, error: Exception) -> DataError:
    return DataError(
        f'{where}: {type(error).__name__}: {error}; wanted {{"title", "image"}} '
        "with a readable picture"
    )
