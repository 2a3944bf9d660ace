"""One trajectory as a JSON object with everything the learner saw of it.

Beside the analyser's rows (which know calls but no tokens) this view has the tokens,
the spans over them, the sampler's log-probabilities, which weights sampled which tokens, and the
advantage of every turn before and after the credit stage. Pictures are named by content; their
bytes lie once in the run's `images/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tapo_train.credit.result import CallAdvantage, CreditResult, StepRecord
from tapo_train.data.images import extension
from tapo_train.errors import DataError
from tapo_train.report.files import write_atomically
from tapo_train.report.plain import plain
from tapo_train.types import Image, Reward, Span, ToolCall, Trajectory, Turn

__all__ = [
    "Decode",
    "StoredImages",
    "credit_view",
    "expanded_tokens",
    "shortened_tokens",
    "store_images",
    "token_view",
]

StoredImages = Literal["all", "roots", "none"]
"""Which pictures are stored: those cut from another are left out of `roots`."""

Decode = Callable[[npt.NDArray[np.int32]], str]
"""Tokens to text, as the tokenizer does it."""


def token_view(
    trajectory: Trajectory,
    *,
    decode: Decode | None = None,
    placeholder: int | None = None,
    images: StoredImages = "all",
) -> dict[str, Any]:
    """The trajectory without credit; `text` is there if `decode` is.

    A turn's `versions` are [start, end, version] among its sampled tokens; none: all of them by its
    `policy_version`. `tokens` has a run of placeholders as [id, length]; spans are [start, end)
    positions in `expanded_tokens(tokens)`. `logprobs` are those of the sampled tokens in order
    (null where not finite). `text` has a picture's placeholder once. `file` of a picture is null
    where it is not stored.
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
        "reward": None if reward is None else _reward(reward),
        "unscored": trajectory.unscored,
        "prompt_length": trajectory.prompt_length,
        "num_question_images": len(trajectory.task.images),
        "images": [_image(image, images) for image in trajectory.images],
        "turns": [_turn(turn) for turn in trajectory.turns],
        "tokens": shortened_tokens(trajectory.tokens, placeholder),
        "logprobs": [_finite(value) for value in trajectory.logprobs],
    }
    if decode is not None:
        view["text"] = decode(trajectory.tokens[_first_of_run(trajectory.tokens, placeholder)])
    return view


def shortened_tokens(
    tokens: npt.NDArray[np.int32], placeholder: int | None
) -> list[int | list[int]]:
    """[T] ids with every run of `placeholder` as [id, length]."""
    places = np.flatnonzero(_first_of_run(tokens, placeholder))
    lengths = np.diff(places, append=len(tokens))
    return [
        [id, length] if id == placeholder else id
        for id, length in zip(tokens[places].tolist(), lengths.tolist(), strict=True)
    ]


def expanded_tokens(tokens: Sequence[int | list[int]]) -> npt.NDArray[np.int32]:
    """[T] The ids of a view's `tokens`, one per position.

    Raises:
        DataError: an entry is neither an id nor [id, length].
    """
    runs = [entry if isinstance(entry, list) else [entry, 1] for entry in tokens]
    if not all(len(run) == 2 and all(type(part) is int for part in run) for run in runs):
        raise DataError("tokens: wanted ids and runs of them as [id, length]")
    ids, lengths = zip(*runs, strict=True) if runs else ((), ())
    return np.repeat(np.array(ids, dtype=np.int32), np.array(lengths, dtype=np.int64))


def _first_of_run(tokens: npt.NDArray[np.int32], placeholder: int | None) -> npt.NDArray[np.bool_]:
    """[T] False at placeholders that follow another of the same run."""
    first = np.ones(len(tokens), dtype=np.bool_)
    if placeholder is not None:
        first[1:] = (tokens[1:] != placeholder) | (tokens[:-1] != placeholder)
    return first


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


def _reward(reward: Reward) -> dict[str, Any]:
    return {
        "total": reward.total,
        "accuracy": reward.accuracy,
        "parts": dict(reward.parts),
        "turns": list(reward.turns),
    }


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
        "policy_version": turn.policy_version,
        "versions": [[part.start, part.end, part.version] for part in turn.versions],
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


def _image(image: Image, stored: StoredImages) -> dict[str, Any]:
    return {
        "file": _file_name(image) if _is_stored(image, stored) else None,
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


def _is_stored(image: Image, which: StoredImages) -> bool:
    return which == "all" or (which == "roots" and image.ref.root == f"sha256:{image.sha256}")


def store_images(
    folder: Path, trajectories: Sequence[Trajectory], *, which: StoredImages = "all"
) -> None:
    """Write each picture once into `folder`, named as in the views."""
    for image in {image.sha256: image for held in trajectories for image in held.images}.values():
        path = folder / _file_name(image)
        if _is_stored(image, which) and not path.exists():
            write_atomically(path, image.data)
