"""TAPO: credit transfer from successful to failing trajectories of the same question.

Paper: "TAPO: Tool-Aware Policy Optimization via Credit Transfer for Multimodal Search Agents",
arXiv 2606.05784. A tool step of a failing trajectory that asks for the same as steps of
successful ones is blamed less:

    C* = argmax_C sim(step, C)
    F  = sim x sup(C*) x Adv(C*)        if sim >= theta and sim x sup(C*) >= alpha_min, else 0
    A' = min(0, A + beta F)

Successful trajectories, turns without a valid call, the answer turn and advantages of zero or
more never change. What the paper leaves open is said in `TapoOptions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tapo_train.credit.actions import Actions, Reader, gather
from tapo_train.credit.audit import Audit
from tapo_train.credit.matching import Flags, Floats, Indices, Matches, match
from tapo_train.credit.options import TapoOptions
from tapo_train.credit.result import CallAdvantage, StepRecord, plain_records, unchanged
from tapo_train.credit.steps import CreditRow
from tapo_train.errors import CreditError


@dataclass(slots=True)
class Judgement:
    """What the transfer decided, as columns: [Q] over eligible calls, [S] over their steps.

    Calls and steps are those of failing rows, in order of row, step and call.
    """

    actions: Actions
    matches: Matches
    given: Floats
    """[Q] transfer of each call: the match's, or 0 where a further rule forbids it."""
    start: Indices
    """[S] the first of each step's calls, which are contiguous."""
    row: Indices
    """[S]"""
    position: Indices
    """[S] in `CreditRow.steps`."""
    turn: Indices
    """[S] among all assistant turns."""
    best: Indices
    """[S] the call that speaks for the step: highest transfer, then highest similarity."""
    theta: Flags
    """[S] some call passes the theta gate."""
    alpha: Flags
    """[S]"""
    matched: Flags
    """[S] some call gives a transfer."""
    transfer: Floats
    """[S] reduced over the calls."""
    advantage: Floats
    """[S] after the correction."""
    clipped: Flags
    """[S] cut at zero."""


def judge(rows: Sequence[CreditRow], options: TapoOptions, reader: Reader) -> Judgement:
    """Match every eligible call of the failing rows and decide what its step is worth."""
    return decide(rows, gather(rows, options, reader), options, reader)


def decide(
    rows: Sequence[CreditRow], actions: Actions, options: TapoOptions, reader: Reader
) -> Judgement:
    """`judge`, with the eligible calls already gathered."""
    matches = match(actions, rows, options, reader)
    given = _restrict(matches, actions, rows, options)
    row, position = np.array(actions.queries.row, int), np.array(actions.queries.step, int)
    is_first = np.ones(len(row), dtype=np.bool_)
    is_first[1:] = (row[1:] != row[:-1]) | (position[1:] != position[:-1])
    start = np.flatnonzero(is_first)
    transfer = reduce_calls(given, start, options.turn_reduce)
    base = _base(rows, actions)[start]
    advantage, clipped = corrected(base, transfer, options)
    return Judgement(
        actions=actions,
        matches=matches,
        given=given,
        start=start,
        row=row[start],
        position=position[start],
        turn=np.array(actions.queries.turn, int)[start],
        best=_strongest(given, matches.similarity, start),
        theta=_any(matches.theta, start),
        alpha=_any(matches.alpha, start),
        matched=_any(given > 0.0, start),
        transfer=transfer,
        advantage=advantage,
        clipped=clipped,
    )


def _base(rows: Sequence[CreditRow], actions: Actions) -> Floats:
    """[Q] advantage of each call's turn, as the rows came."""
    queries = actions.queries
    return np.array(
        [rows[i].advantage_at(t) for i, t in zip(queries.row, queries.turn, strict=True)]
    )


def _any(flags: Flags, start: Indices) -> Flags:
    if len(start) == len(flags):
        return flags
    result: Flags = np.logical_or.reduceat(flags, start)
    return result


def _restrict(
    matches: Matches, actions: Actions, rows: Sequence[CreditRow], options: TapoOptions
) -> Floats:
    """Take the transfer from repeats and from disagreeing observations, where asked to."""
    given = matches.transfer.copy()
    queries = actions.queries
    if options.correct_repeats == "first":
        seen: set[object] = set()
        for i, cluster in enumerate(matches.cluster.tolist()):
            # Equal keys of one tool and row have one cluster, which tells the tools apart.
            what = (queries.row[i], queries.key[i], cluster)
            given[i] = 0.0 if what in seen else given[i]
            seen.add(what)
    if options.require_observation_agreement:
        audit = Audit(rows, actions, matches)
        for i in np.flatnonzero(given).tolist():
            agreeing, pairs = audit.agreement(i)
            if pairs == 0 or 2 * agreeing < pairs:
                given[i] = 0.0
    return given


