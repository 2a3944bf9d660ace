"""The credit seam: objects that turn scalar advantages into per-turn ones."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from tapo_train.credit.actions import Reader
from tapo_train.credit.diagnostics import finish, tally
from tapo_train.credit.options import TapoOptions
from tapo_train.credit.result import CreditResult, plain_records, unchanged
from tapo_train.credit.steps import CreditRow
from tapo_train.credit.tapo import (
    call_advantages,
    judge,
    step_columns,
    step_records,
    turn_advantages,
)


class CreditAssigner(Protocol):
    """Advantages of every turn of every row, from the rows of whole groups.

    Called once per rollout batch on the rank that holds the groups, before mini-batches are
    cut; a stage that looks beyond a question is given the rows of all ranks
    (`training/credit_over_ranks.py`). Deterministic, in float64, without gradients. It takes
    rows and gives a result of another type, so that it cannot be applied twice by accident.
    """

    def __call__(self, rows: Sequence[CreditRow]) -> CreditResult:
        """Assign credit; raises `CreditError` on impossible rows."""
        ...


class NoTransfer:
    """The baseline: every turn keeps its trajectory's advantage."""

    def __call__(self, rows: Sequence[CreditRow]) -> CreditResult:
        return CreditResult(
            step_advantages=[unchanged(row) for row in rows],
            call_advantages=[()] * len(rows),
            records=partial(plain_records, rows),
            metrics={},
        )


@contextmanager
def paused_collector() -> Iterator[None]:
    """No cyclic garbage collection inside.

    The stage makes many small tuples and no cycles. A full collection in the middle of it would
    walk every object of the process, a model and an engine included, and make the time of the
    stage grow faster than its input.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Tapo:
    """Tool-aware credit transfer (arXiv 2606.05784); see `tapo_train.credit.tapo`."""

    def __init__(self, options: TapoOptions) -> None:
        self.options = options
        self._reader = Reader(options)

    def __call__(self, rows: Sequence[CreditRow]) -> CreditResult:
        start = time.perf_counter()
        # What was needed on the way is gone before the collector could look at it.
        with paused_collector():
            result = self._assign(rows)
        result.metrics["tapo/time_s"] = time.perf_counter() - start
        return result

    def _assign(self, rows: Sequence[CreditRow]) -> CreditResult:
        judgement = judge(rows, self.options, self._reader)
        sums = tally(rows, judgement, audit=self.options.audit)
        return CreditResult(
            step_advantages=turn_advantages(rows, judgement, self.options),
            call_advantages=call_advantages(rows, judgement, self.options),
            records=partial(step_records, rows, step_columns(judgement)),
            metrics=finish(sums),
            sums=sums,
        )
