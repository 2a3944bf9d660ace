"""`collect`: attempts that succeeded, as demonstrations (rejection sampling).

Kept are attempts that are right and of the agreed form, one of each course (calls and answer), the
shortest first. They are written as their questions end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tapo_train import build
from tapo_train.data.native import keep_picture
from tapo_train.data.sampler import shard
from tapo_train.data.sealed import require_open
from tapo_train.learner import distributed
from tapo_train.recipe.compose import Recipe
from tapo_train.rewards.format import is_well_formed
from tapo_train.rollout.demonstrations import course_of, demonstration_of
from tapo_train.types import Group, JsonObject, Task, Trajectory

__all__ = ["Collected", "collect_demonstrations", "successes"]

CHUNK = 16
"""Questions that are played and then written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What came of it, over all ranks."""

    questions: int
    attempts: int
    kept: int
    answered: int
    """Questions with at least one demonstration."""

    def __str__(self) -> str:
        return (
            f"{self.kept} demonstrations of {self.answered} questions, out of {self.attempts} "
            f"attempts at {self.questions}"
        )


def successes(group: Group, *, most: int) -> list[Trajectory]:
    """The attempts of a question that are worth imitating, at most so many."""
    right = [
        trajectory
        for trajectory in group.trajectories
        if not trajectory.failed_outside_policy
        and trajectory.scored().accuracy == 1.0
        and is_well_formed(trajectory)
    ]
    kept: dict[tuple[str, ...], Trajectory] = {}
    for trajectory in sorted(right, key=lambda held: (len(held.turns), len(held.tokens), held.id)):
        kept.setdefault(course_of(trajectory), trajectory)
    return list(kept.values())[:most]


def collect_demonstrations(
    recipe: Recipe, *, out: Path, rollouts: int, per_question: int, num_questions: int = 0
) -> Collected:
    """Play the training questions of a recipe and write what succeeded.

    Args:
        rollouts: attempts at each question.
        per_question: most demonstrations of one.
        num_questions: only the first ones; 0: all.

    Raises:
        DataError: a question is of a benchmark whose texts are not written plain.
    """
    build.require_custom_parts(recipe)
    tasks = build.chosen_tasks(recipe, build.read_tasks(recipe.data.train, recipe))
    tasks = tasks[: num_questions or None]
    require_open(tasks, doing="copy of attempts")
    out.parent.mkdir(parents=True, exist_ok=True)
    chat = build.build_chat(recipe)
    with ExitStack() as ending:
        toolbox = ending.enter_context(closing(build.build_toolbox(recipe, decoder=chat.decoder)))
        tasks = build.playable_tasks(recipe, tasks, chat, toolbox)
        engine = ending.enter_context(closing(build.build_engine(recipe, chat)))
        score = build.build_scoring(recipe, toolbox, ending)
        play = build.build_play(recipe, engine, chat, toolbox, score)
        described = partial(
            demonstration_of,
            system_prompt=recipe.data.system_prompt,
            schemas=toolbox.schemas(),
            keep=partial(keep_picture, parent=out.parent, folder="images"),
        )

        def ask(own: Sequence[Task]) -> tuple[list[JsonObject], Collected]:
            groups = play(own, rollouts=rollouts, greedy=False, policy_version=0)
            kept = [successes(group, most=per_question) for group in groups]
            rows = [described(trajectory) for held in kept for trajectory in held]
            attempts = sum(len(group.trajectories) for group in groups)
            answered = sum(map(bool, kept))
            return rows, Collected(
                questions=len(own), attempts=attempts, kept=len(rows), answered=answered
            )

        return _written(tasks, ask, out)


def _written(
    tasks: Sequence[Task],
    ask: Callable[[Sequence[Task]], tuple[list[JsonObject], Collected]],
    out: Path,
) -> Collected:
    """Ask a few questions at a time, each rank its share; rank 0 writes."""
    rank, ranks = distributed.rank(), distributed.world_size()
    total = Collected(questions=0, attempts=0, kept=0, answered=0)
    partial_out = out.with_name(f"{out.name}.rank_{rank}.partial")
    with partial_out.open("w", encoding="utf-8") as lines:
        for start in range(0, len(tasks), CHUNK * ranks):
            own = shard(tasks[start : start + CHUNK * ranks], rank, ranks)
            for rows, found in distributed.all_gather_objects(ask(own)):
                total = _added(total, found)
                lines.writelines(_line(row) for row in rows)
    if rank == 0:
        partial_out.replace(out)
    else:
        partial_out.unlink()
    return total


def _line(row: JsonObject) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _added(left: Collected, right: Collected) -> Collected:
    return Collected(
        questions=left.questions + right.questions,
        attempts=left.attempts + right.attempts,
        kept=left.kept + right.kept,
        answered=left.answered + right.answered,
    )
