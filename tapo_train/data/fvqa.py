"""FVQA (lmms-lab/FVQA, MMSearch-R1): parquet with embedded pictures.

Columns: prompt list<struct{role, content}>, images list<struct{bytes, path}>,
reward_model struct{ground_truth: str, candidate_answers: JSON text of a list, style},
data_source, and in the full files data_id and category. Accepted answers are the
ground truth, then the candidates, as in that system's training reward. The pickled
image-search caches published beside it are not read: a pickle can run code.

Files like it are read too: candidates as a list column or blank, answers in the shapes that
`Row.answers` reads, numbers as data_id, messages in the shapes of `prompt.py`, pictures under
`image`, no pictures at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tapo_train.data.images import ImageStore
from tapo_train.data.intake import Intake
from tapo_train.data.pictures import PICTURE_KEYS, picture_entries
from tapo_train.data.prompt import question_of
from tapo_train.data.rows import Row, parse_json, read_file, shown
from tapo_train.errors import DataError
from tapo_train.types import Image, Task

__all__ = ["load_fvqa"]

_COLUMNS = ("prompt", "reward_model")
_USED = (*_COLUMNS, *PICTURE_KEYS, "data_source", "data_id")


def load_fvqa(path: Path, *, store: ImageStore, intake: Intake) -> list[Task]:
    """All rows in file order; without data_id a task is named `<file stem>_<row>`."""
    tasks: list[Task] = []
    for number, fields in enumerate(_read(path)):
        row = Row(f"{path}: row {number}", fields)
        fallback_id = f"{path.stem}_{number}"
        read = partial(_tasks, row, fallback_id=fallback_id, store=store, intake=intake)
        tasks += intake.take(row.where, read)
    return tasks


def _read(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa  # here: starting the command line must not pay for it
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(read_file(path)))
        missing = [name for name in _COLUMNS if name not in table.column_names]
        if missing:
            raise DataError(
                f"{path}: columns {missing} are missing; found {table.column_names}, "
                f"wanted at least {list(_COLUMNS)}"
            )
        rows: list[dict[str, Any]] = table.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error
    return rows


def _tasks(row: Row, *, fallback_id: str, store: ImageStore, intake: Intake) -> Sequence[Task]:
    images = _images(row, store)
    has_id = row.fields.get("data_id") is not None
    task = Task(
        id=row.identifier("data_id") if has_id else fallback_id,
        question=question_of(row, num_images=len(images), intake=intake),
        images=images,
        answers=_answers(row.inner("reward_model")),
        source=row.optional_text("data_source"),
        metadata={
            key: value
            for key, value in row.fields.items()
            if key not in _USED and value is not None
        },
    )
    return [task]


def _images(row: Row, store: ImageStore) -> tuple[Image, ...]:
    field, entries = picture_entries(row)
    images = []
    for number, entry in enumerate(entries):
        where = f"{row.where}: {field}[{number}]"
        data = entry.get("bytes") if isinstance(entry, dict) else None
        if not isinstance(data, bytes):
            raise DataError(f"{where}: found {shown(entry)}; wanted embedded bytes")
        images.append(store.from_bytes(data, where=where))
    return tuple(images)


def _answers(reward_model: Row) -> tuple[str, ...]:
    truth = reward_model.answers("ground_truth")
    value = reward_model.fields.get("candidate_answers")
    if isinstance(value, str) and value.strip():
        value = parse_json(value, where=f"{reward_model.where}: candidate_answers")
    if value in (None, []) or (isinstance(value, str) and not value.strip()):
        return truth
    candidates = Row(reward_model.where, {"candidate_answers": [truth[0], *_listed(value)]})
    return tuple(dict.fromkeys((*truth, *candidates.answers("candidate_answers"))))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
