"""The native task format: one JSON object per line, pictures as files beside it.

    {"id": "q17", "prompt": [{"role": "user", "content": "<image>\\nWho built this?"}],
     "image": ["images/tower.png"],
     "reward_model": {"ground_truth": ["Gustave Eiffel", "Eiffel"], "style": "rule"},
     "data_source": "towers", "hops": 2}

It is the format of SenseNova-MARS (arXiv 2512.24330). Picture paths are relative
to the file's folder (or a given root) and never leave it. Keys that are not named
above are kept in `Task.metadata`. Deviations: `id` may be called `index` as in some
of their files, but one of the two is needed; `image` may be a single path, absent, or have a
name of `pictures.PICTURE_KEYS`; messages and answers may have the shapes that `prompt.py` and
`Row.answers` read. A file whose name ends in .json holds one list of such objects.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tapo_train.data.drafts import Draft, Source
from tapo_train.data.images import extension
from tapo_train.data.pictures import PICTURE_KEYS, path_of, picture_entries
from tapo_train.data.prompt import IMAGE_PLACEHOLDER, question_of
from tapo_train.data.rows import Row
from tapo_train.data.sealed import require_open
from tapo_train.errors import DataError
from tapo_train.types import Image, Task

__all__ = ["RESERVED", "keep_picture", "native_drafts", "write_tasks"]

RESERVED = ("id", "prompt", *PICTURE_KEYS, "reward_model", "data_source")


def native_drafts(row: Row, source: Source) -> list[Draft]:
    """The task of a native row."""
    field, entries = picture_entries(row)
    pictures = tuple(source.from_path(row, path_of(row, field, entry)) for entry in entries)
    identifier_name = "id" if row.fields.get("id") is not None else "index"
    draft = Draft(
        id=row.identifier("id", "index"),
        question=question_of(row, num_images=len(pictures), intake=source.intake),
        pictures=pictures,
        answers=row.inner("reward_model").answers("ground_truth"),
        source=row.optional_text("data_source"),
        metadata={
            key: value
            for key, value in row.fields.items()
            if key not in RESERVED and key != identifier_name
        },
    )
    return [draft]


def write_tasks(path: Path, tasks: Iterable[Task], *, image_folder: str = "images") -> int:
    """Write `tasks` to a native file that `native_drafts` reads back to equal tasks; their number.

    Pictures go to `path.parent / image_folder`, named by their content, each once. Tasks are
    written as they come. The file appears complete or not at all.

    Raises:
        DataError: a metadata key would hide a field of the format, two tasks share
            an id, a value is not JSON, or a task's authors publish it encrypted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    seen: set[str] = set()
    try:
        with partial.open("w", encoding="utf-8") as stream:
            for number, task in enumerate(tasks):
                if task.id in seen:
                    raise DataError(f"task {number}: id {task.id!r} was used before", kind="twice")
                seen.add(task.id)
                require_open([task], doing="plain copy")
                images = [
                    keep_picture(image, parent=path.parent, folder=image_folder)
                    for image in task.images
                ]
                stream.write(_line(task, images) + "\n")
        partial.replace(path)
    except DataError:
        partial.unlink()
        raise
    return len(seen)


def _line(task: Task, images: list[str]) -> str:
    hidden = sorted(set(task.metadata) & set(RESERVED))
    if hidden:
        raise DataError(f"task {task.id}: metadata {hidden} would hide fields of the task format")
    fields: dict[str, Any] = {
        "id": task.id,
        "prompt": [
            {"role": "user", "content": f"{IMAGE_PLACEHOLDER}\n" * len(images) + task.question}
        ],
        "image": images,
        "reward_model": {"ground_truth": list(task.answers), "style": "rule"},
        "data_source": task.source,
    }
    if not task.source:
        del fields["data_source"]
    row = Row(f"task {task.id}", fields)
    row.identifier("id")
    row.inner("reward_model").answers("ground_truth")
    if question_of(row, num_images=len(images)) != task.question:
        raise DataError(
            f"task {task.id}: question {task.question!r} would not be read back as it is; "
            f"wanted no white space and no {IMAGE_PLACEHOLDER} at its ends"
        )
    try:
        return json.dumps({**fields, **task.metadata}, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"task {task.id}: metadata is not JSON: {error}") from error


def keep_picture(image: Image, *, parent: Path, folder: str) -> str:
    """Store a picture, if it is not there yet; its path relative to the task file."""
    data = image.data
    name = f"{folder}/{image.sha256}{extension(data)}"
    if not (parent / name).exists():
        (parent / folder).mkdir(exist_ok=True)
        (parent / name).write_bytes(data)
    return name
