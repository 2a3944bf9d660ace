"""One row of a data file, with typed access that says where a wrong field is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapo_train.errors import DataError

__all__ = ["Row", "parse_json", "question_of", "read_json_lines", "require_unique_ids", "shown"]

IMAGE_PLACEHOLDER = "<image>"


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

    def wrong(self, name: str, wanted: str) -> DataError:
        """The error for field `name`: where, what was found, what is wanted."""
        found = shown(self.fields[name]) if name in self.fields else "nothing"
        return DataError(f"{self.where}: field {name!r}: found {found}; wanted {wanted}")

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


def parse_json(text: str | bytes, *, where: str) -> Any:
    """`json.loads`, every way to fail turned into a DataError with its place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}): {shown(text)}") from error


def read_json_lines(path: Path) -> Iterator[Row]:
    """Every non-blank line as an object, numbered from 1."""
    for number, line in enumerate(read_file(path).split(b"\n"), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        value = parse_json(line, where=where)
        if not isinstance(value, dict):
            raise DataError(f"{where}: found {shown(value)}; wanted one JSON object per line")
        yield Row(where, value)


def read_file(path: Path) -> bytes:
    """The file's bytes; DataError if it is not there or cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def question_of(row: Row, *, num_images: int) -> str:
    """The one user message of `row["prompt"]`, without its picture placeholders.

    Pictures are always shown before the question, in order, so placeholders at
    either end are dropped; one inside the text would change its meaning and is
    refused. No placeholder at all is fine (FVQA has none).
    """
    wanted = 'a list with one message {"role": "user", "content": text}'
    messages = row.fields.get("prompt")
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        raise row.wrong("prompt", wanted)
    message = Row(f"{row.where}: prompt[0]", messages[0])
    if message.fields.get("role") != "user":
        raise message.wrong("role", "'user' (the system prompt comes from the recipe)")
    content = message.text("content")
    num_placeholders = content.count(IMAGE_PLACEHOLDER)
    if num_placeholders not in (0, num_images):
        raise message.wrong(
            "content", f"{num_images} {IMAGE_PLACEHOLDER} as there are pictures, or none"
        )
    question = _strip_placeholders(content)
    if not question or IMAGE_PLACEHOLDER in question:
        raise message.wrong(
            "content", f"a question with {IMAGE_PLACEHOLDER} only before or after it"
        )
    return question


def _strip_placeholders(content: str) -> str:
    text = content.strip()
    while text.startswith(IMAGE_PLACEHOLDER):
        text = text.removeprefix(IMAGE_PLACEHOLDER).lstrip()
    while text.endswith(IMAGE_PLACEHOLDER):
        text = text.removesuffix(IMAGE_PLACEHOLDER).rstrip()
    return text


def require_unique_ids(ids: Sequence[tuple[str, str]]) -> None:
    """Refuse a second task of the same id; `ids` are (id, where) pairs in file order."""
    seen: dict[str, str] = {}
    for identifier, where in ids:
        if identifier in seen:
            raise DataError(
                f"{where}: id {identifier!r} was used before, at {seen[identifier]}; "
                "wanted a unique id for each task"
            )
        seen[identifier] = where
