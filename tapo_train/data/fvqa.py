"""FVQA (lmms-lab/FVQA, MMSearch-R1): parquet with embedded pictures.

Columns: prompt list<struct{role, content}>, images list<struct{bytes, path}>,
reward_model struct{ground_truth: str, candidate_answers: JSON text of a list, style},
data_source, and in the full files data_id and category. Accepted answers are the
ground truth, then the candidates, as in that system's training reward. The pickled
image-search caches published beside it are not read: a pickle can run code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tapo_train.data.images import ImageStore
from tapo_train.data.rows import (
    Row,
    parse_json,
    question_of,
    read_file,
    require_unique_ids,
    shown,
)
from tapo_train.errors import DataError
from tapo_train.types import Image, Task

__all__ = ["load_fvqa"]

_COLUMNS = ("prompt", "images", "reward_model")
_USED = (*_COLUMNS, "data_source", "data_id")


def load_fvqa(path: Path, *, store: ImageStore) -> list[Task]:
    """All rows in file order; without data_id a task is named `<file stem>_<row>`."""
    rows = [Row(f"{path}: row {number}", fields) for number, fields in enumerate(_read(path))]
    tasks = [
        _task(row, fallback_id=f"{path.stem}_{number}", store=store)
        for number, row in enumerate(rows)
    ]
    require_unique_ids([(task.id, row.where) for task, row in zip(tasks, rows, strict=True)])
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


def _task(row: Row, *, fallback_id: str, store: ImageStore) -> Task:
    images = _images(row, store)
    return Task(
        id=row.optional_text("data_id") or fallback_id,
        question=question_of(row, num_images=len(images)),
        images=images,
        answers=_answers(row.inner("reward_model")),
        source=row.optional_text("data_source"),
        metadata={
            key: value
            for key, value in row.fields.items()
            if key not in _USED and value is not None
        },
    )


def _images(row: Row, store: ImageStore) -> tuple[Image, ...]:
    found = row.fields.get("images")
    entries = [] if found is None else found
    if not isinstance(entries, list):
        raise row.wrong("images", "a list of {bytes, path}")
    images = []
    for number, entry in enumerate(entries):
        where = f"{row.where}: images[{number}]"
        data = entry.get("bytes") if isinstance(entry, dict) else None
        if not isinstance(data, bytes):
            raise DataError(f"{where}: found {shown(entry)}; wanted embedded bytes")
        images.append(store.from_bytes(data, where=where))
    return tuple(images)


def _answers(reward_model: Row) -> tuple[str, ...]:
    truth = reward_model.text("ground_truth")
    encoded = reward_model.optional_text("candidate_answers")
    if not encoded:
        return (truth,)
    value = parse_json(encoded, where=f"{reward_model.where}: candidate_answers")
    if value == []:
        return (truth,)
    candidates = Row(reward_model.where, {"candidate_answers": value}).texts("candidate_answers")
    return tuple(dict.fromkeys((truth, *candidates)))
