"""Rollouts as JSONL: one object per line, one line per trajectory.

    {"id": "t3", "group": "q17", "correct": false,
     "advantage": -0.7746,            or "reward": 0.0, then the advantage is computed
     "turn_advantages": [-1.2, -0.7], optional: of every assistant turn, where they differ
     "images": [{"root": "sha1:…", "box": [0, 0, 1, 1]}],           default: one, root = group
     "steps": [{"turn": 0,
                "calls": [{"name": "text_search_tool", "arguments": {"query": "…"},
                           "valid": true, "executed": true, "status": "ok",
                           "observation": "…",
                           "new_images": [{"root": "…", "box": […]}]}]}]}

`new_images` join the registry after their step. A picture may carry `"size": [width, height]`
in pixels, which only boxes in pixels need. Keys that are not listed are ignored and counted.
Everything wrong is a `DataError` with file and line; nothing is dropped in silence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tapo_train.algos.advantages import group_advantages
from tapo_train.credit.json_fields import (
    correct_in,
    decode,
    flag_in,
    list_in,
    number_in,
    numbers_of,
    short,
    text_in,
)
from tapo_train.credit.steps import STATUSES, CreditCall, CreditRow, CreditStep
from tapo_train.errors import DataError, TapoError
from tapo_train.types import ImageRef

MAX_TURNS = 1000
"""Turn numbers beyond are taken for damage."""
MAX_LINE_BYTES = 1 << 26
_ROW_KEYS = {"id", "group", "correct", "advantage", "reward", "images", "steps", "turn_advantages"}
_CORRECTED_KEYS = {"id", "advantage", "steps", "calls"}
"""Of what `analyze --out` writes."""
_STEP_KEYS = {"turn", "calls"}
_CALL_KEYS = {"name", "arguments", "valid", "executed", "status", "observation", "new_images"}
_IMAGE_KEYS = {"root", "box", "size"}


_UNKNOWN = [0, 0]
_Registry = list[tuple[ImageRef, tuple[float, float]]]
"""Pictures with (width, height); `_UNKNOWN` if not given."""


@dataclass(slots=True, kw_only=True)
class RolloutFile:
    """The readable rows of a file, and an account of the rest."""

    rows: list[CreditRow] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    """One message per unreadable line, with its number."""
    ignored_keys: Counter[str] = field(default_factory=Counter)
    """Keys outside the format, by path, with the number of times they were met."""


def read_rollouts(path: Path, *, skip_bad: bool = False) -> RolloutFile:
    """Read a rollout file.

    Args:
        path: the JSONL file.
        skip_bad: go on past unreadable lines and account for them in `bad`.

    Raises:
        DataError: on the first unreadable line (unless skip_bad), on a file that cannot be
            read, and on a group that gives advantages in some lines and rewards in others.
    """
    result = RolloutFile()
    parser = _Parser(result.ignored_keys)
    line_of: dict[tuple[str, str], int] = {}
    for number, line in numbered_lines(path):
        try:
            row = parser.row(decode(line))
            first = line_of.setdefault((row.group, row.id), number)
            if first != number:
                raise DataError(f"id {row.id!r} of group {row.group!r} is in line {first} already")
        except TapoError as error:
            message = f"{path}, line {number}: {error}"
            if not skip_bad:
                raise DataError(message) from error
            result.bad.append(message)
        else:
            result.rows.append(row)
    result.rows = _with_advantages(path, result.rows, line_of)
    return result


def read_files(paths: Sequence[Path], *, skip_bad: bool = False) -> RolloutFile:
    """`read_rollouts` of several files as one; each has its own groups.

    A question comes back in another epoch and is then another group. Groups of several files are
    told apart by the file's name before theirs.
    """
    if len(paths) == 1:
        return read_rollouts(paths[0], skip_bad=skip_bad)
    result = RolloutFile()
    for path in paths:
        part = read_rollouts(path, skip_bad=skip_bad)
        result.rows += [replace(row, group=f"{path}: {row.group}") for row in part.rows]
        result.bad += part.bad
        result.ignored_keys += part.ignored_keys
    return result


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes) of the lines that are not blank."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes")
                if line.strip():
                    yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Parser:
    """Turns decoded lines into rows; counts the keys it does not know."""

    def __init__(self, ignored: Counter[str]) -> None:
        self._ignored = ignored

    def row(self, line: Any) -> CreditRow:
        """One line. A reward without an advantage leaves the advantage NaN for now."""
        data = self._object(line, "line", _ROW_KEYS)
        if _CORRECTED_KEYS.issuperset(data) and "advantage" in data:
            raise DataError("this row was corrected before; want the rollouts it came from")
        if "tokens" in data and "steps" not in data:
            raise DataError("a row with tokens; want the file of that name in rollouts/")
        row_id, group = text_in(data, "id"), text_in(data, "group")
        advantage, reward = number_in(data, "advantage"), number_in(data, "reward")
        if advantage is None and reward is None:
            raise DataError("neither advantage nor reward; want one of them")
        images = self._images(data.get("images"), "images", [(ImageRef(root=group), (0.0, 0.0))])
        num_input_images = len(images)
        steps = self._steps(list_in(data, "steps", "line"), images)
        # Without them the file does not say how many turns there were; the answer's is one more.
        num_turns = steps[-1].turn + 2 if steps else 1
        own = data.get("turn_advantages")
        if own is not None:
            num_turns = len(list_in(data, "turn_advantages", "line"))
            own = tuple(numbers_of(own, num_turns, "turn_advantages"))
        return CreditRow(
            id=row_id,
            group=group,
            correct=correct_in(data),
            advantage=math.nan if advantage is None else advantage,
            reward=reward,
            num_turns=num_turns,
            turn_advantages=own or (),
            steps=steps,
            images=tuple(ref for ref, _ in images),
            num_input_images=num_input_images,
            image_sizes=tuple(size for _, size in images),
        )

    def _steps(self, items: list[Any], images: _Registry) -> tuple[CreditStep, ...]:
        steps: list[CreditStep] = []
        for i, item in enumerate(items):
            where = f"steps[{i}]"
            data = self._object(item, where, _STEP_KEYS)
            turn = data.get("turn")
            lowest = steps[-1].turn + 1 if steps else 0
            if type(turn) is not int or not lowest <= turn < MAX_TURNS:
                raise DataError(
                    f"{where}.turn is {short(turn)}; want an integer in [{lowest}, {MAX_TURNS})"
                )
            visible = len(images)
            items_of = enumerate(list_in(data, "calls", where))
            calls = tuple(self._call(call, f"{where}.calls[{c}]", images) for c, call in items_of)
            steps.append(CreditStep(turn=turn, calls=calls, num_images=visible))
        return tuple(steps)

    def _call(self, item: Any, where: str, images: _Registry) -> CreditCall:
        data = self._object(item, where, _CALL_KEYS)
        status = data.get("status", "ok")
        if status not in STATUSES:
            raise DataError(f"{where}.status is {short(status)}; want one of {list(STATUSES)}")
        observation = data.get("observation")
        if not (observation is None or isinstance(observation, str)):
            raise DataError(f"{where}.observation is {short(observation)}; want text or null")
        new_images = self._images(data.get("new_images"), f"{where}.new_images", [])
        images += new_images
        return CreditCall(
            name=text_in(data, "name", where),
            arguments=data.get("arguments"),
            valid=flag_in(data, "valid", where),
            executed=flag_in(data, "executed", where),
            status=status,
            observation=observation,
            observation_images=tuple(ref for ref, _ in new_images),
        )

    def _images(self, items: Any, where: str, default: _Registry) -> _Registry:
        if items is None:
            return default
        if not isinstance(items, list):
            raise DataError(f"{where} is {short(items)}; want a list")
        return [self._image(item, f"{where}[{i}]") for i, item in enumerate(items)]

    def _image(self, item: Any, where: str) -> tuple[ImageRef, tuple[float, float]]:
        data = self._object(item, where, _IMAGE_KEYS)
        box = numbers_of(data.get("box", [0, 0, 1, 1]), 4, f"{where}.box")
        if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise DataError(f"{where}.box is {box}; want 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1")
        width, height = numbers_of(data.get("size", _UNKNOWN), 2, f"{where}.size")
        if "size" in data and not (width > 0 and height > 0):
            raise DataError(f"{where}.size is [{width:g}, {height:g}]; want two numbers > 0")
        ref = ImageRef(root=text_in(data, "root", where), box=(box[0], box[1], box[2], box[3]))
        return ref, (width, height)

    def _object(self, value: Any, where: str, known: set[str]) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise DataError(f"{where} is {short(value)}; want an object")
        for key in value.keys() - known:
            self._ignored[f"{where.split('[')[0]}: {key}"] += 1
        return value


def _with_advantages(
    path: Path, rows: list[CreditRow], line_of: Mapping[tuple[str, str], int]
) -> list[CreditRow]:
    """Compute the advantages of groups that came with rewards, as training does by default."""
    missing = [i for i, row in enumerate(rows) if math.isnan(row.advantage)]
    given = {row.group: row for row in rows if not math.isnan(row.advantage)}
    for i in missing:
        other = given.get(rows[i].group)
        if other is not None:
            lines = [line_of[row.group, row.id] for row in (rows[i], other)]
            raise DataError(
                f"{path}, line {lines[0]}: no advantage, but line {lines[1]} of the same group "
                "has one; want advantages in all lines of a group or in none"
            )
    if not missing:
        return rows
    rewards = [0.0 if (reward := rows[i].reward) is None else reward for i in missing]
    try:
        advantages = group_advantages(rewards, [rows[i].group for i in missing])
    except TapoError as error:
        raise DataError(f"{path}: {error}") from error
    result = list(rows)
    for i, advantage in zip(missing, advantages.tolist(), strict=True):
        result[i] = replace(rows[i], advantage=advantage)
    return result
