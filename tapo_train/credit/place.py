"""Where a user's rollouts lie in the diagram of the idealised agent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

from tapo_train.credit.idealised import Setting, mean_success, no_transfer, tapo
from tapo_train.credit.result import CreditResult
from tapo_train.credit.steps import CreditRow

_AGENTS = 8
_LONGEST = 12
"""Choices of the simulated chain, at most."""
_NEAR = 0.01
"""No probability is estimated as nearer to 0 or 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What the rollouts say, and what the idealised agent does there."""

    setting: Setting
    plain: float
    """Mean probability of success over the updates, without transfer."""
    transfer: float
    """With it."""


def setting_of(rows: Sequence[CreditRow], result: CreditResult) -> Setting | None:
    """The nearest setting; None without a success that used a tool in a group with failures.

    Length: tool steps of successes. Late failure: of the attempts that are as long as some success
    of their group and whose every step passes the similarity gate, successes counted in, the share
    that fails. Start: the probability per step that explains the share of successes. Luck is not
    seen in rollouts and keeps its default.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if not row.discarded:
            groups.setdefault(row.group, []).append(i)
    lengths, late, right, attempts = list[int](), 0, 0, 0
    for members in groups.values():
        won = [i for i in members if rows[i].correct >= 0.5]
        attempts += len(members)
        right += len(won)
        used = [len(rows[i].steps) for i in won if rows[i].steps]
        if not used or len(won) == len(members):
            continue
        lengths += used
        late += sum(
            len(rows[i].steps) >= min(used) and all(step.theta for step in result.steps[i])
            for i in members
            if rows[i].correct < 0.5
        )
    if not lengths:
        return None
    length = min(_LONGEST, round(mean(lengths)))
    failure = _inside(late / (late + right))
    return Setting(
        length=length,
        late_failure=failure,
        start=_inside(_inside(right / attempts / (1.0 - failure)) ** (1 / length)),
        rollouts=round(median(map(len, groups.values()))),
    )


def _inside(share: float) -> float:
    return min(max(share, _NEAR), 1.0 - _NEAR)


def place(rows: Sequence[CreditRow], result: CreditResult) -> Place | None:
    """The setting of the rollouts and its learning with and without transfer."""
    setting = setting_of(rows, result)
    if setting is None:
        return None
    plain, transfer = (
        float(mean_success(setting, credit, agents=_AGENTS).mean())
        for credit in (no_transfer, tapo)
    )
    return Place(setting=setting, plain=plain, transfer=transfer)
