"""A credit stage whose rows are those of all ranks: for one that looks beyond a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tapo_train.credit.assigners import CreditAssigner
from tapo_train.credit.result import CreditResult
from tapo_train.credit.steps import CreditRow
from tapo_train.learner import distributed


class OverRanks:
    """Every rank computes what one rank with all rows would, and keeps its own part.

    Rows are put in the order of their ids, as which rank holds which must not matter, to a
    clustering that goes by first fit as little as to a draw.

    Args:
        assigner: deterministic, as every rank calls it with the same rows.
    """

    def __init__(self, assigner: CreditAssigner) -> None:
        self._assigner = assigner

    def __call__(self, rows: Sequence[CreditRow]) -> CreditResult:
        """All ranks together; the counts of all rows are in the `sums` of rank 0 alone."""
        ranks = distributed.all_gather_objects(list(rows))
        everywhere = [row for rank in ranks for row in rank]
        order = sorted(
            range(len(everywhere)), key=lambda i: (everywhere[i].group, everywhere[i].id)
        )
        found = self._assigner([everywhere[i] for i in order])
        place = {number: at for at, number in enumerate(order)}
        start = sum(len(rank) for rank in ranks[: distributed.rank()])
        own = [place[number] for number in range(start, start + len(rows))]
        return replace(
            found,
            step_advantages=[found.step_advantages[at] for at in own],
            call_advantages=[found.call_advantages[at] for at in own],
            records=lambda: [found.steps[at] for at in own],
            sums=found.sums if distributed.rank() == 0 else {},
        )
