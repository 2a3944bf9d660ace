"""What is known of questions beforehand: do they need a search, how often are they answered."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from tapo_train.data.row_files import rows_of
from tapo_train.errors import DataError
from tapo_train.types import Task

__all__ = ["needs_search", "pass_rates"]

_BY_CATEGORY = {"search_required": True, "search_free": False}
"""FVQA's words."""
_BY_SOURCE = {"livevqa/level1": False, "livevqa/level2": True}
"""LiveVQA asks what is seen, then what has to be found out."""


def needs_search(task: Task) -> bool | None:
    """Whether its data set says that it needs a search; None if that says nothing."""
    said = task.metadata.get("needs_search")
    if isinstance(said, bool):
        return said
    category = task.metadata.get("category")
    known = _BY_CATEGORY.get(category) if isinstance(category, str) else None
    return _BY_SOURCE.get(task.source) if known is None else known


def pass_rates(path: Path) -> dict[str, float]:
    """Share of right attempts by task id.

    Rows are those of `eval` (`task`, `accuracy`) or of a run's rollouts/ (`group`, `correct`);
    attempts that failed outside the policy have no accuracy and are left out.

    Raises:
        DataError: a row is neither.
    """
    held: dict[str, list[float]] = defaultdict(list)
    for _, _, read in rows_of(path):
        row = read()
        name, value = ("group", "correct") if "group" in row.fields else ("task", "accuracy")
        right = row.fields.get(value)
        if right is None and value in row.fields:
            continue
        if not isinstance(right, int | float) or not 0 <= right <= 1:
            raise row.wrong(value, "a number from 0 to 1: a row of eval or of rollouts/")
        held[row.text(name)].append(float(right))
    if not held:
        raise DataError(f"{path}: found no attempt")
    return {name: sum(values) / len(values) for name, values in held.items()}
