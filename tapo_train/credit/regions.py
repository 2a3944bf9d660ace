"""Picture regions: resolving a tool's box to the root picture, and comparing regions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tapo_train.credit.steps import CreditRow, CreditStep
from tapo_train.errors import CreditError
from tapo_train.types import Box, ImageRef

Floats = npt.NDArray[np.float64]

_DECIMALS = 9
"""Boxes are rounded to so many decimals of the root, so that the same region reached by two
chains of crops is the same region; a billionth of a picture is far below a pixel."""


class Region(NamedTuple):
    """A box in [0, 1]^2 of a root picture, and the index by which the policy named it."""

    root: str
    box: Box
    picture: int = 0


def picture_index(value: Any, count: int) -> int | None:
    """The index a policy wrote, or None if it names none of `count` pictures."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not 0 <= value < count or value != int(value):
        return None
    return int(value)


def legal_box(value: Any, width: float, height: float) -> Box | None:
    """Four numbers with 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height, or None."""
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        return None
    x0, y0, x1, y1 = value
    kinds = (type(x0), type(y0), type(x1), type(y1))
    # The counts see to it that True is no number. NaN fails every comparison below.
    if kinds.count(int) + kinds.count(float) != 4:
        return None
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        return None
    return x0, y0, x1, y1


def compose(parent: Box, box: Box, width: float, height: float) -> Box:
    """`box` of a picture of width x height units, in the frame of the picture's root."""
    px0, py0, px1, py1 = parent
    x0, y0, x1, y1 = box
    dx, dy = (px1 - px0) / width, (py1 - py0) / height
    return _rounded((px0 + x0 * dx, py0 + y0 * dy, px0 + x1 * dx, py0 + y1 * dy))


def _rounded(box: Box) -> Box:
    x0, y0, x1, y1 = box
    return round(x0, _DECIMALS), round(y0, _DECIMALS), round(x1, _DECIMALS), round(y1, _DECIMALS)


def whole_picture(ref: ImageRef) -> Region:
    """A registered picture as a region."""
    return Region(ref.root, _rounded(ref.box))


def named_picture(arguments: Mapping[str, Any], row: CreditRow, step: CreditStep) -> int | None:
    """The registry index in `img_idx` (or `image_index`); 0 if neither is given."""
    value = arguments.get("img_idx")
    if value is None:
        value = arguments.get("image_index", 0)
    return picture_index(value, min(step.num_images, len(row.images)))


def zoom_region(
    arguments: Mapping[str, Any], row: CreditRow, step: CreditStep, *, pixels: bool
) -> Region | None:
    """The region a zoom call asks for, in the frame of its root; None if the call is invalid.

    The requested box counts, not what the tool made of it (padding, smallest side). Nothing is
    clamped. Raises `CreditError` if boxes are in pixels and the picture's size is unknown.
    """
    index = named_picture(arguments, row, step)
    if index is None:
        return None
    width = height = 1000.0
    if pixels:
        if index >= len(row.image_sizes):
            raise CreditError(f"row {row.id!r}: size of picture {index} unknown")
        width, height = row.image_sizes[index]
    box = arguments.get("bbox_2d")
    legal = legal_box(arguments.get("bbox") if box is None else box, width, height)
    if legal is None:
        return None
    parent = row.images[index]
    return Region(parent.root, compose(parent.box, legal, width, height), index)


def _area(boxes: Floats) -> Floats:
    area: Floats = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return area


def iou_matrix(left: Sequence[Region], right: Sequence[Region], *, generalized: bool) -> Floats:
    """[len(left), len(right)] intersection over union in the root frame; 0 for other roots.

    Two equal regions without area have 1. With `generalized`, GIoU (1902.09630) cut at 0.
    """
    roots: dict[str, int] = {}
    a = np.array([region.box for region in left], dtype=np.float64)
    b = np.array([region.box for region in right], dtype=np.float64)
    root_a = np.array([roots.setdefault(region.root, len(roots)) for region in left])
    root_b = np.array([roots.setdefault(region.root, len(roots)) for region in right])
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    side = np.maximum(high - low, 0.0)
    common = side[..., 0] * side[..., 1]
    union = _area(a)[:, None] + _area(b)[None, :] - common
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Floats = common / union
        if generalized:
            outer = np.maximum(a[:, None, 2:], b[None, :, 2:]) - np.minimum(
                a[:, None, :2], b[None, :, :2]
            )
            hull = outer[..., 0] * outer[..., 1]
            result = np.maximum(result - (hull - union) / hull, 0.0)
    if not union.all():
        equal = (a[:, None] == b[None]).all(axis=-1)
        result = np.where(union > 0.0, result, equal)
    if len(roots) > 1:
        result = np.where(root_a[:, None] == root_b[None, :], result, 0.0)
    return result


def iou(left: Sequence[float], right: Sequence[float]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1); equal boxes have 1.

    >>> round(iou([100, 100, 500, 500], [150, 100, 550, 500]), 4)
    0.7778
    """
    if list(left) == list(right):
        return 1.0
    width = min(left[2], right[2]) - max(left[0], right[0])
    height = min(left[3], right[3]) - max(left[1], right[1])
    common = max(width, 0.0) * max(height, 0.0)
    area = (left[2] - left[0]) * (left[3] - left[1]) + (right[2] - right[0]) * (right[3] - right[1])
    union = area - common
    return common / union if union > 0.0 and math.isfinite(union) else 0.0
