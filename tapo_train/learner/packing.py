"""Which items share a bin: lengths in, numbers out."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from tapo_train.errors import LearnerError

__all__ = ["best_fit", "together"]


def together(names: Sequence[str]) -> list[list[int]]:
    """Indices of equal names, in order of appearance; "" is no name and stands alone."""
    units: dict[str | int, list[int]] = {}
    for i, name in enumerate(names):
        units.setdefault(name or i, []).append(i)
    return list(units.values())


def best_fit(lengths: Sequence[int], *, budget_tokens: int) -> list[list[int]]:
    """Row numbers of each micro-batch: longest rows first, each where least room is left.

    At most 22 % more micro-batches than needed (best-fit decreasing). Ties keep the order
    given. The rooms are kept sorted, so 16,000 rows take milliseconds.
    """
    if budget_tokens < 1:
        raise LearnerError(f"budget_tokens is {budget_tokens}; wanted at least 1")
    chosen: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    """(tokens free, micro-batch), ascending."""
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, (lengths[i], 0))
        if place < len(rooms):
            free, batch = rooms.pop(place)
        else:
            free, batch = budget_tokens, len(chosen)
            chosen.append([])
        chosen[batch].append(i)
        insort(rooms, (free - lengths[i], batch))
    return chosen
