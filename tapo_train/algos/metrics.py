"""Metrics as (sum, count) pairs, so that micro-batches and ranks reduce by addition.

A pair is one float64 tensor of shape [2] on the device of its values. Nothing here
reads a value back from the device; `finalise` does, once per step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Metrics = dict[str, Tensor]
"""name -> [2] float64, detached: (sum, count)."""


def pair(values: Tensor) -> Tensor:
    """(sum, count) of a tensor of any shape; booleans count their true entries."""
    found = values.detach()
    # Neither form makes a wider copy of the values, as sum(dtype=float64) does on a CPU.
    total = (found.count_nonzero() if found.dtype == torch.bool else found.sum()).double()
    return torch.stack((total, torch.full_like(total, values.numel())))


def by_index(name: str, values: Tensor, index: Tensor | None, size: int) -> Metrics:
    """`name/<index>` pairs of per-token values.

    Args:
        values: [K] numbers or booleans.
        index: [K] int64 in [0, size); None gives no metrics.
    """
    if index is None:
        return {}
    wide = values.detach().double()
    sums = wide.new_zeros(2, size)
    sums[0].index_add_(0, index, wide)
    sums[1].index_add_(0, index, torch.ones_like(wide))
    return {f"{name}/{number}": sums[:, number] for number in range(size)}


def merge(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Metrics:
    """Sum of two sets of pairs; a name that only one of them holds is kept as it is."""
    merged = dict(first)
    for name, value in second.items():
        merged[name] = merged[name] + value if name in merged else value
    return merged


def finalise(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Means: sum / count, in one transfer from the device; an empty count gives 0."""
    if not metrics:
        return {}
    rows = torch.stack(list(metrics.values())).tolist()
    return {
        name: total / count if count else 0.0
        for name, (total, count) in zip(metrics, rows, strict=True)
    }
