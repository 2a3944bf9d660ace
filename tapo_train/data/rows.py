"""One row of a data file, with typed access that says where a wrong field is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapo_train.errors import DataError

__all__ = ["Row", "parse_json", "read_file", "row_of", "shown"]

NO_ANSWER = "no answer"
"""Kind of a `DataError` about a row without one."""


def shown(value: object, limit: int = 80) -> str:
    """`value` for an error message, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


@dataclass(frozen=True, slots=True)
class Row:
    """A JSON object (or one inside it) and its place."""

    where: str
    """File and line, then the path of fields that leads here: `t.jsonl:3: reward_model`."""
    fields: Mapping[str, Any]

    def wrong(self, name: str, wanted: str, *, kind: str = "other") -> DataError:
        """The error for field `name`: where, what was found, what is wanted."""
        found = shown(self.fields[name]) if name in self.fields else "nothing"
        return DataError(f"{self.where}: field {name!r}: found {found}; wanted {wanted}", kind=kind)

    def text(self, name: str, *, wanted: str = "a text that is not blank") -> str:
        """A string that holds more than white space and can be encoded."""
        value = self.fields.get(name)
        if not _is_text(value):
            raise self.wrong(name, wanted)
        assert isinstance(value, str)
        return value

    def optional_text(self, name: str) -> str:
        """Like `text`, "" if the field is absent or null."""
        return self.text(name) if self.fields.get(name) is not None else ""

    def texts(self, name: str) -> tuple[str, ...]:
        """A non-empty list of texts; a single text counts as a list of one."""
        value = self.fields.get(name)
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not values or not all(map(_is_text, values)):
            raise self.wrong(name, "a text or a non-empty list of texts")
        return tuple(values)

    def answers(self, name: str) -> tuple[str, ...]:
        """Accepted answers: a text, a number, or a list of them that holds more than blanks.

        Numbers become texts (a whole one without a point, as a column with gaps makes 1931.0 of
        1931); null, NaN and blank entries are left out. Search-R1 wraps the list as {"target": …}.
        """
        value = self.fields.get(name)
        if isinstance(value, Mapping) and value.keys() == {"target"}:
            value = value["target"]
        texts = [_answer(item) for item in (value if isinstance(value, list) else [value])]
        kept = tuple(text for text in texts if text)
        if None in texts or not kept:
            wanted = "a text, a number or a list of them, not all blank"
            raise self.wrong(name, wanted, kind=NO_ANSWER)
        return kept

    def inner(self, name: str) -> Row:
        """The object in field `name`."""
        value = self.fields.get(name)
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return Row(f"{self.where}: {name}", value)

    def identifier(self, *names: str) -> str:
        """The first of `names` that is there, as text; an integer is accepted."""
        for name in names:
            value = self.fields.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return str(value)
            if value is not None:
                return self.text(name, wanted="a text or an integer")
        raise self.wrong(names[0], "a text or an integer that names the task")


def _is_text(value: object) -> bool:
    # A lone surrogate survives json.loads and breaks every later encode().
    return (
        isinstance(value, str)
        and bool(value.strip())
        and not any("\ud800" <= character <= "\udfff" for character in value)
    )


def _answer(value: object) -> str | None:
    """An answer as text, "" if there is none, None if it cannot be one."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        if math.isinf(value):
            return None
        value = int(value) if value.is_integer() else repr(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and _is_text(value) else None


def parse_json(text: str | bytes, *, where: str) -> Any:
    """`json.loads`, every way to fail turned into a DataError with its place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}): {shown(text)}") from error


def row_of(where: str, line: bytes) -> Row:
    """A line as an object."""
    value = parse_json(line, where=where)
    if not isinstance(value, dict):
        raise DataError(f"{where}: found {shown(value)}; wanted one JSON object per line")
    return Row(where, value)


def read_file(path: Path) -> bytes:
    """The file's bytes; DataError if it is not there or cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
