"""VITAL (arXiv 2508.04416): thinking with videos, whose frames a tool samples on demand.

    data.loader: {path: tapo_train.systems.vital:video_tasks, arguments: {frames: 4}}
    tools.extra: [{path: tapo_train.systems.vital:FrameSamplingTool, arguments: {videos: DIR}}]
    reward.parts.accuracy: {name: custom, path: tapo_train.systems.vital:temporal_iou}
    algo.advantage.custom: {path: tapo_train.systems.vital:difficulty_aware}

A task names its video in the field `clip`, a path below the task file's folder, and is shown some
frames of it, evenly spaced, with their times. Accepted answers of grounding tasks are intervals,
"2.5-4.0" in seconds. Videos are decoded in the sandbox (extra `video`). The weight of DGRPO is our
reading: the paper scales by the difficulty of task and sample.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tapo_train.algos.advantages import Floats, group_advantages
from tapo_train.algos.turn_advantages import RewardRow
from tapo_train.data.images import resolve_inside
from tapo_train.data.tasks import load_tasks
from tapo_train.errors import DataError, ToolArgumentError, ToolError, ToolRefusedError
from tapo_train.tools.base import ToolContext
from tapo_train.tools.images import number
from tapo_train.tools.sandbox import Sandbox
from tapo_train.types import Image, Observation, Task, Trajectory

__all__ = [
    "FrameSamplingTool",
    "difficulty_aware",
    "interval_of",
    "overlap",
    "temporal_iou",
    "video_tasks",
]

LONGEST_PX = 448
_NUMBERS = re.compile(r"\d+(?:\.\d+)?")

Seconds = Annotated[float, BeforeValidator(number)]


def video_tasks(path: Path, *, frames: int = 8, longest_px: int = LONGEST_PX) -> list[Task]:
    """The tasks of a native file with `frames` frames of their video as pictures.

    Raises:
        DataError: a task names no video below the file's folder, or it cannot be read.
    """
    sandbox = Sandbox()
    try:
        tasks = load_tasks(path)
        return [_with_frames(task, path.parent, sandbox, frames, longest_px) for task in tasks]
    finally:
        sandbox.close()


def _with_frames(task: Task, root: Path, sandbox: Sandbox, frames: int, longest_px: int) -> Task:
    video = resolve_inside([root], str(task.metadata.get("clip", "")), where=task.id)
    try:
        duration, _ = sandbox.frames(video, [0.0], longest_px=longest_px)
        times = spaced(0.0, duration, frames)
        _, found = sandbox.frames(video, times, longest_px=longest_px)
    except ToolRefusedError as error:
        raise DataError(f"task {task.id}: {video}: {error}") from error
    text = f"{_shown(found)} of a video of {duration:.1f} s. {task.question}"
    return replace(task, images=tuple(image for _, image in found), question=text)


class FrameArguments(BaseModel):
    """Arguments of frame_sampling_tool."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    start_s: Annotated[Seconds, Field(description="from this second", ge=0)]
    end_s: Annotated[Seconds, Field(description="to this second", ge=0)]
    count: Annotated[int, BeforeValidator(number), Field(description="frames, 1 to 8", ge=1, le=8)]


class FrameSamplingTool:
    """Show further frames of the question's video.

    Args:
        videos: the folder that tasks name their video in.
    """

    name = "frame_sampling_tool"
    description = "Look at frames of the video between two times."
    reads: frozenset[str] = frozenset({"task"})
    arguments_model: type[BaseModel] = FrameArguments

    def __init__(self, videos: str, longest_px: int = LONGEST_PX) -> None:
        self._videos, self._longest_px = Path(videos), longest_px
        self._sandbox = Sandbox()
        self.version = f"1 longest_px={longest_px}"

    async def run(self, arguments: FrameArguments, context: ToolContext) -> Observation:
        """Frames, evenly spaced, with their times.

        Raises:
            ToolArgumentError: it ends before it begins.
            ToolError: the task has no video.
            ToolRefusedError: the video cannot be read.
        """
        if arguments.end_s < arguments.start_s:
            raise ToolArgumentError(f"{self.name}: start_s <= end_s is required")
        try:
            name = str(context.task.metadata.get("clip", ""))
            video = resolve_inside([self._videos], name, where=context.task.id)
        except DataError as error:
            raise ToolError(f"{self.name}: {error}") from error
        times = spaced(arguments.start_s, arguments.end_s, arguments.count)
        _, found = await asyncio.to_thread(
            self._sandbox.frames, video, times, longest_px=self._longest_px
        )
        return Observation(text=f"{_shown(found)}:", images=tuple(image for _, image in found))

    def close(self) -> None:
        """End the sandbox's processes."""
        self._sandbox.close()


def spaced(start_s: float, end_s: float, count: int) -> list[float]:
    """`count` times in the middle of as many equal parts of the interval."""
    part = (end_s - start_s) / count
    return [start_s + part * (index + 0.5) for index in range(count)]


def temporal_iou(trajectory: Trajectory) -> float:
    """Best intersection over union of the answer's interval and an accepted one, in [0, 1]."""
    said = interval_of(trajectory.answer or "")
    accepted = [interval_of(answer) for answer in trajectory.task.answers]
    return max((overlap(said, wanted) for wanted in accepted if said and wanted), default=0.0)


def interval_of(text: str) -> tuple[float, float] | None:
    """The two numbers of a text, in order of size [s]; None if there are not two."""
    numbers = [float(found) for found in _NUMBERS.findall(text)]
    return (min(numbers), max(numbers)) if len(numbers) == 2 else None


def overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Length of what two intervals share over that of what either covers; equal points give 1."""
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    covered = (a[1] - a[0]) + (b[1] - b[0]) - shared
    return shared / covered if covered > 0 else float(a == b)


def difficulty_aware(
    rows: Sequence[RewardRow], *, strength: float = 1.0, best: float = 1.0
) -> list[float]:
    """GRPO's advantages, times a weight by the difficulty of the question: hard ones count more.

        w_g = 1 + strength * (1 - mean_g / best), divided by the mean of all w_g

    over the questions of the batch, so that the weights only move effort between questions.

    Args:
        best: the largest total reward; mean_g / best is held in [0, 1].
    """
    totals: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if not row.left_out:
            totals[row.group].append(row.total)
    ease = {group: float(np.clip(np.mean(own) / best, 0, 1)) for group, own in totals.items()}
    weights = {group: 1 + strength * (1 - share) for group, share in ease.items()}
    mean = float(np.mean([*weights.values()])) if weights else 1.0
    advantages: Floats = group_advantages(
        [row.total for row in rows],
        [row.group for row in rows],
        leave_out=[row.left_out for row in rows],
    )
    return [
        float(advantage) * weights.get(row.group, 0.0) / mean
        for row, advantage in zip(rows, advantages, strict=True)
    ]


def _shown(found: Sequence[tuple[float, Image]]) -> str:
    return "Frames at " + ", ".join(f"{time_s:.1f}" for time_s, _ in found) + " s"
