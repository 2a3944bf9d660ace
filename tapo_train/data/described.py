"""How the description of a format is read: from a row to its task.

`known_from` says what a description was made from: "rows" of the benchmark itself, or the public
"documentation" of its columns alone (docs/data.md lists them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tapo_train.data.drafts import Draft, Source
from tapo_train.data.native import RESERVED
from tapo_train.data.prompt import IMAGE_PLACEHOLDER
from tapo_train.data.rows import Row
from tapo_train.data.stored import entries_of

__all__ = ["Format", "Metric", "Pictures", "drafts_of"]

Metric = Literal[
    "exact_match", "token_f1", "token_set_f1", "infoseek", "multiple_choice", "judge", "execution"
]
"""How a benchmark's own paper scores an answer; `rewards/official.py` computes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Where the pictures of a row are."""

    columns: tuple[str, ...] = ()
    """All of them are looked at; a cell may hold a list."""
    text: Literal["path", "base64", "url"] = "path"
    """What a text in a cell is. Of a url the last part is looked for among the files: nothing is
    fetched."""
    packed: bool = False
    """The cell is JSON text of a list of {"filename", "data": base64}."""
    folder: str = ""
    """Beside the task file, in which the files lie."""
    endings: tuple[str, ...] = ()
    """To be put behind the text, the first that is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How the rows of one kind of file become tasks."""

    name: str
    columns: tuple[str, ...]
    """Which have to be there, and tell the format."""
    endings: tuple[str, ...] = (".jsonl", ".json", ".parquet", ".pq")
    id: str = "id"
    question: str = "question"
    answers: tuple[str, ...] = ("answer",)
    """Columns that are read one after the other, each answer once."""
    pictures: Pictures = Pictures()
    source: str = ""
    """Of the tasks, where the column `data_source` says nothing."""
    metric: Metric = "exact_match"
    known_from: Literal["rows", "documentation"] = "documentation"
    prepare: Callable[[Row], Row] | None = None
    companions: tuple[str, ...] = ()
    """Ends of the names of files that say more about the rows, told apart by `id`."""
    drafts: Callable[[Row, Source], list[Draft]] | None = None
    """In place of all the above."""


def drafts_of(format: Format, row: Row, source: Source) -> list[Draft]:
    """The tasks of a row.

    Raises:
        DataError: with the place, what was found and what is wanted.
    """
    if format.drafts is not None:
        return format.drafts(row, source)
    ready = row if format.prepare is None else format.prepare(row)
    has_id = ready.fields.get(format.id) is not None
    used = {format.id, format.question, *format.answers, *format.pictures.columns}
    answers = [ready.answers(name) for name in format.answers if _is_filled(ready, name)]
    if not answers:
        ready.answers(format.answers[0])  # refuses, and says what it found
    named = ready.fields.get("data_source")
    draft = Draft(
        id=ready.identifier(format.id) if has_id else source.row_name,
        question=ready.text(format.question).replace(IMAGE_PLACEHOLDER, " ").strip(),
        pictures=tuple(_pictures(format.pictures, ready, source)),
        answers=tuple(dict.fromkeys(answer for found in answers for answer in found)),
        source=named if isinstance(named, str) and named else format.source,
        metadata={
            "metric": format.metric,
            **{
                key: value
                for key, value in ready.fields.items()
                if key not in used and key not in _HIDDEN and value is not None and _is_plain(value)
            },
        },
    )
    return [draft]


_HIDDEN = (*RESERVED, "image_search_result")
"""Never metadata: names of the native format's own, and a picture that is no part of a question."""


def _is_filled(row: Row, name: str) -> bool:
    return row.fields.get(name) not in (None, "", [])


def _is_plain(value: Any) -> bool:
    """Whether a value can be written as JSON."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, str | int | float | bool | None)


def _pictures(where: Pictures, row: Row, source: Source) -> list[int]:
    found = []
    for column in where.columns:
        for number, entry in enumerate(entries_of(row.fields.get(column), where.packed)):
            path = entry.get("path") if isinstance(entry, dict) else entry
            is_embedded = isinstance(entry, dict) and (entry.get("bytes") or entry.get("data"))
            if isinstance(path, str) and where.text != "base64" and not is_embedded:
                found.append(_file(where, row, path, source))
            else:
                found.append(source.from_entry(row, column, number, entry, packed=where.packed))
    return found


def _file(where: Pictures, row: Row, text: str, source: Source) -> int:
    name = text.rpartition("/")[2].partition("?")[0] if where.text == "url" else text
    names = [name + ending for ending in where.endings] or [name]
    if len(names) > 1:
        roots = [*source.roots, *source.book.also]
        held = (one for one in names if any((root / one).is_file() for root in roots))
        return source.from_path(row, next(held, names[0]))
    return source.from_path(row, names[0])