def reduce_calls(given: Floats, start: Indices, kind: str) -> Floats:
    """[S] one transfer per turn from those of its eligible calls, an unmatched one being 0."""
    if len(start) == len(given):
        return given
    if kind == "max":
        reduced: Floats = np.maximum.reduceat(given, start)
    elif kind == "min":
        reduced = np.minimum.reduceat(given, start)
    else:
        counts = np.diff(np.append(start, len(given)))
        reduced = np.add.reduceat(given, start) / counts
    return reduced


def _strongest(given: Floats, similarity: Floats, start: Indices) -> Indices:
    if len(start) == len(given):
        return start
    best = start.copy()
    ends = np.append(start[1:], len(given))
    strength = list(zip(given.tolist(), np.nan_to_num(similarity, nan=-1.0).tolist(), strict=True))
    for s in np.flatnonzero(ends - start > 1).tolist():
        best[s] = max(range(start[s], ends[s]), key=strength.__getitem__)
    return best


def corrected(base: Floats, transfer: Floats, options: TapoOptions) -> tuple[Floats, Flags]:
    """(A', whether cut at zero), elementwise; without transfer bit for bit the old value.

    A turn of a failing row may have an advantage of its own that is not negative: it is not
    blamed, so there is nothing to take away.
    """
    with np.errstate(over="ignore"):  # refused below, with a better message
        moved = np.where((transfer != 0.0) & (base < 0.0), base + options.beta * transfer, base)
    if not np.isfinite(moved).all():
        worst = int(np.flatnonzero(~np.isfinite(moved))[0])
        raise CreditError(f"{base[worst]} + {options.beta} x {transfer[worst]} is not finite")
    clipped = (moved > 0.0) & (base < 0.0) & options.use_clip
    return np.where(clipped, 0.0, moved), clipped


def turn_advantages(
    rows: Sequence[CreditRow], judgement: Judgement, options: TapoOptions
) -> list[Floats]:
    """Per row [num_turns], with the corrections of its steps."""
    num_turns = np.array([row.num_turns for row in rows], dtype=np.int64)
    flat = np.concatenate([np.zeros(0), *map(unchanged, rows)])
    ends = np.cumsum(num_turns)
    offsets = ends - num_turns
    if options.span == "turn":
        flat[offsets[judgement.row] + judgement.turn] = judgement.advantage
    return [flat[low:high] for low, high in zip(offsets.tolist(), ends.tolist(), strict=True)]


def call_advantages(
    rows: Sequence[CreditRow], judgement: Judgement, options: TapoOptions
) -> list[tuple[CallAdvantage, ...]]:
    """Per row, the calls whose tokens have an advantage of their own.

    With `turn_reduce=span` each eligible call has its own correction; with `span=call` the
    corrected value of the step goes to its calls instead of the whole turn.
    """
    found: list[tuple[CallAdvantage, ...]] = [()] * len(rows)
    if options.span == "turn" and options.turn_reduce != "span":
        return found
    queries = judgement.actions.queries
    own, _ = corrected(_base(rows, judgement.actions), judgement.given, options)
    ends = np.append(judgement.start[1:], len(own))
    shared = np.repeat(judgement.advantage, ends - judgement.start)
    values = own if options.turn_reduce == "span" else shared
    for i, turn, c, value in zip(
        queries.row, queries.turn, queries.call, values.tolist(), strict=True
    ):
        found[i] += (CallAdvantage(turn, c, value),)
    return found


def step_columns(judgement: Judgement) -> tuple[npt.NDArray[Any], ...]:
    """What `step_records` needs: place, then the fields of a record; [S] each.

    The judgement itself, with the keys of all calls, can then be forgotten.
    """
    matches, best = judgement.matches, judgement.best
    return (
        judgement.row, judgement.position, judgement.turn, judgement.advantage, judgement.theta,
        judgement.alpha, judgement.matched, matches.similarity[best], matches.support[best],
        matches.advantage[best], judgement.transfer, judgement.clipped,
    )  # fmt: skip


def step_records(
    rows: Sequence[CreditRow], columns: Sequence[npt.NDArray[Any]]
) -> list[tuple[StepRecord, ...]]:
    """Per row, one record per tool step, from `step_columns`."""
    records = [list(records) for records in plain_records(rows)]
    for i, s, turn, value, theta, alpha, matched, sim, sup, adv, transfer, clipped in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        if sim != sim:  # NaN: no success used the tool
            records[i][s] = StepRecord(turn, value, True)
            continue
        records[i][s] = StepRecord(
            turn, value, True, theta, alpha, matched, sim, sup, adv, transfer, clipped
        )
    return [tuple(steps) for steps in records]
