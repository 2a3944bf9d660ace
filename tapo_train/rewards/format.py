"""Whether a trajectory keeps to the agreed form of calls and answer."""

from __future__ import annotations

from tapo_train.types import Outcome, Trajectory, Turn

__all__ = ["is_well_formed"]

_OPEN, _CLOSE = "<answer>", "</answer>"


def is_well_formed(trajectory: Trajectory) -> bool:
    """The format rule of SenseNova-MARS (arXiv 2512.24330).

    True if the last turn holds a non-empty `<answer>` and every tool call was
    readable JSON for a known tool with legal arguments. What went wrong on the
    tool's side (tool error, timeout, infra, refused) is not the policy's fault.

    Deviations: exactly one `<answer>` instead of at least one, so that listing
    guesses does not count as form; a last turn that still calls a tool has no
    answer, since the call takes precedence.
    """
    if not trajectory.turns:
        return False
    return _answers(trajectory.turns[-1]) and all(
        call.valid and call.outcome is not Outcome.MODEL_ERROR
        for turn in trajectory.turns
        for call in turn.calls
    )


def _answers(turn: Turn) -> bool:
    once = turn.text.count(_OPEN) == turn.text.count(_CLOSE) == 1
    body, closed, _ = turn.text.partition(_OPEN)[2].partition(_CLOSE)
    return not turn.calls and once and bool(closed) and bool(body.strip())
