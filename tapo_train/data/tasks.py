"""The one door to task files: a path in, a list of `Task` out.

The forms in which files are published are described in `formats.py`. Rows are streamed; what stays
of a row is its task, whose pictures stay where they are (`stored.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tapo_train.data.companions import companions_of
from tapo_train.data.described import Format, drafts_of
from tapo_train.data.drafts import Draft, Source
from tapo_train.data.formats import BY_NAME, format_of, known_columns
from tapo_train.data.images import ImageLimits
from tapo_train.data.intake import MOST_SHOWN, Intake
from tapo_train.data.native import write_tasks
from tapo_train.data.row_files import PARQUET, columns_of, require_columns, rows_of
from tapo_train.data.rows import Row
from tapo_train.data.stored import ALONE, PictureBook, Share
from tapo_train.errors import DataError
from tapo_train.types import Task

Load = Callable[[Path], Sequence[Task]]

__all__ = ["fingerprint", "load_task_files", "load_tasks", "stream_tasks", "write_tasks"]

_BY_ENDING = {".jsonl": "native", ".parquet": "fvqa", ".pq": "fvqa", ".json": "livevqa"}
"""What a file is taken for whose first row cannot be read."""
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.\w+")
"""Name of a file of a split that was written in several, as the datasets library does."""


@dataclass(frozen=True, slots=True)
class _RowDrafts:
    """What was read of a row."""

    where: str
    book: PictureBook
    drafts: Sequence[Draft] = ()
    error: DataError | None = None

    def tasks(self) -> list[Task]:
        """Once the book is settled; raises DataError if the row cannot be used."""
        if self.error is not None:
            raise self.error
        return [draft.task(self.book) for draft in self.drafts]

    def is_bad(self) -> bool:
        """Whether it cannot be used, as far as this reader knows."""
        numbers = (number for draft in self.drafts for number in draft.pictures)
        return self.error is not None or any(map(self.book.is_known_bad, numbers))


def load_tasks(
    path: str | Path,
    *,
    format: str = "auto",
    root: str | Path | None = None,
    limits: ImageLimits | None = None,
    image_roots: Sequence[str | Path] = (),
    intake: Intake | None = None,
    share: Share = ALONE,
) -> list[Task]:
    """Read every task of `path`, in file order.

    Args:
        path: The task file; a folder stands for the `benchmark.json` in it, for the one task
            file in it, or for all the shards of one split.
        format: a name of `formats.FORMATS`, or `auto`: told from the columns of the first row.
        root: Folder the picture paths are relative to; default the file's folder
            (for `livevqa` its `News_imgs`).
        limits: Largest picture accepted.
        image_roots: Further folders of pictures. None outside these folders is read.
        intake: Takes the rows, and says what becomes of those that cannot be used; default:
            they are refused.
        share: of the pictures this process opens; every process of `share` has to call.

    Raises:
        DataError: naming file and line, what was found and what is wanted. An empty
            file is an error too: no run wants it.
    """
    taking = intake or Intake()
    book = PictureBook(limits or ImageLimits(), also=tuple(map(Path, image_roots)), share=share)
    rows: list[_RowDrafts] = []
    bad = 0
    reading = _Reading(format=format, root=root, intake=taking)
    for row in reading.rows(Path(path), lambda: book):
        rows.append(row)
        bad += row.is_bad()
        if bad >= MOST_SHOWN and not taking.drop:
            break  # enough to say
    book.settle()
    tasks = [task for row in rows for task in taking.take(row.where, row.tasks)]
    if intake is None:
        taking.settle()
    if not tasks and not taking.problems:
        raise DataError(f"{path}: found no task; wanted at least one")
    return tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """How files are read."""

    format: str
    root: str | Path | None
    intake: Intake

    def rows(self, path: Path, book: Callable[[], PictureBook]) -> Iterator[_RowDrafts]:
        """What each row of the files of `path` holds, in order."""
        for file in _files_of(path):
            form = _format_of(file, self.format)
            folder = Path(self.root) if self.root is not None else file.parent
            roots = [folder / form.pictures.folder, folder] if self.root is None else [folder]
            companions = companions_of(file, form.companions, key=form.id)
            for where, place, read in rows_of(file):
                source = Source(place=place, roots=roots, book=book(), intake=self.intake)
                try:
                    row = read()
                    known = {
                        key: held for one in companions for key, held in one.about(row).items()
                    }
                    drafts = drafts_of(form, Row(row.where, {**known, **row.fields}), source)
                except DataError as error:
                    yield _RowDrafts(where, source.book, error=error)
                else:
                    yield _RowDrafts(where, source.book, drafts)
            for companion in companions:
                companion.require_used()


def stream_tasks(
    path: Path, *, format: str = "auto", image_roots: Sequence[Path] = ()
) -> Iterator[tuple[str, list[Task] | DataError]]:
    """(place, its tasks or why there are none) of every row; nothing is kept of those before."""
    reading = _Reading(format=format, root=None, intake=Intake(drop=True))
    for row in reading.rows(path, lambda: PictureBook(ImageLimits(), also=image_roots)):
        try:
            yield row.where, row.tasks()
        except DataError as error:
            yield row.where, error


def load_task_files(
    paths: Sequence[str | Path],
    *,
    format: str = "auto",
    image_roots: Sequence[str | Path] = (),
    intake: Intake | None = None,
    load: Load | None = None,
    share: Share = ALONE,
) -> list[Task]:
    """The tasks of several files, one file after the other.

    Args:
        load: reads one file in place of `load_tasks`.
        share: as in `load_tasks`.

    Raises:
        DataError: as `load_tasks`, for the rows of all files together, and when two use the same
            id: their attempts would be taken for one group.
    """
    taking = intake or Intake()
    tasks: list[Task] = []
    for path in paths:
        if load is None:
            tasks += load_tasks(
                path, format=format, image_roots=image_roots, intake=taking, share=share
            )
        else:
            for task in load(Path(path)):
                tasks += taking.take(str(path), partial(list, [task]))
    taking.settle()
    if not tasks:
        raise DataError("\n  ".join(["found no task that can be used:", *taking.report()]))
    return tasks


def _files_of(path: Path) -> list[Path]:
    """The files that a path stands for."""
    if not path.is_dir():
        return [path]
    if (path / "benchmark.json").exists():
        return [path / "benchmark.json"]
    held = sorted(file for file in path.iterdir() if file.suffix.lower() in _BY_ENDING)
    if len(held) == 1:
        return held
    shards = [_SHARD.fullmatch(file.name) for file in held]
    splits = {shard and (shard["split"], shard["total"]) for shard in shards}
    names = ", ".join(file.name for file in held[:10])
    if len(splits) != 1 or None in splits:
        raise DataError(
            f"{path}: found {names or 'no task file'}; wanted one task file, or the shards of one "
            "split (train-00000-of-00002.parquet, …); name the files to read several"
        )
    total = int(shards[0]["total"]) if shards[0] else 0
    if [shard and int(shard["number"]) for shard in shards] != list(range(total)):
        raise DataError(f"{path}: found {len(held)} of {total} shards ({names}); wanted them all")
    return held


def _format_of(path: Path, named: str) -> Format:
    """The form of a file.

    Raises:
        DataError: it is none of those known, with the columns of each.
    """
    if named != "auto":
        if named not in BY_NAME:
            raise DataError(
                f"{path}: unknown task format {named!r}; wanted auto or one of {sorted(BY_NAME)}"
            )
        return _checked(path, BY_NAME[named])
    ending = path.suffix.lower()
    if ending not in _BY_ENDING:
        raise DataError(
            f"{path}: cannot tell the task format from the ending {path.suffix!r}; "
            f"wanted one of {sorted(_BY_ENDING)}, or the format said outright ({sorted(BY_NAME)})"
        )
    columns = columns_of(path)
    if found := format_of(ending, columns):
        return found
    by_ending = BY_NAME[_BY_ENDING[ending]]
    if columns and not set(columns) & {"prompt", "reward_model", "level1_qa", "level2_qa"}:
        raise DataError(
            f"{path}: a file with the columns {', '.join(map(str, columns))} is of no known form; "
            f"wanted those of one of these (or data.loader: a reader of your own):\n"
            f"{known_columns()}"
        )
    return _checked(path, by_ending)


def _checked(path: Path, form: Format) -> Format:
    """The format; a parquet file without its columns is refused at once, not row by row."""
    if path.suffix.lower() in PARQUET:
        require_columns(path, columns_of(path), form.columns)
    return form


def fingerprint(tasks: Sequence[Task]) -> str:
    """Hex digest of everything a run sees of `tasks`, for the manifest.

    Independent of the file format and of where the files lie; depends on the order.
    """
    digest = hashlib.sha256()
    for task in tasks:
        seen = [
            task.id,
            task.question,
            list(task.answers),
            [image.sha256 for image in task.images],
            task.source,
        ]
        digest.update(json.dumps(seen).encode() + b"\n")
    return digest.hexdigest()
