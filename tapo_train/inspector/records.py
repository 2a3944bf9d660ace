"""What the pages show, read from a run folder or from the analyser's rows.

A run keeps three files per step and rank: `tokens/` with everything that was sampled, `rollouts/`
with what the credit stage saw, `scores/` with what the learner thought of the tokens. Rows of
another framework are one step of attempts without tokens. Nothing here trusts a file: what is not
of the expected form ends in a `DataError` with its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tapo_train.credit.options import TapoOptions
from tapo_train.credit.reasons import StepReason, explain
from tapo_train.credit.rollout_file import numbered_lines, read_rollouts
from tapo_train.credit.steps import CreditCall, CreditRow
from tapo_train.errors import DataError
from tapo_train.types import ImageRef, JsonObject

__all__ = ["Attempt", "Question", "Step", "dumped_steps", "read_step", "rows_as_step"]

_DUMP = re.compile(r"step_(\d+)(?:\.rank_\d+)?\.jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One trajectory of a question."""

    view: JsonObject
    """As in `tokens/`; of other frameworks' rows the same keys as far as they are known."""
    row: CreditRow | None
    """As the credit stage saw it; None if it failed outside the policy."""
    reasons: tuple[StepReason, ...]
    """One per tool step; empty where the run's credit stage was not TAPO."""
    scores: JsonObject | None = None
    """As in `scores/`; None where no update passed through the attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """All attempts at one task in one step."""

    group: str
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One training step."""

    number: int
    """From 1, as the console counts; its files count from 0."""
    questions: tuple[Question, ...]


def dumped_steps(run: Path) -> dict[int, list[Path]]:
    """The token files of each dumped step, by its number from 1, in order."""
    found: dict[int, list[Path]] = {}
    for path in sorted((run / "tokens").glob("step_*.jsonl")):
        if match := _DUMP.fullmatch(path.name):
            found.setdefault(int(match[1]) + 1, []).append(path)
    return dict(sorted(found.items()))


def read_step(number: int, paths: Sequence[Path], options: TapoOptions | None) -> Step:
    """A step from its token files and the rollout files of the same names.

    Args:
        paths: of all ranks.
        options: of the run's credit stage; None: it was not TAPO, and no reasons are given.

    Raises:
        DataError: a line is not of the dump's form; it names file and line.
    """
    questions: list[Question] = []
    scores: dict[str, JsonObject] = {}
    for path in paths:
        # Rows are dealt out among the ranks, so any rank may have learned from any of them.
        scores |= _scores(path.parent.parent / "scores" / path.name)
    for path in paths:
        beside = path.parent.parent / "rollouts" / path.name
        rows = {row.id: row for row in read_rollouts(beside).rows} if beside.is_file() else {}
        held = [(view, rows.get(view["id"])) for view in _views(path)]
        questions += _questions(held, options, scores)
    return Step(number=number, questions=tuple(questions))


def rows_as_step(path: Path, options: TapoOptions) -> Step:
    """The analyser's rows of any framework, as one step without tokens or pictures."""
    held = [(_view_of(row), row) for row in read_rollouts(path).rows]
    return Step(number=1, questions=tuple(_questions(held, options)))


def _questions(
    held: Sequence[tuple[dict[str, Any], CreditRow | None]],
    options: TapoOptions | None,
    scores: Mapping[str, JsonObject] = MappingProxyType({}),
) -> Iterator[Question]:
    """Attempts by question, in order, each with the reasons of its steps."""
    groups: dict[str, list[tuple[dict[str, Any], CreditRow | None]]] = {}
    for view, row in held:
        groups.setdefault(view["group"], []).append((view, row))
    for group, attempts in groups.items():
        judged = [row for _, row in attempts if row is not None]
        reasons = iter(explain(judged, options) if options is not None else [()] * len(judged))
        yield Question(
            group=group,
            attempts=tuple(
                Attempt(
                    view=view,
                    row=row,
                    reasons=() if row is None else next(reasons),
                    scores=_fitting(scores.get(view["id"]), view),
                )
                for view, row in attempts
            ),
        )


