"""Whether a trajectory keeps to the agreed form of calls and answer."""

from __future__ import annotations

from tapo_train.rollout.parse import ANSWER_CLOSE, ANSWER_OPEN, parse_turn
from tapo_train.types import Outcome, Trajectory, Turn

__all__ = ["is_well_formed"]


def is_well_formed(trajectory: Trajectory) -> bool:
    """The format rule of SenseNova-MARS (arXiv 2512.24330).

    True if the last turn holds a non-empty `<answer>` and every tool call was
    readable JSON for a known tool with legal arguments. What went wrong on the
    tool's side (tool error, timeout, infra, refused) is not the policy's fault.

    Deviations: exactly one `<answer>` instead of at least one, so that listing
    guesses does not count as form; a last turn that still calls a tool has no
    answer, since the call takes precedence. Tags that a thought mentions do not count.
    """
    if not trajectory.turns:
        return False
    return _answers(trajectory.turns[-1]) and all(
        call.valid and call.outcome is not Outcome.MODEL_ERROR
        for turn in trajectory.turns
        for call in turn.calls
    )


def _answers(turn: Turn) -> bool:
    said = parse_turn(turn.text).said
    once = said.count(ANSWER_OPEN) == said.count(ANSWER_CLOSE) == 1
    body, closed, _ = said.partition(ANSWER_OPEN)[2].partition(ANSWER_CLOSE)
    return not turn.calls and once and bool(closed) and bool(body.strip())
