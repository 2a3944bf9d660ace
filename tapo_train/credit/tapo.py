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

import math
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from tapo_train.credit.actions import Action, Actions, Reader, gather
from tapo_train.credit.audit import observations_agree
from tapo_train.credit.matching import Cluster, Match, match_block
from tapo_train.credit.options import TapoOptions
from tapo_train.credit.result import CallAdvantage, Floats, StepRecord, unchanged
from tapo_train.credit.steps import CreditRow
from tapo_train.errors import CreditError


class Judged(NamedTuple):
    """An eligible call of a failing trajectory, with its match if its tool has a library."""

    action: Action
    tool: str
    match: Match | None
    transfer: float
    """The match's, or 0 where a further rule forbids it."""


class Corrected(NamedTuple):
    """One row after the transfer."""

    turns: Floats
    calls: tuple[CallAdvantage, ...]
    steps: tuple[StepRecord, ...]


class Judgement(NamedTuple):
    """Everything the transfer found out about a batch."""

    actions: Actions
    clusters: list[Cluster]
    by_row: dict[int, list[Judged]]
    """Eligible calls of failing rows, in order of step and call."""


def judge(rows: Sequence[CreditRow], options: TapoOptions, reader: Reader) -> Judgement:
    """Match every eligible call of the failing rows with the libraries of the batch."""
    actions = gather(rows, options, reader)
    clusters: list[Cluster] = []
    by_row: dict[int, list[Judged]] = {}
    for block in actions.blocks.values():
        matches: list[Match] | list[None] = [None] * len(block.queries)
        if block.library:
            similarity = reader.similarity(block.tool)
            found, matches = match_block(block, similarity, rows, actions.num_successes, options)
            clusters += found
        for action, match in zip(block.queries, matches, strict=True):
            transfer = 0.0 if match is None else match.transfer
            by_row.setdefault(action.row, []).append(Judged(action, block.tool, match, transfer))
    for row, calls in by_row.items():
        calls.sort(key=_position)
        by_row[row] = _restrict(calls, rows, options)
    return Judgement(actions, clusters, by_row)


def _position(judged: Judged) -> tuple[int, int]:
    return judged.action.step, judged.action.call


def _restrict(calls: list[Judged], rows: Sequence[CreditRow], options: TapoOptions) -> list[Judged]:
    """Take the transfer from repeats and from disagreeing observations, where asked to."""
    if options.correct_repeats == "first":
        seen: set[object] = set()
        for i, call in enumerate(calls):
            what = (call.tool, call.action.key)
            calls[i] = call._replace(transfer=0.0) if what in seen else call
            seen.add(what)
    if options.require_observation_agreement:
        for i, call in enumerate(calls):
            if call.transfer and not _agrees(call, rows):
                calls[i] = call._replace(transfer=0.0)
    return calls


def _agrees(judged: Judged, rows: Sequence[CreditRow]) -> bool:
    members = () if judged.match is None else judged.match.cluster.members
    agreeing, pairs = observations_agree(judged.action, members, rows)
    return pairs > 0 and 2 * agreeing >= pairs


def reduce_transfers(transfers: Sequence[float], kind: str) -> float:
    """One transfer for a turn from those of its eligible calls (0 for an unmatched one)."""
    if len(transfers) == 1:
        return transfers[0]
    if kind == "max":
        return max(transfers)
    if kind == "min":
        return min(transfers)
    return math.fsum(transfers) / len(transfers)


def corrected(advantage: float, transfer: float, options: TapoOptions) -> tuple[float, bool]:
    """(A', whether it was cut at zero); without transfer bit for bit the old value."""
    if transfer == 0.0:
        return advantage, False
    value = advantage + options.beta * transfer
    if not math.isfinite(value):
        raise CreditError(f"{advantage} + {options.beta} x {transfer} is {value}; want it finite")
    if options.use_clip and value > 0.0:
        return 0.0, True
    return value, False


def correct_row(row: CreditRow, judged: Sequence[Judged], options: TapoOptions) -> Corrected:
    """Apply the transfers of one failing row."""
    turns = unchanged(row.advantage, row.num_turns)
    own_calls: list[CallAdvantage] = []
    records: dict[int, StepRecord] = {}
    for position, group in groupby(judged, key=attrgetter("action.step")):
        calls = list(group)
        turn = row.steps[position].turn
        transfer = reduce_transfers([call.transfer for call in calls], options.turn_reduce)
        value, clipped = corrected(row.advantage, transfer, options)
        records[position] = _record(turn, value, transfer, clipped, calls)
        if options.span == "turn":
            turns[turn] = value
        if options.span == "call" or options.turn_reduce == "span":
            own_calls += _call_advantages(turn, value, row.advantage, calls, options)
    steps = tuple(
        records.get(position) or StepRecord(step.turn, row.advantage)
        for position, step in enumerate(row.steps)
    )
    return Corrected(turns, tuple(own_calls), steps)


def _call_advantages(
    turn: int, value: float, base: float, calls: Sequence[Judged], options: TapoOptions
) -> list[CallAdvantage]:
    """What the tokens of each eligible call get: its own correction, or the turn's."""
    own = options.turn_reduce == "span"
    return [
        CallAdvantage(
            turn, call.action.call, corrected(base, call.transfer, options)[0] if own else value
        )
        for call in calls
    ]


def _strength(judged: Judged) -> tuple[float, float]:
    return judged.transfer, judged.match.similarity if judged.match else -1.0


def _record(
    turn: int, value: float, transfer: float, clipped: bool, calls: Sequence[Judged]
) -> StepRecord:
    best = (calls[0] if len(calls) == 1 else max(calls, key=_strength)).match
    if best is None:
        return StepRecord(turn, value, True)
    matches = [call.match for call in calls if call.match is not None]
    return StepRecord(
        turn=turn,
        advantage=value,
        eligible=True,
        theta=any(match.theta for match in matches),
        alpha=any(match.alpha for match in matches),
        matched=any(call.transfer > 0.0 for call in calls),
        similarity=best.similarity,
        support=best.cluster.support,
        reference_advantage=best.cluster.advantage,
        transfer=transfer,
        clipped=clipped,
    )


def plain_row(row: CreditRow) -> Corrected:
    """A row that nothing corrects."""
    steps = tuple(StepRecord(step.turn, row.advantage) for step in row.steps)
    return Corrected(unchanged(row.advantage, row.num_turns), (), steps)
