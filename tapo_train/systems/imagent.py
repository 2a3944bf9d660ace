"""IMAgent (arXiv 2512.08980): an agent that looks at several pictures, and looks again.

    data.loader: {path: tapo_train.systems.imagent:several_pictures, arguments: {pictures: 3}}
    tools.extra: [tapo_train.systems.imagent:ReflectionTool, ….imagent:ConfirmationTool]
    reward.process: [{path: tapo_train.systems.imagent:TrajectoryMask}, {path: ….imagent:ToolGain}]
    credit: {name: custom, path: tapo_train.systems.imagent:action_mask}

A long conversation forgets its pictures; one tool shows a picture again, the other a region of it.
The masks are on two levels: turns whose calls failed by the policy's own fault have no part in the
gradient, and attempts that came to no end or whose calls all failed leave loss and baseline. Its
code is not released: names of the tools, the gain and the terms of the masks are our reading.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tapo_train.algos.advantages import Floats
from tapo_train.credit.result import unchanged
from tapo_train.credit.steps import CreditRow
from tapo_train.data.tasks import load_tasks
from tapo_train.errors import DataError
from tapo_train.tools.base import ToolContext
from tapo_train.tools.crop import ZoomTool
from tapo_train.tools.images import ImageDecoder, indexed_image, number
from tapo_train.training.process import PolicyAccess, earning
from tapo_train.types import Observation, Outcome, StopReason, Task, Trajectory

__all__ = [
    "ConfirmationTool",
    "ReflectionTool",
    "ToolGain",
    "TrajectoryMask",
    "action_mask",
    "several_pictures",
    "tool_gain",
]


class ReflectionArguments(BaseModel):
    """Arguments of image_reflection_tool."""

    model_config = ConfigDict(extra="forbid")

    img_idx: Annotated[int, BeforeValidator(number), Field(description="image number, from 0")] = 0


class ReflectionTool:
    """Show a picture of the conversation again."""

    name = "image_reflection_tool"
    version = "1"
    description = "Look at an image again."
    reads = frozenset({"picture"})
    arguments_model: type[BaseModel] = ReflectionArguments

    async def run(self, arguments: ReflectionArguments, context: ToolContext) -> Observation:
        """The picture, as it is, after a sentence; ToolArgumentError if there is none."""
        image = indexed_image(context, arguments.img_idx, tool=self.name)
        return Observation(text=f"Here is image {arguments.img_idx} again:", images=(image,))


class ConfirmationTool(ZoomTool):
    """Show a region of a picture, to confirm what was seen there."""

    name = "image_confirmation_tool"
    description = "Look at a region of an image again, to confirm what is there."

    def __init__(self, min_side_px: int = 28, max_pixels: int | None = None) -> None:
        super().__init__(ImageDecoder(), min_side_px=min_side_px, max_pixels=max_pixels)


def several_pictures(path: Path, *, pictures: int = 3) -> list[Task]:
    """The tasks of a file, each among the pictures of the next ones, and told which is meant.

    A task with its picture at place k asks "About image k: …". Places go round, so that none is
    right more often.

    Raises:
        DataError: a task has another number of pictures than one, or there are too few tasks.
    """
    tasks = load_tasks(path)
    if pictures < 2 or len(tasks) < pictures or any(len(task.images) != 1 for task in tasks):
        raise DataError(
            f"{path}: {len(tasks)} tasks for {pictures} pictures each; wanted at least two, as "
            "many tasks, and tasks with one picture"
        )
    found = []
    for index, task in enumerate(tasks):
        others = [tasks[(index + step) % len(tasks)].images[0] for step in range(1, pictures)]
        place = index % pictures
        images = (*others[:place], task.images[0], *others[place:])
        question = f"About image {place}: {task.question}"
        found.append(replace(task, images=images, question=question))
    return found


def action_mask(rows: Sequence[CreditRow]) -> list[Floats]:
    """Advantages with 0 at turns with a call that failed by the policy's fault, or was malformed.

    Its tokens stay in the counts that a loss is divided by.
    """
    found = []
    for row in rows:
        advantages = unchanged(row)
        failed = [
            step.turn
            for step in row.steps
            if any(call.status == "model_error" or not call.valid for call in step.calls)
        ]
        advantages[np.array(failed, dtype=np.int64)] = 0.0
        found.append(advantages)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryMask:
    """Leaves attempts out of loss and baseline; `process/left_out/<word>` counts them."""

    unfinished: bool = True
    """No answer before the last turn or token."""
    all_failed: bool = True
    """Calls, none of which was answered."""

    def __call__(
        self, trajectories: Sequence[Trajectory], policy: PolicyAccess
    ) -> list[Trajectory]:
        """The trajectories, some of them left out."""
        return [
            replace(t, unscored=reason)
            if not t.failed_outside_policy and (reason := self._reason(t))
            else t
            for t in trajectories
        ]

    def _reason(self, trajectory: Trajectory) -> str | None:
        if self.unfinished and trajectory.stop is not StopReason.ANSWER:
            return "unfinished"
        has_calls = any(turn.calls for turn in trajectory.turns)
        if self.all_failed and has_calls and not used_a_tool(trajectory):
            return "all_failed"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolGain:
    """Right attempts that used a tool earn weight * `tool_gain` of their question, at their end."""

    weight: float = 0.5

    def __call__(
        self, trajectories: Sequence[Trajectory], policy: PolicyAccess
    ) -> list[Trajectory]:
        """The trajectories, some of them with more reward."""
        groups: dict[str, list[Trajectory]] = defaultdict(list)
        for trajectory in trajectories:
            if not trajectory.failed_outside_policy:
                groups[trajectory.task.id].append(trajectory)
        gains = {name: self.weight * tool_gain(group) for name, group in groups.items()}
        return [
            self._rewarded(t, gains[t.task.id]) if not t.failed_outside_policy else t
            for t in trajectories
        ]

    def _rewarded(self, trajectory: Trajectory, gain: float) -> Trajectory:
        earned = gain * trajectory.scored().accuracy if used_a_tool(trajectory) else 0.0
        turns = [0.0] * (len(trajectory.turns) - 1) + [earned]
        return earning(trajectory, turns, part="tool_gain")


def tool_gain(group: Sequence[Trajectory]) -> float:
    """max(0, mean correctness of attempts that used a tool - that of those that did not).

    0 where one kind is missing: then nothing says that tools help.
    """
    by_use: dict[bool, list[float]] = {True: [], False: []}
    for trajectory in group:
        by_use[used_a_tool(trajectory)].append(trajectory.scored().accuracy)
    if not all(by_use.values()):
        return 0.0
    return max(0.0, fmean(by_use[True]) - fmean(by_use[False]))


def used_a_tool(trajectory: Trajectory) -> bool:
    """Whether a call was answered."""
    return any(call.outcome is Outcome.OK for turn in trajectory.turns for call in turn.calls)
