"""One trajectory as a JSON object with everything the learner saw of it.

Beside the analyser's rows (which know calls but no tokens) this view has the tokens,
the spans over them, the sampler's log-probabilities, and the advantage of every turn
before and after the credit stage. Pictures are named by content; their bytes lie once
in the run's `images/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tapo_train.credit.result import CallAdvantage, CreditResult, StepRecord
from tapo_train.data.images import extension
from tapo_train.report.files import write_atomically
from tapo_train.report.plain import plain
from tapo_train.types import Image, Span, ToolCall, Trajectory, Turn

__all__ = ["Decode", "credit_view", "store_images", "token_view"]

Decode = Callable[[npt.NDArray[np.int32]], str]
"""Tokens to text, as the tokenizer does it."""


def token_view(trajectory: Trajectory, *, decode: Decode | None = None) -> dict[str, Any]:
    """The trajectory without credit; `text` is there if `decode` is.

    Spans are [start, end) positions in `tokens`; `logprobs` are those of the sampled
    tokens in order (null where not finite).
    """
    reward = trajectory.reward
    view: dict[str, Any] = {
        "id": trajectory.id,
        "group": trajectory.task.id,
        "policy_version": trajectory.policy_version,
        "question": trajectory.task.question,
        "accepted": list(trajectory.task.answers),
        "answer": trajectory.answer,
        "stop": str(trajectory.stop),
        "reward": None
        if reward is None
        else {"total": reward.total, "accuracy": reward.accuracy, "parts": dict(reward.parts)},
        "prompt_length": trajectory.prompt_length,
        "num_question_images": len(trajectory.task.images),
        "images": [_image(image) for image in trajectory.images],
        "turns": [_turn(turn) for turn in trajectory.turns],
        "tokens": trajectory.tokens.tolist(),
        "logprobs": [_finite(value) for value in trajectory.logprobs],
    }
    if decode is not None:
        view["text"] = decode(trajectory.tokens)
    return view


def credit_view(
    view: dict[str, Any], *, advantage: float, credit: CreditResult, row: int
) -> dict[str, Any]:
    """`view` with the advantages of `row` of the credit stage's input.

    Adds `advantage` (the trajectory's, before) and to each turn `advantage` (after)
    and `credit`, the record of a tool step or null; to a call that has an advantage of
    its own, `advantage`.
    """
    calls = {(call.turn, call.call): call for call in credit.call_advantages[row]}
    records = {record.turn: record for record in credit.steps[row]}
    after = credit.step_advantages[row]
    turns = [
        {
            **turn,
            "advantage": float(after[position]),
            "credit": _record(records.get(turn["index"])),
            "calls": _calls(turn["calls"], turn["index"], calls),
        }
        for position, turn in enumerate(view["turns"])
    ]
    return {**view, "advantage": float(advantage), "turns": turns}


def _calls(
    calls: list[dict[str, Any]], turn: int, own: dict[tuple[int, int], CallAdvantage]
) -> list[dict[str, Any]]:
    return [
        {**call, "advantage": own[turn, number].advantage} if (turn, number) in own else call
        for number, call in enumerate(calls)
    ]


def _record(record: StepRecord | None) -> dict[str, Any] | None:
    return None if record is None else record._asdict()


def _turn(turn: Turn) -> dict[str, Any]:
    return {
        "index": turn.index,
        "span": _span(turn.span),
        "observation_span": _span(turn.observation_span),
        "num_images_before": turn.num_images_before,
        "text": turn.text,
        "calls": [_call(call) for call in turn.calls],
    }


def _call(call: ToolCall) -> dict[str, Any]:
    observation = call.observation
    return {
        "name": call.name,
        "arguments": plain(call.arguments),
        "valid": call.valid,
        "executed": call.executed,
        "outcome": None if call.outcome is None else str(call.outcome),
        "span": _span(call.span),
        "observation": None if observation is None else observation.text,
        "observation_images": []
        if observation is None
        else [image.sha256 for image in observation.images],
        "latency_s": None if observation is None else observation.latency_s,
    }


def _image(image: Image) -> dict[str, Any]:
    return {
        "file": _file_name(image),
        "sha256": image.sha256,
        "width": image.width,
        "height": image.height,
        "root": image.ref.root,
        "box": list(image.ref.box),
    }


def _span(span: Span | None) -> list[int] | None:
    return None if span is None else [span.start, span.end]


def _finite(value: np.float32) -> float | None:
    # str() gives the shortest digits that read back to the same float32.
    return float(str(value)) if math.isfinite(value) else None


def _file_name(image: Image) -> str:
    return f"{image.sha256}{extension(image.data)}"


def store_images(folder: Path, trajectories: Sequence[Trajectory]) -> None:
    """Write each picture once into `folder`, named as in the views."""
    for image in {image.sha256: image for held in trajectories for image in held.images}.values():
        path = folder / _file_name(image)
        if not path.exists():
            write_atomically(path, image.data)
