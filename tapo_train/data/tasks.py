"""The one door to task files: a path in, a list of `Task` out.

Formats: `native` (jsonl, see `native.py`), `fvqa` (parquet of MMSearch-R1),
`livevqa` (benchmark.json and a picture folder). A new format is one more module
and one more line in `load_tasks`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tapo_train.data.fvqa import load_fvqa
from tapo_train.data.images import ImageLimits, ImageStore
from tapo_train.data.intake import Intake
from tapo_train.data.livevqa import load_livevqa
from tapo_train.data.native import load_native, write_tasks
from tapo_train.data.rows import parse_json, read_file
from tapo_train.errors import DataError
from tapo_train.types import Task

Load = Callable[[Path], Sequence[Task]]

__all__ = ["fingerprint", "load_task_files", "load_tasks", "write_tasks"]

_FORMAT_BY_SUFFIX = {".jsonl": "native", ".parquet": "fvqa", ".pq": "fvqa", ".json": "livevqa"}
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.\w+")
"""Name of a file of a split that was written in several, as the datasets library does."""


def load_tasks(
    path: str | Path,
    *,
    format: str = "auto",
    root: str | Path | None = None,
    limits: ImageLimits | None = None,
    image_roots: Sequence[str | Path] = (),
    intake: Intake | None = None,
) -> list[Task]:
    """Read every task of `path`, in file order.

    Args:
        path: The task file; a folder stands for the `benchmark.json` in it, for the one task
            file in it, or for all the shards of one split.
        format: `native`, `fvqa`, `livevqa`, or `auto`: chosen by the file's ending; a .json of
            rows with a `prompt` is native.
        root: Folder the picture paths are relative to; default the file's folder
            (for `livevqa` its `News_imgs`).
        limits: Largest picture accepted.
        image_roots: Further folders of pictures. None outside these folders is read.
        intake: Takes the rows, and says what becomes of those that cannot be used; default:
            they are refused.

    Raises:
        DataError: naming file and line, what was found and what is wanted. An empty
            file is an error too: no run wants it.
    """
    taking = intake or Intake()
    store = ImageStore(limits or ImageLimits(), also=tuple(map(Path, image_roots)))
    tasks: list[Task] = []
    for file in _files_of(Path(path)):
        folder = file.parent if root is None else Path(root)
        match _format_of(file, format):
            case "native":
                tasks += load_native(file, root=folder, store=store, intake=taking)
            case "fvqa":
                tasks += load_fvqa(file, store=store, intake=taking)
            case _:
                images = folder / "News_imgs" if root is None else folder
                tasks += load_livevqa(file, root=images, store=store, intake=taking)
    if intake is None:
        taking.settle()
    if not tasks and not taking.problems:
        raise DataError(f"{path}: found no task; wanted at least one")
    return tasks


def load_task_files(
    paths: Sequence[str | Path],
    *,
    format: str = "auto",
    image_roots: Sequence[str | Path] = (),
    intake: Intake | None = None,
    load: Load | None = None,
) -> list[Task]:
    """The tasks of several files, one file after the other.

    Args:
        load: reads one file in place of `load_tasks`.

    Raises:
        DataError: as `load_tasks`, for the rows of all files together, and when two use the same
            id: their attempts would be taken for one group.
    """
    taking = intake or Intake()
    tasks: list[Task] = []
    for path in paths:
        if load is None:
            tasks += load_tasks(path, format=format, image_roots=image_roots, intake=taking)
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
    held = sorted(file for file in path.iterdir() if file.suffix.lower() in _FORMAT_BY_SUFFIX)
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


def _format_of(path: Path, format: str) -> str:
    known = sorted(set(_FORMAT_BY_SUFFIX.values()))
    if format != "auto":
        if format not in known:
            raise DataError(
                f"{path}: unknown task format {format!r}; wanted auto or one of {known}"
            )
        return format
    suffix = path.suffix.lower()
    if suffix not in _FORMAT_BY_SUFFIX:
        raise DataError(
            f"{path}: cannot tell the task format from the ending {path.suffix!r}; "
            f"wanted one of {sorted(_FORMAT_BY_SUFFIX)}, or the format said outright ({known})"
        )
    if suffix == ".json" and _holds_native_rows(path):
        return "native"
    return _FORMAT_BY_SUFFIX[suffix]


def _holds_native_rows(path: Path) -> bool:
    rows = parse_json(read_file(path), where=str(path))
    return isinstance(rows, list) and any(isinstance(row, dict) and "prompt" in row for row in rows)


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