def _views(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in numbered_lines(path):
        try:
            view = json.loads(line)
            _require_view(view)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: {error}; wanted a dumped trajectory") from None
        yield view


_SCORES = ("logprobs", "ratio", "entropy")


def _scores(path: Path) -> dict[str, JsonObject]:
    """By trajectory; a run of before these were dumped has none."""
    found: dict[str, JsonObject] = {}
    for number, line in numbered_lines(path) if path.is_file() else ():
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"found {type(row).__name__}, wanted an object")
            _require(row, ("id",), lambda value: isinstance(value, str), "text")
            _require(row, _SCORES, _are_numbers, "a list of numbers")
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: {error}; wanted scores of tokens") from None
        found[row["id"]] = row
    return found


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        part is None or type(part) in (int, float) for part in value
    )


def _fitting(scores: JsonObject | None, view: JsonObject) -> JsonObject | None:
    """DataError unless there is a score per sampled token."""
    wanted = len(view["logprobs"])
    if scores is not None and any(len(scores[name]) != wanted for name in _SCORES):
        raise DataError(f"scores of {view['id']}: wanted {wanted} each, one per sampled token")
    return scores


_TEXTS = ("id", "group", "question")
_LISTS = ("images", "turns", "tokens", "logprobs")


def _require_view(view: Any) -> None:
    """ValueError unless the parts that pages are made of have the dump's types."""
    if not isinstance(view, dict):
        raise ValueError(f"found {type(view).__name__}, wanted an object")
    _require(view, _TEXTS, lambda value: isinstance(value, str), "text")
    _require(view, _LISTS, lambda value: isinstance(value, list), "a list")
    for turn in view["turns"]:
        if not isinstance(turn, dict):
            raise ValueError(f"turns hold {type(turn).__name__}, wanted objects")
        _require(turn, ("span",), _is_span, "[start, end]")
        _require(turn, ("calls",), lambda value: isinstance(value, list), "a list")
        _require(turn, ("text",), lambda value: isinstance(value, str), "text")
        if "versions" in turn:
            _require(turn, ("versions",), _are_versions, "[start, end, version] each")
        if not all(isinstance(call, dict) for call in turn["calls"]):
            raise ValueError("calls hold something else than objects")
    if not all(isinstance(image, dict) for image in view["images"]):
        raise ValueError("images hold something else than objects")


def _require(
    held: Mapping[str, Any], keys: Sequence[str], is_right: Callable[[Any], bool], wanted: str
) -> None:
    for key in keys:
        if not is_right(held.get(key)):
            raise ValueError(f"{key} is {str(held.get(key))[:60]!r}, wanted {wanted}")


def _are_versions(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(part, list) and len(part) == 3 and all(type(entry) is int for entry in part)
        for part in value
    )


def _is_span(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 2
    return numbers and all(type(part) is int for part in value) and 0 <= value[0] <= value[1]


def _view_of(row: CreditRow) -> dict[str, Any]:
    steps = {step.turn: step for step in row.steps}
    turns = []
    for index in range(row.num_turns):
        calls = [_call(call) for call in steps[index].calls] if index in steps else []
        turns.append({"index": index, "span": [0, 0], "text": "", "calls": calls})
    return {
        "id": row.id,
        "group": row.group,
        "question": row.group,
        "accepted": [],
        "answer": None,
        "stop": "",
        "reward": {"total": row.reward, "accuracy": row.correct, "parts": {}},
        "advantage": row.advantage,
        "images": [_picture(ref) for ref in row.images[: row.num_input_images]],
        "num_question_images": row.num_input_images,
        "turns": turns,
        "tokens": [],
        "logprobs": [],
    }


def _call(call: CreditCall) -> dict[str, Any]:
    return {
        "name": call.name,
        "arguments": call.arguments,
        "valid": call.valid,
        "executed": call.executed,
        "outcome": call.status,
        "span": None,
        "observation": call.observation,
        "observation_images": [],
    }


def _picture(ref: ImageRef) -> dict[str, Any]:
    return {"file": None, "sha256": "", "width": 0, "height": 0, "root": ref.root, "box": ref.box}
