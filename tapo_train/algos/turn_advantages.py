"""Rewards of trajectories, and perhaps of their turns, to an advantage per turn (numpy only).

The kinds of `advantages.py` judge a trajectory by its total alone. Those here judge a turn by its
return: what of the total is earned from it on, discounted by gamma per turn. What no turn claims
of the total, the outcome, is earned at the last turn.

    returns_to_go        (R_t - mean_g) / (std_g + eps) over the returns of all turns of the group
                         (process rewards to go; DeepSeekMath, 2402.03300, section 4.1.3, sums what
                         it has normalised, here the sum is normalised)
    per_turn             the same over the group's rows at the same turn
    reinforce_pp_tokens  (R_t - mean_b) / (std_b + eps) over all sampled tokens of the batch, each
                         with its turn's return (REINFORCE++, 2501.03262, without its KL term)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from tapo_train.algos.advantages import (
    AdvantageKind,
    Floats,
    StdKind,
    batch_renorm,
    group_advantages,
)
from tapo_train.errors import ConfigError, CreditError

__all__ = [
    "Advantages",
    "RewardRow",
    "TurnKind",
    "advantages_of",
    "outcome_advantages",
    "renormalised",
    "returns_to_go",
    "turn_advantages",
]

TurnKind = Literal["returns_to_go", "per_turn", "reinforce_pp_tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRow:
    """What the advantage stage sees of a trajectory."""

    group: str
    """The question; all attempts at it share this."""
    total: float
    """Reward; without meaning in a row that is left out."""
    tokens: tuple[int, ...]
    """[turns] sampled tokens of each assistant turn."""
    turn_rewards: tuple[float, ...] = ()
    """[turns] what of the total is due to each turn; () if nothing is."""
    left_out: bool = False
    """Failed outside the policy."""

    def __post_init__(self) -> None:
        if self.turn_rewards and len(self.turn_rewards) != len(self.tokens):
            raise CreditError(
                f"a trajectory of question {self.group!r} has {len(self.turn_rewards)} turn "
                f"rewards; wanted one for each of its {len(self.tokens)} turns, or none"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """Of rows [N], and of their turns where these differ."""

    rows: Floats
    """[N] of the trajectory: of all its turns, or of the first, whose return is the whole's."""
    turns: list[Floats] | None = None
    """Per row [turns]; None: every turn has its row's."""

    def part(self, start: int, end: int) -> Advantages:
        """Those of rows [start, end)."""
        turns = None if self.turns is None else self.turns[start:end]
        return Advantages(rows=self.rows[start:end], turns=turns)


def outcome_advantages(
    rows: Sequence[RewardRow], *, kind: AdvantageKind, std: StdKind = "unbiased"
) -> Advantages:
    """`group_advantages` of the totals."""
    return Advantages(
        rows=group_advantages(
            [row.total for row in rows],
            [row.group for row in rows],
            kind=kind,
            std=std,
            leave_out=[row.left_out for row in rows],
        )
    )


def returns_to_go(row: RewardRow, *, gamma: float) -> Floats:
    """[turns] R_t = r_t + gamma R_(t+1); the last turn also earns what no turn claims."""
    rewards = np.zeros(len(row.tokens)) if not row.turn_rewards else np.array(row.turn_rewards)
    if not len(rewards) or row.left_out:
        return np.zeros(len(row.tokens))
    rewards[-1] += row.total - rewards.sum()
    for t in range(len(rewards) - 2, -1, -1):
        rewards[t] += gamma * rewards[t + 1]
    return np.asarray(rewards, dtype=np.float64)


def turn_advantages(
    rows: Sequence[RewardRow],
    *,
    kind: TurnKind,
    gamma: float = 1.0,
    std: StdKind = "unbiased",
    eps: float = 1e-6,
) -> Advantages:
    """An advantage for every turn, as the module says. Hand in the rows of all ranks.

    As in `group_advantages`, a turn without another to compare with, or among equal returns, gets
    exactly 0. Rows that are left out take no part and get 0.

    Args:
        gamma: discount per turn, in [0, 1].

    Raises:
        ConfigError: unknown kind, gamma out of range.
    """
    if kind not in get_args(TurnKind) or not 0.0 <= gamma <= 1.0:
        raise ConfigError(
            f"advantage kind is {kind!r} with gamma {gamma}; wanted one of {get_args(TurnKind)} "
            "and gamma in [0, 1]"
        )
    places = [(row, t) for row in rows for t in range(len(row.tokens))]
    returns = [value for row in rows for value in returns_to_go(row, gamma=gamma).tolist()]
    over_batch = kind == "reinforce_pp_tokens"
    values = group_advantages(
        returns,
        _labels([(row.group, t if kind == "per_turn" else 0) for row, t in places]),
        kind="reinforce_pp" if over_batch else "grpo",
        std=std,
        eps=eps,
        leave_out=[row.left_out for row, _ in places],
        weights=[float(row.tokens[t]) for row, t in places] if over_batch else None,
    )
    return advantages_of(rows, _cut(rows, values))


def advantages_of(rows: Sequence[RewardRow], found: Sequence[Any]) -> Advantages:
    """From one number per row, or one per turn of every row.

    Raises:
        CreditError: other shapes, or numbers that are not finite.
    """
    if len(found) != len(rows):
        raise CreditError(f"advantages of {len(found)} rows; wanted {len(rows)}, one per row")
    values = [np.asarray(value, dtype=np.float64) for value in found]
    turns = [
        np.full(len(row.tokens), value) if value.ndim == 0 else value
        for row, value in zip(rows, values, strict=True)
    ]
    for row, value in zip(rows, turns, strict=True):
        if value.shape != (len(row.tokens),) or not np.isfinite(value).all():
            raise CreditError(
                f"a trajectory of question {row.group!r} got the advantages {value.tolist()}; "
                f"wanted one finite number, or one for each of its {len(row.tokens)} turns"
            )
    turns = [
        np.zeros(len(row.tokens)) if row.left_out else value
        for row, value in zip(rows, turns, strict=True)
    ]
    first = np.array([value[0] if len(value) else 0.0 for value in turns])
    is_flat = all((value == value[:1]).all() for value in turns)
    return Advantages(rows=first, turns=None if is_flat else turns)


def renormalised(rows: Sequence[RewardRow], found: Advantages) -> Advantages:
    """`batch_renorm` over the rows, or over the turns of all rows where these differ."""
    if found.turns is None:
        left_out = [row.left_out for row in rows]
        return Advantages(rows=batch_renorm(found.rows, leave_out=left_out))
    flat = np.concatenate([np.zeros(0), *found.turns])
    left_out = [row.left_out for row in rows for _ in row.tokens]
    return advantages_of(rows, _cut(rows, batch_renorm(flat, leave_out=left_out)))


def _labels(names: Sequence[tuple[str, int]]) -> list[int]:
    number: dict[tuple[str, int], int] = {}
    return [number.setdefault(name, len(number)) for name in names]


def _cut(rows: Sequence[RewardRow], flat: Floats) -> list[Floats]:
    """[sum of turns] to one vector per row."""
    ends = np.cumsum([len(row.tokens) for row in rows])
    return np.split(flat, ends[:-1]) if len(rows) else []
