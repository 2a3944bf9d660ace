"""Controls for TAPO, behind the same seam: as much relief from blame, given without looking.

Both take the changes that TAPO would make in these very rows and spend the same sum elsewhere:
`Placebo` on random tool steps of failing trajectories, `Shrink` on all negative advantages alike.
If one of them trains as well as TAPO, it was the amount that helped and not the awareness of
tools. The sum is over turns; how many tokens a turn has is not known here.

Their diagnostics are TAPO's own (what is correctable in the rows), beside what they did instead.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from tapo_train.credit.actions import Reader
from tapo_train.credit.assigners import paused_collector
from tapo_train.credit.diagnostics import finish, tally
from tapo_train.credit.matching import Floats
from tapo_train.credit.options import TapoOptions
from tapo_train.credit.result import CreditResult, unchanged
from tapo_train.credit.steps import CreditRow
from tapo_train.credit.tapo import Judgement, judge, step_columns, step_records, turn_advantages
from tapo_train.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrinkOptions(TapoOptions):
    """Options of `Shrink`: those of the TAPO stage whose sum it meets."""

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceboOptions(TapoOptions):
    """Options of `Placebo`: those of the TAPO stage whose changes it deals out."""

    seed: int = 0
    """Of the dealing, any integer."""

    def __post_init__(self) -> None:
        _check(self)


def _check(options: TapoOptions) -> None:
    """Only changes of whole turns, none beyond zero, can be spent elsewhere."""
    TapoOptions.__post_init__(options)
    for name, found, wanted in (
        ("span", options.span, "turn"),
        ("use_clip", options.use_clip, True),
    ):
        if found != wanted:
            raise ConfigError(f"credit.{name} is {found!r}; want {wanted!r} in a control of TAPO")
    if options.turn_reduce == "span":
        raise ConfigError("credit.turn_reduce is 'span'; want mean, max or min in a control")


class Placebo:
    """TAPO's changes, dealt out at random among the tool steps of failing trajectories.

    The steps are those TAPO could have corrected (valid, executed calls), of all rows given: of
    the whole training step. Stateless: the draw depends on `seed` and the rows, so that a resumed
    run deals as an uninterrupted one, and two ranks as one.
    """

    def __init__(self, options: PlaceboOptions) -> None:
        self.options = options
        self._reader = Reader(options)

    def __call__(self, rows: Sequence[CreditRow]) -> CreditResult:
        return _timed(self._assign, rows)

    def _assign(self, rows: Sequence[CreditRow]) -> CreditResult:
        judgement = judge(rows, self.options, self._reader)
        base = _base(rows, judgement)
        rng = random.Random(f"{self.options.seed}/{'/'.join(row.id for row in rows)}")
        given = deal(judgement.advantage - base, np.maximum(-base, 0.0), rng)
        # Rounding must not make a blamed step positive.
        moved = np.where(base < 0.0, np.minimum(base + given, 0.0), base)
        dealt = replace(judgement, advantage=moved)
        sums = tally(rows, judgement, audit=self.options.audit) | {
            "placebo/steps": int((given > 0.0).sum()),
            "placebo/hits": int(((given > 0.0) & (judgement.transfer > 0.0)).sum()),
        }
        return CreditResult(
            step_advantages=turn_advantages(rows, dealt, self.options),
            call_advantages=[()] * len(rows),
            records=partial(step_records, rows, step_columns(dealt)),
            metrics=finish(sums),
            sums=sums,
        )


class Shrink:
    """All negative advantages times one factor, so that their sum over turns is TAPO's."""

    def __init__(self, options: ShrinkOptions) -> None:
        self.options = options
        self._reader = Reader(options)

    def __call__(self, rows: Sequence[CreditRow]) -> CreditResult:
        return _timed(self._assign, rows)

    def _assign(self, rows: Sequence[CreditRow]) -> CreditResult:
        judgement = judge(rows, self.options, self._reader)
        base = _base(rows, judgement)
        plain = [unchanged(row) for row in rows]
        negative = [(turns < 0.0) & (not r.discarded) for r, turns in zip(rows, plain, strict=True)]
        before = sum(float(t[n].sum()) for t, n in zip(plain, negative, strict=True))
        after = before + float((judgement.advantage - base).sum())
        factor = after / before if before else 1.0
        turns = [np.where(n, t * factor, t) for t, n in zip(plain, negative, strict=True)]
        sums = tally(rows, judgement, audit=self.options.audit) | {
            "shrink/before": -before,
            "shrink/after": -after,
        }
        shrunk = replace(judgement, advantage=np.where(base < 0.0, base * factor, base))
        return CreditResult(
            step_advantages=turns,
            call_advantages=[()] * len(rows),
            records=partial(step_records, rows, step_columns(shrunk)),
            metrics=finish(sums),
            sums=sums,
        )


def deal(changes: Floats, room: Floats, rng: random.Random) -> Floats:
    """[S] the positive `changes` on random steps, none above its `room` [S].

    What does not fit on a step goes on to the next; a step gets a second change only when all
    others have one. The sum is that of `changes`, as long as there is room for it.
    """
    left = room.tolist()
    amounts = [change for change in changes.tolist() if change > 0.0]
    steps = list(range(len(left)))
    rng.shuffle(steps)
    queue = deque(steps)
    given = np.zeros(len(left))
    for amount in amounts:
        while amount > 0.0 and queue:
            step = queue.popleft()
            part = min(amount, left[step])
            given[step] += part
            left[step] -= part
            amount -= part
            if left[step] > 0.0:
                queue.append(step)
    return given


def _base(rows: Sequence[CreditRow], judgement: Judgement) -> Floats:
    """[S] the advantage each step of the judgement came with."""
    places = zip(judgement.row.tolist(), judgement.turn.tolist(), strict=True)
    return np.array([rows[i].advantage_at(turn) for i, turn in places], dtype=np.float64)


def _timed(
    assign: Callable[[Sequence[CreditRow]], CreditResult], rows: Sequence[CreditRow]
) -> CreditResult:
    start = time.perf_counter()
    with paused_collector():
        result = assign(rows)
    result.metrics["tapo/time_s"] = time.perf_counter() - start
    return result
