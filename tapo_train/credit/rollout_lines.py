"""Lines to write: a trajectory in the rollout format, and a row after credit assignment."""

from __future__ import annotations

import json
from typing import Any

from tapo_train.credit.result import CreditResult, StepRecord
from tapo_train.credit.steps import CreditRow, status_of
from tapo_train.types import ImageRef, ToolCall, Trajectory


def rollout_line(trajectory: Trajectory, advantage: float) -> str:
    """One line of a rollout file, without the line end; `read_rollouts` gives the row back.

    The format has no word for a trajectory that failed outside the policy: leave those out.
    """
    given = trajectory.images[: len(trajectory.task.images)]
    data = {
        "id": trajectory.id,
        "group": trajectory.task.id,
        "correct": _correctness(trajectory.scored().accuracy),
        "advantage": float(advantage),
        "reward": trajectory.scored().total,
        "images": [_image(image.ref) for image in given],
        "steps": [
            {"turn": turn.index, "calls": [_call(call) for call in turn.calls]}
            for turn in trajectory.turns
            if turn.calls
        ],
    }
    return _dump(data)


def corrected_line(row: CreditRow, result: CreditResult, index: int) -> str:
    """One line of a corrected file: row `index` of the result, without the line end."""
    data: dict[str, Any] = {
        "id": row.id,
        "advantage": row.advantage,
        "steps": [_step(record) for record in result.steps[index]],
    }
    if result.call_advantages[index]:
        data["calls"] = [call._asdict() for call in result.call_advantages[index]]
    return _dump(data)


def _dump(data: dict[str, Any]) -> str:
    # ASCII only: a lone surrogate in a sampled text has no UTF-8 form.
    return json.dumps(data, ensure_ascii=True, allow_nan=False)


def _correctness(accuracy: float) -> bool | float:
    return bool(accuracy) if accuracy in (0.0, 1.0) else accuracy


def _image(ref: ImageRef) -> dict[str, Any]:
    return {"root": ref.root, "box": list(ref.box)}


def _call(call: ToolCall) -> dict[str, Any]:
    observation = call.observation
    readable = call.arguments is not None and _is_json(dict(call.arguments))
    data: dict[str, Any] = {
        "name": call.name,
        "arguments": dict(call.arguments) if call.arguments is not None and readable else None,
        # Unreadable arguments are null here, and null is read as {}.
        "valid": call.valid and readable,
        "executed": call.executed,
        "status": status_of(call.outcome),
    }
    if observation is not None:
        data["observation"] = observation.text
        if observation.images:
            data["new_images"] = [_image(image.ref) for image in observation.images]
    return data


def _is_json(arguments: dict[str, Any]) -> bool:
    """Whether the arguments can be written down: no NaN, no infinity, not too deep."""
    try:
        json.dumps(arguments, allow_nan=False)
    except (ValueError, RecursionError):
        return False
    return True


def _step(record: StepRecord) -> dict[str, Any]:
    return {
        "turn": record.turn,
        "advantage": record.advantage,
        "matched": record.matched,
        "similarity": record.similarity,
        "support": record.support,
        "reference_advantage": record.reference_advantage,
        "transfer": record.transfer,
        "gates": {"theta": record.theta, "alpha": record.alpha},
        "clipped": record.clipped,
    }
