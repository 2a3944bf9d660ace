"""What a picture looks like, as numbers: itself and 54 regions of it, so that a crop finds it.

A picture is squashed to SIDE x SIDE pixels. A region of it becomes 8 x 8 cells, and these the low
frequencies (DCT) of brightness and, fewer of them, of colour, without the mean: a unit vector of
DIMENSIONS numbers. Re-encoding and scaling hardly move it; a crop lies close to the region of the
grid nearest to it.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image as PilImage
from PIL import ImageChops

__all__ = [
    "DIMENSIONS",
    "REGIONS",
    "SIDE",
    "Floats",
    "Pixels",
    "covered",
    "margin_box",
    "squashed",
    "vectors_of",
]

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

SIDE = 64
"""[px] of a squashed picture."""
CELLS = 8
MARGIN_TOLERANCE = 60
"""[0..255] largest channel difference to the corner pixel that still counts as margin."""
_TO_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], dtype=np.float32
)
_FREQUENCIES = np.add.outer(np.arange(CELLS), np.arange(CELLS))
_KEPT = tuple((_FREQUENCIES > 0) & (most >= _FREQUENCIES) for most in (8, 3, 3))
"""Of brightness and the two colours: sums of the two frequencies, without the mean."""
DIMENSIONS = sum(int(kept.sum()) for kept in _KEPT)
_FLAT = 2.0
"""[0..255] a region whose cells differ by less, as a root mean square, looks like nothing."""


_ENDS = np.array(
    [(start / 10, 1 - (cut - start) / 10) for cut in range(5) for start in range(cut + 1)],
    dtype=np.float32,
)
"""[15, 2] windows of one side: 1 of the whole, 2 of nine tenths, … 5 of six tenths."""


def _pairs() -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Numbers of the windows of the height and of the width: pairs of equal size."""
    first = [cut * (cut + 1) // 2 for cut in range(6)]
    of_a_size = [range(first[cut], first[cut + 1]) for cut in range(5)]
    pairs = [(y, x) for windows in of_a_size for y in windows for x in windows]
    down, across = np.array(pairs).T
    return down, across


_DOWN, _ACROSS = _pairs()
REGIONS = np.stack([_ENDS[_ACROSS, 0], _ENDS[_DOWN, 0], _ENDS[_ACROSS, 1], _ENDS[_DOWN, 1]], axis=1)
"""[55, 4] left, top, right, bottom, shares: the whole, 4 of nine tenths, … 25 of six tenths."""


def squashed(picture: PilImage.Image) -> Pixels:
    """[SIDE, SIDE, 3] RGB."""
    small = picture.resize((SIDE, SIDE), PilImage.Resampling.BILINEAR, reducing_gap=3.0)
    return np.asarray(small, dtype=np.uint8)


def margin_box(picture: PilImage.Image) -> tuple[int, int, int, int]:
    """[px] what lies within the border that has the colour of the top left pixel."""
    corner = picture.getpixel((0, 0))
    margin = PilImage.new("RGB", picture.size, corner)
    red, green, blue = ImageChops.difference(picture, margin).split()
    contrast = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    box = contrast.point([255 * (value > MARGIN_TOLERANCE) for value in range(256)]).getbbox()
    return box or (0, 0, *picture.size)


def covered(start: Floats, end: Floats, cells: int) -> Floats:
    """Means over equal cells between two edges of a side of SIDE pixels, as weights.

    Args:
        start, end: [N] shares of the side.

    Returns:
        [N, cells, SIDE] each row sums to 1; a pixel counts by the share of it that is covered.
    """
    steps = np.linspace(0, 1, cells + 1, dtype=np.float32)
    edges = SIDE * (start[:, None] + (end - start)[:, None] * steps)
    before = np.clip(edges[:, :, None] - np.arange(SIDE, dtype=np.float32), 0, 1)
    weights = before[:, 1:] - before[:, :-1]
    means: Floats = weights / np.maximum(weights.sum(axis=2, keepdims=True), 1e-6)
    return means


def vectors_of(pixels: Pixels, *, regions: int = len(REGIONS)) -> Floats:
    """[regions, DIMENSIONS] unit vectors of the first REGIONS of a squashed picture; of a flat
    one, zeros."""
    down, across = _DOWN[:regions], _ACROSS[:regions]
    sides = covered(_ENDS[:, 0], _ENDS[:, 1], CELLS)[: max(down) + 1]
    weights = sides.reshape(-1, SIDE)
    planes = np.tensordot(_TO_YCC, pixels.astype(np.float32), axes=(1, 2))  # [3, SIDE, SIDE]
    cells = (weights @ planes @ weights.T).reshape(3, len(sides), CELLS, len(sides), CELLS)
    waves = _dct() @ cells.transpose(1, 3, 0, 2, 4)[down, across] @ _dct().T  # [regions, 3, 8, 8]
    vectors = np.concatenate([waves[:, n, kept] for n, kept in enumerate(_KEPT)], axis=1)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    flat = norms < _FLAT * CELLS
    return np.where(flat, 0, vectors / np.where(flat, 1, norms)).astype(np.float32)


@cache
def _dct() -> Floats:
    """[8, 8] orthonormal, a frequency a row."""
    place = (np.arange(CELLS) + 0.5) * np.pi / CELLS
    waves = np.sqrt(2 / CELLS) * np.cos(np.outer(np.arange(CELLS), place))
    waves[0] /= np.sqrt(2)
    transform: Floats = waves.astype(np.float32)
    return transform
