"""The one door to task files: a path in, a list of `Task` out.

Formats: `native` (jsonl, see `native.py`), `fvqa` (parquet of MMSearch-R1),
`livevqa` (benchmark.json and a picture folder). A new format is one more module
and one more line in `load_tasks`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tapo_train.data.fvqa import load_fvqa
from tapo_train.data.images import ImageLimits, ImageStore
from tapo_train.data.livevqa import load_livevqa
from tapo_train.data.native import load_native, write_tasks
from tapo_train.data.rows import require_unique_ids
from tapo_train.errors import DataError
from tapo_train.types import Task

Load = Callable[[Path], Sequence[Task]]

__all__ = ["fingerprint", "load_task_files", "load_tasks", "write_tasks"]

_FORMAT_BY_SUFFIX = {".jsonl": "native", ".parquet": "fvqa", ".pq": "fvqa", ".json": "livevqa"}


def load_tasks(
    path: str | Path,
    *,
    format: str = "auto",
    root: str | Path | None = None,
    limits: ImageLimits | None = None,
) -> list[Task]:
    """Read every task of `path`, in file order.

    Args:
        path: The task file; a folder stands for the `benchmark.json` in it.
        format: `native`, `fvqa`, `livevqa`, or `auto`: chosen by the file's ending.
        root: Folder the picture paths are relative to; default the file's folder
            (for `livevqa` its `News_imgs`). No picture outside it is read.
        limits: Largest picture accepted.

    Raises:
        DataError: naming file and line, what was found and what is wanted. An empty
            file is an error too: no run wants it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "benchmark.json"
    folder = path.parent if root is None else Path(root)
    store = ImageStore(limits or ImageLimits())
    match _format_of(path, format):
        case "native":
            tasks = load_native(path, root=folder, store=store)
        case "fvqa":
            tasks = load_fvqa(path, store=store)
        case _:
            images = folder / "News_imgs" if root is None else folder
            tasks = load_livevqa(path, root=images, store=store)
    if not tasks:
        raise DataError(f"{path}: found no task; wanted at least one")
    return tasks


def load_task_files(
    paths: Sequence[str | Path], *, format: str = "auto", load: Load | None = None
) -> list[Task]:
    """The tasks of several files, one file after the other.

    Args:
        load: reads one file in place of `load_tasks`.

    Raises:
        DataError: as `load_tasks`, and when two files use the same id: their attempts
            would be taken for one group.
    """
    load = load or partial(load_tasks, format=format)
    held = [(task, str(path)) for path in paths for task in load(Path(path))]
    require_unique_ids([(task.id, path) for task, path in held])
    return [task for task, _ in held]


def _format_of(path: Path, format: str) -> str:
    known = sorted(set(_FORMAT_BY_SUFFIX.values()))
    if format != "auto":
        if format not in known:
            raise DataError(
                f"{path}: unknown task format {format!r}; wanted auto or one of {known}"
            )
        return format
    if path.suffix not in _FORMAT_BY_SUFFIX:
        raise DataError(
            f"{path}: cannot tell the task format from the ending {path.suffix!r}; "
            f"wanted one of {sorted(_FORMAT_BY_SUFFIX)}, or the format said outright ({known})"
        )
    return _FORMAT_BY_SUFFIX[path.suffix]


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
