"""The reference library of one question and tool: which actions did successes share?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from tapo_train.credit.setsim import Rows

Linkage = Literal["single", "leader", "complete", "exact"]

_CELLS = 1 << 21
"""Most cells of a similarity matrix held at once."""


def row_chunks(count: int, width: int) -> list[tuple[int, int]]:
    """Ranges that cover range(count), each at most `_CELLS` cells of a matrix of this width."""
    size = max(1, _CELLS // max(1, width))
    return [(low, min(low + size, count)) for low in range(0, count, size)]


def cluster(rows: Rows, count: int, *, threshold: float, linkage: Linkage) -> list[int]:
    """Cluster index [count] of each reference, numbered by first appearance.

    Args:
        rows: similarities of references lo..hi to all `count` references.
        threshold: least similarity of an edge.
        linkage: single = connected components (independent of order); leader = first fit against
            the first member, as GiGPO does; complete = the two closest clusters are joined while
            every pair in them reaches the threshold; exact = equal keys only.
    """
    if count <= 1 or linkage == "exact":
        return list(range(count))
    if linkage == "single":
        return _connected(rows, count, threshold)
    values = rows(0, count)
    return _leader(values, threshold) if linkage == "leader" else _complete(values, threshold)


def _find(parent: list[int], node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


def _connected(rows: Rows, count: int, threshold: float) -> list[int]:
    parent = list(range(count))
    for low, high in row_chunks(count, count):
        edges = rows(low, high) >= threshold
        if np.count_nonzero(edges) == high - low:
            continue  # no edge but of each reference with itself
        left, right = np.nonzero(edges)
        left += low
        below = right < left
        for a, b in zip(left[below].tolist(), right[below].tolist(), strict=True):
            root_a, root_b = _find(parent, a), _find(parent, b)
            # The smaller index stays the root, so that labels appear in order.
            if root_a < root_b:
                parent[root_b] = root_a
            else:
                parent[root_a] = root_b
    return _relabel([_find(parent, node) for node in range(count)])


def _relabel(labels: Sequence[int]) -> list[int]:
    number: dict[int, int] = {}
    return [number.setdefault(label, len(number)) for label in labels]


def _leader(values: npt.NDArray[np.float64], threshold: float) -> list[int]:
    leaders: list[int] = []
    labels = []
    for i in range(len(values)):
        fit = next((c for c, leader in enumerate(leaders) if values[i, leader] >= threshold), None)
        if fit is None:
            fit = len(leaders)
            leaders.append(i)
        labels.append(fit)
    return labels


def _complete(values: npt.NDArray[np.float64], threshold: float) -> list[int]:
    least = np.minimum(values, values.T)
    np.fill_diagonal(least, -1.0)
    labels = np.arange(len(values))
    while True:
        a, b = np.unravel_index(int(least.argmax()), least.shape)
        if least[a, b] < threshold or least[a, b] < 0.0:
            return _relabel(labels.tolist())
        keep, drop = min(a, b), max(a, b)
        merged = np.minimum(least[keep], least[drop])
        least[keep], least[:, keep] = merged, merged
        least[keep, keep] = -1.0
        least[drop], least[:, drop] = -1.0, -1.0
        labels[labels == labels[drop]] = labels[keep]
