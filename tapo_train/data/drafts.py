"""A task whose pictures have not been looked at yet, and what the reader of a format is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tapo_train.data.intake import Intake
from tapo_train.data.row_files import RowPlace
from tapo_train.data.rows import Row
from tapo_train.data.stored import PictureBook, RowPicture, embedded
from tapo_train.types import JsonObject, Task

__all__ = ["Draft", "Source"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A task with the numbers of its pictures in the `PictureBook`."""

    id: str
    question: str
    pictures: tuple[int, ...]
    answers: tuple[str, ...]
    source: str = ""
    metadata: JsonObject = field(default_factory=dict)

    def task(self, book: PictureBook) -> Task:
        """The task, once the book is settled; DataError if a picture of it cannot be used."""
        return Task(
            id=self.id,
            question=self.question,
            images=tuple(map(book.image, self.pictures)),
            answers=self.answers,
            source=self.source,
            metadata=self.metadata,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a row comes from, and where its pictures go."""

    place: RowPlace
    roots: Sequence[Path]
    """Folders that picture paths are relative to."""
    book: PictureBook
    intake: Intake

    @property
    def row_name(self) -> str:
        """What a row without an id is called."""
        return f"{self.place.file.stem}_{self.place.number}"

    def from_path(self, row: Row, name: str) -> int:
        """The picture in a file."""
        return self.book.from_file(self.roots, name, where=row.where)

    def from_entry(
        self, row: Row, column: str, number: int, entry: Any, *, packed: bool = False
    ) -> int:
        """The picture in a cell of this row: bytes, an object that holds them, or base64.

        Raises:
            DataError: there is none in it.
        """
        where = f"{row.where}: {column}[{number}]"
        data = embedded(entry, where)
        return self.book.add(RowPicture(self.place, column, number, packed), where=where, data=data)
