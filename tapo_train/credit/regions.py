"""Picture regions: resolving a tool's box to the root picture, and comparing regions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tapo_train.credit.steps import CreditRow, CreditStep
from tapo_train.errors import CreditError
from tapo_train.types import Box, ImageRef

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_NUMBERS = frozenset({int, float})
"""Types of a JSON number; the type of True is neither."""
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
    if type(value) is int:
        return value if 0 <= value < count else None
    # An integral float is an index; True is not. NaN and infinity fail the comparison.
    if type(value) is not float or not 0 <= value < count or value != int(value):
        return None
    return int(value)


def legal_box(value: Any, width: float, height: float) -> Box | None:
    """Four numbers with 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height, or None."""
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        return None
    x0, y0, x1, y1 = value
    if not type(x0) is type(y0) is type(x1) is type(y1) is int and not _NUMBERS.issuperset(
        map(type, value)
    ):
        return None
    # NaN fails every comparison.
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        return None
    return x0, y0, x1, y1


def compose(parent: Box, box: Box, width: float, height: float) -> Box:
    """`box` of a picture of width x height units, in the frame of the picture's root."""
    x0, y0, x1, y1 = box
    if parent == WHOLE:
        found = x0 / width, y0 / height, x1 / width, y1 / height
        # Whole thousandths, the usual case, have three decimals: nothing to round.
        is_exact = width == height == 1000.0 and type(x0) is type(y0) is type(x1) is type(y1) is int
        return found if is_exact else _rounded(found)
    px0, py0, px1, py1 = parent
    dx, dy = (px1 - px0) / width, (py1 - py0) / height
    return _rounded((px0 + x0 * dx, py0 + y0 * dy, px0 + x1 * dx, py0 + y1 * dy))


def _rounded(box: Box) -> Box:
    x0, y0, x1, y1 = box
    return round(x0, _DECIMALS), round(y0, _DECIMALS), round(x1, _DECIMALS), round(y1, _DECIMALS)


def whole_picture(ref: ImageRef) -> Region:
    """A registered picture as a region."""
    return Region(ref.root, ref.box if ref.box == WHOLE else _rounded(ref.box))


def named_picture(arguments: Mapping[str, Any]) -> Any:
    """What stands under `img_idx` (or `image_index`); None if nothing does."""
    value = arguments.get("img_idx")
    return arguments.get("image_index") if value is None else value


def registered(value: Any, row: CreditRow, step: CreditStep) -> int | None:
    """A written index of a picture that was there when the turn was sampled, or None."""
    return picture_index(value, min(step.num_images, len(row.images)))


def zoom_region(
    arguments: Mapping[str, Any],
    row: CreditRow,
    step: CreditStep,
    *,
    pixels: bool,
    keep_index: bool = False,
) -> Region | None:
    """The region a zoom call asks for, in the frame of its root; None if the call is invalid.

    The requested box counts, not what the tool made of it (padding, smallest side). Nothing is
    clamped. Raises `CreditError` if boxes are in pixels and the picture's size is unknown.
    With `keep_index` the region remembers the number by which the policy called the picture.
    """
    named = named_picture(arguments)
    index = registered(0 if named is None else named, row, step)
    if index is None:
        return None
    width = height = 1000.0
    if pixels:
        width, height = row.image_sizes[index] if index < len(row.image_sizes) else (0.0, 0.0)
        if not (width > 0 and height > 0):
            raise CreditError(
                f"row {row.id!r}: the size of picture {index} is unknown; credit.box_unit=pixels "
                'wants "size": [width, height] beside each picture'
            )
    box = arguments.get("bbox_2d")
    legal = legal_box(arguments.get("bbox") if box is None else box, width, height)
    if legal is None:
        return None
    parent = row.images[index]
    return Region(
        parent.root, compose(parent.box, legal, width, height), index if keep_index else 0
    )


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
