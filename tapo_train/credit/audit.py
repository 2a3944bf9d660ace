"""The determinism audit: does the same request bring the same information?

Credit transfer assumes that equal parameters mean equal information. The audit compares the
observation of every corrected call with those of its matched cluster. It changes no advantage
(unless `require_observation_agreement` makes it a gate) and needs only what rows already hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tapo_train.credit.actions import Actions, Calls
from tapo_train.credit.steps import CreditCall, CreditRow
from tapo_train.credit.text import jaccard, token_set

EQUIVALENT = 0.9
"""Token Jaccard from which two observation texts say the same."""


def call_of(calls: Calls, i: int, rows: Sequence[CreditRow]) -> CreditCall:
    """The call at position i of the columns."""
    return rows[calls.row[i]].steps[calls.step[i]].calls[calls.call[i]]


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
    query: int, members: Iterable[int], actions: Actions, rows: Sequence[CreditRow]
) -> tuple[int, int]:
    """(agreeing, comparable) pairs of a failing call with the members of its cluster."""
    call = call_of(actions.queries, query, rows)
    if call.observation is None:
        return 0, 0
    verdicts = [equivalent(call, call_of(actions.library, i, rows)) for i in members]
    return verdicts.count(True), len(verdicts) - verdicts.count(None)


def is_repeat(calls: Calls, i: int, rows: Sequence[CreditRow]) -> bool:
    """Whether the trajectory had received an equivalent observation in an earlier step."""
    call = call_of(calls, i, rows)
    earlier = rows[calls.row[i]].steps[: calls.step[i]]
    return any(equivalent(call, old) is True for step in earlier for old in step.calls)


def is_stale(
    query: int, members: Iterable[int], actions: Actions, rows: Sequence[CreditRow]
) -> bool:
    """A repeat for the failing trajectory that was news to a successful one of the cluster."""
    if call_of(actions.queries, query, rows).observation is None:
        return False
    if not is_repeat(actions.queries, query, rows):
        return False
    return any(
        call_of(actions.library, i, rows).observation is not None
        and not is_repeat(actions.library, i, rows)
        for i in members
    )


def turn_of(calls: Calls, i: int, rows: Sequence[CreditRow]) -> int:
    """The turn in which the call at position i was made."""
    return rows[calls.row[i]].steps[calls.step[i]].turn


def mean_turn(members: Sequence[int], actions: Actions, rows: Sequence[CreditRow]) -> float:
    """Mean turn of the members of a cluster."""
    return sum(turn_of(actions.library, i, rows) for i in members) / len(members)
