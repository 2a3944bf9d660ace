"""How old what is trained is, in updates since the weights that sampled it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tapo_train.credit.result import CreditResult
from tapo_train.training.step_batch import Batch
from tapo_train.types import Group

__all__ = ["Age", "ages", "credit_by_age", "staleness"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Age:
    """How many versions old the tokens of a trajectory are."""

    tokens: int
    total: int
    """Over its tokens."""
    oldest: int
    versions: int
    """Different ones that sampled it."""


def ages(groups: Sequence[Group], step: int) -> list[Age]:
    """Of all trajectories that have tokens."""
    sampled = [t.token_versions() for group in groups for t in group.trajectories if t.turns]
    return [
        Age(
            tokens=len(versions),
            total=int((step - versions).sum()),
            oldest=step - int(versions.min()),
            versions=len(np.unique(versions)),
        )
        for versions in sampled
    ]


def staleness(found: Sequence[Age]) -> dict[str, float]:
    """Metrics of the age of what is trained."""
    tokens = sum(age.tokens for age in found)
    return {
        "rollout/staleness": sum(age.total for age in found) / max(tokens, 1),
        "rollout/staleness_max": float(max((age.oldest for age in found), default=0)),
        "rollout/versions": sum(age.versions for age in found) / max(len(found), 1),
    }


def credit_by_age(batch: Batch, credit: CreditResult, step: int) -> dict[str, float]:
    """How many turns of each age there are, and of how many the credit stage changed the advantage.

    Additive over ranks; nothing without a credit stage.
    """
    if not credit.sums:
        return {}
    found, rows = batch.advantages, batch.advantages.rows.tolist()
    counts: Counter[str] = Counter()
    for number, trajectory in enumerate(batch.trajectories):
        before = rows[number] if found.turns is None else found.turns[number]
        changed = np.asarray(credit.step_advantages[number]) != before
        for turn, is_changed in zip(trajectory.turns, changed.tolist(), strict=True):
            age = step - turn.policy_version
            counts[f"by_age/{age}/total"] += 1
            counts[f"by_age/{age}/corrected"] += is_changed
    return {name: float(count) for name, count in counts.items()}
