"""One trajectory as the offline analyser reads it: calls and pictures, no tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tapo_train.credit.steps import status_of
from tapo_train.report.plain import plain
from tapo_train.types import Image, ToolCall, Trajectory

__all__ = ["rollout_row"]


def rollout_row(
    trajectory: Trajectory, advantage: float, turn_advantages: Sequence[float] = ()
) -> dict[str, Any]:
    """The line of `trajectory` in the format of `tapo_train.credit.rollout_file`.

    Args:
        trajectory: With its reward; raises TapoError without.
        advantage: Its scalar advantage, before the credit stage.
        turn_advantages: Those of its turns, before the credit stage, where they differ.
    """
    own = {"turn_advantages": [float(value) for value in turn_advantages]}
    return {
        "id": trajectory.id,
        "group": trajectory.task.id,
        "correct": trajectory.scored().accuracy,
        "advantage": float(advantage),
        **(own if len(turn_advantages) else {}),
        "images": [_image(image) for image in trajectory.task.images],
        "steps": [
            {"turn": turn.index, "calls": [_call(call) for call in turn.calls]}
            for turn in trajectory.turns
            if turn.calls
        ],
    }


def _call(call: ToolCall) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": call.name,
        "arguments": plain(call.arguments),
        # Unreadable arguments are null here, and null means {} to the reader.
        "valid": call.valid and call.arguments is not None,
        "executed": call.executed,
        "status": status_of(call.outcome),
    }
    if call.observation is not None:
        row["observation"] = call.observation.text
        row["new_images"] = [_image(image) for image in call.observation.images]
    return row


def _image(image: Image) -> dict[str, Any]:
    return {
        "root": image.ref.root,
        "box": list(image.ref.box),
        "size": [image.width, image.height],
    }
