"""Rows of task files, one at a time: jsonl, a list in json, parquet.

Memory does not grow with a file: a line, an item or a few rows of parquet are held. A row can be
read again by its place, for a picture that is embedded in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapo_train.data.rows import Row, row_of, shown
from tapo_train.errors import DataError

__all__ = ["PARQUET", "RowPlace", "columns_of", "row_at", "rows_of"]

PARQUET = (".parquet", ".pq")
_LINE_BYTES = 2**28
"""Longest line or item; a longer one is damage, or no such file at all."""
_READ_CHARS = 2**20
_BATCH_ROWS = 8
_SPACE = re.compile(r"[ \t\r\n]*")

Read = Callable[[], Row]
"""Gives a row, or raises a DataError that names its place."""


@dataclass(frozen=True, slots=True)
class RowPlace:
    """Where a row is."""

    file: Path
    number: int
    """0-based."""
    offset: int = 0
    """[B] of its line, in jsonl."""


def rows_of(path: Path) -> Iterator[tuple[str, RowPlace, Read]]:
    """(words for messages, place, how to read it) of every row; blank lines are none.

    Raises:
        DataError: the file cannot be read, or not be taken apart into rows.
    """
    try:
        if path.suffix.lower() in PARQUET:
            yield from _parquet_rows(path)
        elif path.suffix.lower() == ".json":
            yield from _items(path)
        else:
            yield from _lines(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def columns_of(path: Path) -> tuple[str, ...]:
    """Names in the first row that can be read; () if there is none."""
    if path.suffix.lower() in PARQUET:
        with _parquet(path) as file:
            return tuple(file.schema_arrow.names)
    for _, _, read in rows_of(path):
        try:
            return tuple(read().fields)
        except DataError:
            continue  # it is named when the rows are taken
    return ()


def row_at(place: RowPlace, column: str) -> Any:
    """`column` of the row at `place`, read again.

    Raises:
        DataError: it is not there any more.
    """
    path = place.file
    try:
        if path.suffix.lower() in PARQUET:
            return _parquet_cell(place, column)
        if path.suffix.lower() == ".json":
            rows = (read for _, found, read in _items(path) if found.number == place.number)
            return next(rows)().fields[column]
        with path.open("rb") as stream:
            stream.seek(place.offset)
            return row_of(str(path), stream.readline()).fields[column]
    except (OSError, KeyError, StopIteration) as error:
        raise DataError(f"{path}: row {place.number} is not there any more: {error}") from error


def _lines(path: Path) -> Iterator[tuple[str, RowPlace, Read]]:
    offset, number = 0, 0
    with path.open("rb") as stream:
        for lines, line in enumerate(iter(lambda: stream.readline(_LINE_BYTES), b""), start=1):
            where = f"{path}:{lines}"
            if line.strip():
                place = RowPlace(path, number, offset)
                yield where, place, _reader(row_of, where, line)
                number += 1
            offset += len(line)


def _reader(make: Callable[[str, Any], Row], where: str, value: Any) -> Read:
    return lambda: make(where, value)


def _row_of_item(where: str, item: Any) -> Row:
    if not isinstance(item, dict):
        raise DataError(f"{where}: found {shown(item)}; wanted an object")
    return Row(where, item)


def _items(path: Path) -> Iterator[tuple[str, RowPlace, Read]]:
    for number, item in enumerate(_values(path)):
        where = f"{path}: item {number}"
        yield where, RowPlace(path, number), _reader(_row_of_item, where, item)


def _values(path: Path) -> Iterator[Any]:
    """The values of the list that a JSON file holds."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            text = _Window(path, stream.read)
            if text.next_char() != "[":
                raise DataError(f"{path}: found {shown(text.rest())}; wanted a list of objects")
            text.take("[")
            separator = ""
            while text.next_char() != "]":
                text.take(separator)
                yield text.value()
                separator = ","
            text.take("]")
            if text.next_char():
                raise DataError(f"{path}: not valid JSON: {shown(text.rest())} after the list")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error


class _Window:
    """A piece of a text, which grows until a value is whole and is cut behind it."""

    def __init__(self, path: Path, read: Callable[[int], str]) -> None:
        self._path = path
        self._read = read
        self._text = ""
        self._start = 0
        self._is_end = False

    def next_char(self) -> str:
        """The next character that is no space, which stays; "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._start)
            assert match is not None
            self._start = match.end()
            if self._start < len(self._text) or self._is_end:
                return self._text[self._start : self._start + 1]
            self._more()

    def take(self, wanted: str) -> None:
        """Go past `wanted`, which has to come next."""
        if wanted and self.next_char() != wanted:
            raise DataError(f"{self._path}: not valid JSON: {shown(self.rest())}; wanted {wanted}")
        self._start += len(wanted)

    def value(self) -> Any:
        """The next value."""
        self.next_char()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._start)
            except (ValueError, RecursionError) as error:
                if self._is_end or isinstance(error, RecursionError):
                    raise DataError(
                        f"{self._path}: not valid JSON ({error}): {shown(self.rest())}"
                    ) from error
            else:
                # A number that ends where the piece ends may go on behind it.
                if end < len(self._text) or self._is_end:
                    self._start = end
                    return value
            self._more()

    def rest(self) -> str:
        """The beginning of what is left, for a message."""
        return self._text[self._start : self._start + 100]

    def _more(self) -> None:
        self._text, self._start = self._text[self._start :], 0
        if len(self._text) > _LINE_BYTES:
            raise DataError(f"{self._path}: an item is longer than {_LINE_BYTES} characters")
        # Twice as much each time: an item is tried a few times, not once per piece.
        more = self._read(max(_READ_CHARS, len(self._text)))
        self._is_end = not more
        self._text += more


def _parquet_rows(path: Path) -> Iterator[tuple[str, RowPlace, Read]]:
    number = 0
    with _parquet(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            for fields in batch.to_pylist():
                where = f"{path}: row {number}"
                yield where, RowPlace(path, number), _reader(Row, where, fields)
                number += 1


def _parquet_cell(place: RowPlace, column: str) -> Any:
    with _parquet(place.file) as file:
        left = place.number
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if left >= rows:
                left -= rows
                continue
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column]):
                if left < batch.num_rows:
                    return batch.column(0)[left].as_py()
                left -= batch.num_rows
    raise DataError(f"{place.file}: row {place.number} is not there any more")


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """The open file; pages are read as they are needed, not a whole column at a time.

    Raises:
        DataError: it cannot be read, now or later in the block.
    """
    import pyarrow as pa  # here: starting the command line must not pay for it
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"{path}: cannot be read: there is no such file")
    try:
        with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def require_columns(path: Path, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Raises DataError if a parquet file lacks a column."""
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(
            f"{path}: columns {missing} are missing; found {list(found)}, wanted at least "
            f"{list(wanted)}"
        )
