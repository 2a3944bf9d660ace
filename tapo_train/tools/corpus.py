"""Corpora of the text search, read passage by passage whatever their form.

    .jsonl     {"id", "title", "text"} per line, or {"id", "contents"} as Search-R1 publishes them
    .parquet   the same names as columns
    a folder   .txt and .md below it, in the order of their paths, cut at blank lines

Nothing holds more than a passage, or a batch of rows, at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapo_train.errors import DataError
from tapo_train.tools.index_file import decoded, index_lines

__all__ = ["Passage", "contents_of", "read_passages", "title_and_text"]

PASSAGE_CHARS = 1200
"""[characters] from which on a text file is cut at its next blank line; twice that cuts a line."""
TEXT_SUFFIXES = (".txt", ".md")
_BATCH_ROWS = 256
_HEADING = re.compile(r"#{1,6}(?: +(.*))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """One entry of a corpus."""

    id: str
    title: str
    text: str

    def shown(self) -> str:
        """As the policy reads it."""
        return f"{self.title}: {self.text}" if self.title else self.text


def read_passages(sources: Iterable[Path]) -> Iterator[Passage]:
    """Every passage of the files and folders, in order.

    Raises:
        DataError: one of them cannot be read, or a row is none of the forms.
    """
    for source in sources:
        if source.is_dir():
            yield from _text_folder(source)
        elif source.suffix == ".parquet":
            yield from _parquet(source)
        elif source.suffix in TEXT_SUFFIXES:
            yield from _text_file(source, source.name)
        else:
            for where, line in index_lines(source, "text corpus"):
                yield _passage_of_line(line, where=where)


def title_and_text(contents: str) -> tuple[str, str]:
    """What Search-R1 keeps in one string: `"Title"`, a line end, the text; one line is all text."""
    first, line_end, rest = contents.partition("\n")
    if not line_end:
        return "", contents
    title = first.strip()
    if len(title) > 1 and title[0] == title[-1] == '"':
        title = title[1:-1]
    return title, rest


def contents_of(passage: Passage) -> str:
    """The inverse of `title_and_text`."""
    return f'"{passage.title}"\n{passage.text}'


def _passage_of_line(line: str, *, where: str) -> Passage:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _malformed(where, f"{type(error).__name__}: {error}") from error
    if not isinstance(row, dict):
        raise _malformed(where, f"found {type(row).__name__}")
    return _passage(row, where=where)


def _passage(row: Mapping[str, Any], *, where: str) -> Passage:
    title, text = row.get("title"), row.get("text")
    if text is None and isinstance(row.get("contents"), str):
        inside, text = title_and_text(row["contents"])
        title = inside if title is None else title
    title, name = "" if title is None else title, row.get("id")
    if not isinstance(title, str) or not isinstance(text, str):
        found = f"title {type(title).__name__}, text {type(text).__name__}"
        raise _malformed(where, f"found {found} among {sorted(map(str, row))[:8]}")
    return Passage(id=where if name is None else str(name), title=title, text=text)


def _malformed(where: str, found: str) -> DataError:
    return DataError(f'{where}: {found}; wanted {{"id", "title", "text"}} or {{"id", "contents"}}')


def _parquet(path: Path) -> Iterator[Passage]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            named = ("id", "title", "text", "contents")
            columns = [name for name in named if name in file.schema_arrow.names]
            first = 1
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                for number, row in enumerate(batch.to_pylist(), start=first):
                    yield _passage(row, where=f"{path}:{number}")
                first += batch.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"text corpus {path}: {error}; wanted a parquet file") from error


def _text_folder(folder: Path) -> Iterator[Passage]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in TEXT_SUFFIXES)
    if not files:
        wanted = " or ".join(TEXT_SUFFIXES)
        raise DataError(f"text corpus {folder}: found no text, wanted files ending in {wanted}")
    for path in files:
        yield from _text_file(path, str(path.relative_to(folder)))


def _text_file(path: Path, name: str) -> Iterator[Passage]:
    """Paragraphs, joined up to PASSAGE_CHARS, under the file's name or a markdown heading."""
    title, lines, length, number = path.stem, list[str](), 0, 0
    for line in (*_lines(path), None):
        heading = _HEADING.fullmatch(line) if line is not None and path.suffix == ".md" else None
        is_long = length >= PASSAGE_CHARS and (not line or length >= 2 * PASSAGE_CHARS)
        if line is None or heading is not None or is_long:
            if text := "\n".join(lines).strip():
                number += 1
                yield Passage(id=f"{name}#{number}", title=title, text=text)
            lines, length = [], 0
        if heading is not None:
            title = heading[1] or path.stem
        elif line is not None:
            lines.append(line)
            length += len(line) + 1


def _lines(path: Path) -> Iterator[str]:
    """Stripped lines; a longer one than a passage comes in pieces, cut between words."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = decoded(raw, f"text corpus {path}:{number}").strip()
                while len(line) > PASSAGE_CHARS:
                    cut = line.rfind(" ", 0, PASSAGE_CHARS) + 1 or PASSAGE_CHARS
                    yield line[:cut].rstrip()
                    line = line[cut:]
                yield line
    except OSError as error:
        raise DataError(f"text corpus {path}: cannot be read ({error.strerror})") from error
