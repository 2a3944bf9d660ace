"""Similarity matrices of picture regions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tapo_train.credit.regions import Region
from tapo_train.credit.setsim import Floats, Rows


def region_space(
    keys: Sequence[Region],
    references: int,
    *,
    generalized: bool = False,
    same_index: bool = False,
) -> Rows:
    """Intersection over union in the root frame; 0 for other roots, 1 for equal regions.

    With `generalized`, GIoU (arXiv 1902.09630) cut at 0; with `same_index`, 0 also where the
    policy called the pictures by different numbers.
    """
    # In thousandths, boxes as policies write them are integers: areas are exact, and so are
    # ties and inclusive gates.
    corners = np.array([region.box for region in keys], dtype=np.float64) * 1000.0
    area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    names = [(key.root, key.picture if same_index else 0) for key in keys]
    frames: dict[tuple[str, int], int] = {}
    frame = [frames.setdefault(name, len(frames)) for name in names]

    def rows(low: int, high: int) -> Floats:
        left, right = corners[low:high, None], corners[None, :references]
        side = np.minimum(left[..., 2:], right[..., 2:]) - np.maximum(left[..., :2], right[..., :2])
        np.maximum(side, 0.0, out=side)
        common = side[..., 0] * side[..., 1]
        union = area[low:high, None] + area[:references] - common
        # Boxes so small that their area is 0 overlap only with themselves.
        flat = union <= 0.0
        result: Floats = common / (union + flat)
        if generalized:
            result = np.maximum(result - _hull_excess(left, right, union), 0.0)
        if flat.any():
            result = np.where(flat, (left == right).all(axis=-1), result)
        if len(frames) > 1:
            number = np.array(frame)
            result = np.where(number[low:high, None] == number[:references], result, 0.0)
        return result

    return rows


def _hull_excess(left: Floats, right: Floats, union: Floats) -> Floats:
    """Share of the smallest enclosing box that neither region covers."""
    side = np.maximum(left[..., 2:], right[..., 2:]) - np.minimum(left[..., :2], right[..., :2])
    hull = side[..., 0] * side[..., 1]
    excess: Floats = np.where(hull > 0.0, hull - union, 0.0) / np.where(hull > 0.0, hull, 1.0)
    return excess
