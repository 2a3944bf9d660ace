"""LiveVQA's news benchmark: benchmark.json and a folder of news photographs.

Each item holds a level-1 question (about what is seen) and a level-2 question
(which needs a search), each with options, the letter of the right one and a list
of accepted answers. They become two tasks. The policy is not shown the options:
the question is answered freely, as in the search systems' evaluations. Accepted
are the list's entries and the text of the right option without its letter.

Deviation: the official score is a judge model's; here it is exact match.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from tapo_train.data.images import ImageStore
from tapo_train.data.intake import Intake
from tapo_train.data.rows import Row, parse_json, read_file, shown
from tapo_train.errors import DataError
from tapo_train.types import Image, Task

__all__ = ["load_livevqa"]

_LEVELS = ("level1_qa", "level2_qa")
_OPTION = re.compile(r"\s*([A-Z])\s*[.):]\s*(.*\S)\s*", re.DOTALL)


def load_livevqa(path: Path, *, root: Path, store: ImageStore, intake: Intake) -> list[Task]:
    """Two tasks per item, `<id>/level1` and `<id>/level2`, in file order."""
    items = parse_json(read_file(path), where=str(path))
    if not isinstance(items, list):
        raise DataError(f"{path}: found {shown(items)}; wanted a list of items")
    tasks: list[Task] = []
    for number, item in enumerate(items):
        where = f"{path}: item {number}"
        tasks += intake.take(where, partial(_tasks, where, item, root=root, store=store))
    return tasks


def _tasks(where: str, item: Any, *, root: Path, store: ImageStore) -> list[Task]:
    if not isinstance(item, dict):
        raise DataError(f"{where}: found {shown(item)}; wanted an object")
    row = Row(where, item)
    image = store.from_file(root, row.text("img_path"), where=where)
    return [_task(row, level, image) for level in _LEVELS]


def _task(row: Row, level: str, image: Image) -> Task:
    qa = row.inner(level)
    options = _options(qa)
    letter = qa.text("Ground_Truth").strip()
    if letter not in options:
        raise qa.wrong("Ground_Truth", f"the letter of one of the options {sorted(options)}")
    return Task(
        id=f"{row.identifier('id')}/{level.removesuffix('_qa')}",
        question=qa.text("question"),
        images=(image,),
        answers=tuple(dict.fromkeys((*qa.answers("Ground_Truth_List"), options[letter]))),
        source=f"livevqa/{level.removesuffix('_qa')}",
        metadata={
            "question_type": qa.optional_text("question_type"),
            "publisher": row.optional_text("source"),
            "time": row.optional_text("time"),
        },
    )


def _options(qa: Row) -> dict[str, str]:
    """Letter -> text of every option; `C. Boston` or `C) Boston`."""
    options: dict[str, str] = {}
    for option in qa.texts("options"):
        match = _OPTION.fullmatch(option)
        if match is None or match[1] in options:
            raise qa.wrong("options", "texts like 'A. Boston', each letter once")
        options[match[1]] = match[2]
    return options
