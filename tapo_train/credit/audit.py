"""The determinism audit: does the same request bring the same information?

Credit transfer assumes that equal parameters mean equal information. The audit compares the
observation of every corrected call with those of its matched cluster. It changes no advantage
(unless `require_observation_agreement` makes it a gate) and needs only what rows already hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tapo_train.credit.actions import Action
from tapo_train.credit.steps import CreditCall, CreditRow
from tapo_train.credit.text import jaccard, token_set

EQUIVALENT = 0.9
"""Token Jaccard from which two observation texts say the same."""


def call_of(action: Action, rows: Sequence[CreditRow]) -> CreditCall:
    """The call an action stands for."""
    return rows[action.row].steps[action.step].calls[action.call]


def equivalent(left: CreditCall, right: CreditCall) -> bool | None:
    """Whether two observations are equivalent; None if one was not recorded."""
    if left.observation is None or right.observation is None:
        return None
    if left.observation_images != right.observation_images:
        return False
    if left.observation == right.observation:
        return True
    return jaccard(token_set(left.observation), token_set(right.observation)) >= EQUIVALENT


def observations_agree(
    action: Action, members: Iterable[Action], rows: Sequence[CreditRow]
) -> tuple[int, int]:
    """(agreeing, comparable) pairs of a failing call with the members of its cluster."""
    call = call_of(action, rows)
    verdicts = [equivalent(call, call_of(member, rows)) for member in members]
    return verdicts.count(True), len(verdicts) - verdicts.count(None)


def is_repeat(action: Action, rows: Sequence[CreditRow]) -> bool:
    """Whether the trajectory had received an equivalent observation in an earlier step."""
    call = call_of(action, rows)
    earlier = rows[action.row].steps[: action.step]
    return any(equivalent(call, old) is True for step in earlier for old in step.calls)


def is_stale(action: Action, members: Iterable[Action], rows: Sequence[CreditRow]) -> bool:
    """A repeat for the failing trajectory that was news to a successful one of the cluster."""
    if not is_repeat(action, rows):
        return False
    return any(
        call_of(member, rows).observation is not None and not is_repeat(member, rows)
        for member in members
    )


def turn_gap(action: Action, members: Sequence[Action], rows: Sequence[CreditRow]) -> float:
    """|turn of the failing step - mean turn of the matched members|, in turns."""
    turns = [rows[member.row].steps[member.step].turn for member in members]
    return abs(rows[action.row].steps[action.step].turn - sum(turns) / len(turns))
