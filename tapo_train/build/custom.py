"""From a recipe to the parts it names by import path, whose signatures are checked first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tapo_train.build.services import key_from
from tapo_train.credit.assigners import CreditAssigner
from tapo_train.credit.result import CreditResult, result_of
from tapo_train.credit.steps import CreditRow
from tapo_train.errors import ConfigError, DataError
from tapo_train.import_path import is_async, load, make
from tapo_train.recipe import Custom, CustomPart, JudgePart
from tapo_train.recipe.compose import Recipe
from tapo_train.rewards.score import Part, Score, scored
from tapo_train.tools.registry import load_tool
from tapo_train.types import Task, Trajectory

__all__ = [
    "CustomSink",
    "custom_credit",
    "custom_loader",
    "custom_part",
    "custom_reward",
    "key_of",
    "require_custom_parts",
]

TAKES = {
    "algo.loss": ("batch",),
    "algo.advantage.custom": ("rows",),
    "credit": ("rows",),
    "reward.parts": ("trajectory",),
    "reward.process": ("trajectories", "policy"),
    "data.loader": ("path",),
    "report.sink": ("step", "metrics"),
    "model.call_reader": ("body",),
}
"""What a run hands to the part of each field."""


def custom_part(part: Custom | CustomPart, *, where: str) -> Callable[..., Any]:
    """The callable behind a field of `TAKES`.

    Raises:
        ConfigError: it cannot be imported, or not be called with what the run hands it.
    """
    found = load(part.path, where=f"{where}.path")
    return make(found, part.arguments, takes=TAKES[where], where=where)


def require_custom_parts(recipe: Recipe) -> None:
    """Import and check every part that the recipe names by import path, before anything is built.

    Raises:
        ConfigError: all that is wrong with them, a line each.
    """
    problems = []
    for check in _checks(recipe):
        try:
            check()
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n  ".join(problems))


def _checks(recipe: Recipe) -> Iterator[Callable[[], object]]:
    named = {
        "algo.loss": recipe.algo.loss,
        "algo.advantage.custom": recipe.algo.advantage.custom,
        "credit": recipe.credit,
        "data.loader": recipe.data.loader,
        "report.sink": recipe.report.sink,
        "model.call_reader": recipe.model.call_reader,
    }
    for where, part in named.items():
        if isinstance(part, Custom):
            yield partial(custom_part, part, where=where)
    for parts in (recipe.reward.parts, *recipe.reward.by_source.values()):
        for reward in parts.values():
            if isinstance(reward, CustomPart):
                yield partial(custom_reward, reward)
            elif isinstance(reward, JudgePart):
                yield partial(key_of, reward)
    for stage in recipe.reward.process:
        yield partial(custom_part, stage, where="reward.process")
    if recipe.tools.environment is not None:
        yield partial(load, recipe.tools.environment.path, where="tools.environment.path")
    for extra in recipe.tools.extra:
        yield partial(load_tool, extra.path, extra.arguments)


def custom_loader(part: Custom) -> Callable[[Path], list[Task]]:
    """Reads a task file with the recipe's own function.

    Raises:
        DataError: what it gives are no tasks, or there are none.
    """
    read = custom_part(part, where="data.loader")

    def tasks(path: Path) -> list[Task]:
        found = list(read(path))
        strangers = [task for task in found if not isinstance(task, Task)]
        if strangers or not found:
            what = f"a {type(strangers[0]).__name__}" if strangers else "nothing"
            raise DataError(f"{path}: {part.path} gave {what}; wanted at least one Task")
        return found

    return tasks


def key_of(part: JudgePart) -> str:
    """The key of a judge's endpoint, from the environment; "" if it has none.

    Raises:
        ConfigError: the variable is empty or not set.
    """
    return key_from(part.key_variable, field="reward.parts: key_variable")


def custom_reward(part: CustomPart, ending: ExitStack | None = None) -> Part:
    """The recipe's own reward; one that is not async runs in a thread.

    Args:
        ending: where its `close`, if it has one, is entered.
    """
    call = custom_part(part, where="reward.parts")
    if ending is not None and hasattr(call, "close"):
        ending.callback(call.close)

    async def reward(trajectory: Trajectory) -> Score:
        if is_async(call):
            return scored(await call(trajectory))
        return scored(await asyncio.to_thread(call, trajectory))

    return reward


class CustomSink:
    """The recipe's own place for metrics; what it raises ends the run."""

    def __init__(self, part: Custom) -> None:
        self._call = custom_part(part, where="report.sink")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the row of 0-based `step` over."""
        self._call(step, metrics)

    def close(self) -> None:
        """Close it, if it can be closed."""
        close = getattr(self._call, "close", None)
        if close is not None:
            close()


def custom_credit(part: Custom) -> CreditAssigner:
    """The recipe's own credit stage; it may answer with the advantages alone."""
    assign = custom_part(part, where="credit")

    def credit(rows: Sequence[CreditRow]) -> CreditResult:
        found = assign(rows)
        if isinstance(found, CreditResult):
            return found
        return result_of(rows, [np.asarray(turns, dtype=np.float64) for turns in found])

    return credit
