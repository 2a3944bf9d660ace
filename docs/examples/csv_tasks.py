"""A data set: questions in a .csv with columns question, answer, picture (a file beside it).

data.loader=csv_tasks:csv_tasks data.train=[questions.csv]
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from tapo_train.data.images import read_image
from tapo_train.types import Task


def csv_tasks(path: Path) -> Iterator[Task]:
    """A task per line; answers that count as right are separated by `|`."""
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file)):
            picture = path.parent / row["picture"]
            yield Task(
                id=f"{path.stem}-{number}",
                question=row["question"],
                answers=tuple(row["answer"].split("|")),
                images=(read_image(picture.read_bytes(), where=str(picture)),),
                source=path.stem,
            )
