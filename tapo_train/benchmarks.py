"""`eval` on benchmarks: every question several times, attempts kept as they end, tables at the end.

The attempts of a few questions at a time are played and written, so that memory does not grow with
a benchmark and a killed evaluation goes on where it was. What failed outside the policy is asked
again by the next call.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from tapo_train import build
from tapo_train.data.sampler import shard
from tapo_train.data.sealed import require_open
from tapo_train.data.tasks import fingerprint
from tapo_train.evaluation.attempt import Attempt, attempt_of, require_enough
from tapo_train.evaluation.attempts_file import AttemptsFile
from tapo_train.evaluation.manifest import describe_judges, describe_searches
from tapo_train.evaluation.tables import accuracies, draw, markdown, summary
from tapo_train.learner import distributed
from tapo_train.recipe import RewardSettings
from tapo_train.recipe.compose import Recipe, to_yaml
from tapo_train.report.dumps import write_trajectories
from tapo_train.report.files import write_atomically
from tapo_train.report.manifest import describe_model, describe_process
from tapo_train.tools.addresses import shown
from tapo_train.tools.toolbox import Toolbox
from tapo_train.training.parts import Play
from tapo_train.types import Task, Trajectory

__all__ = ["Benchmark", "evaluate_benchmarks", "evaluate_tasks", "outside_player"]

transformers_logging.disable_progress_bar()

CHUNK = 64
"""Attempts that are played and then written."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A task file and what its table is called."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Player:
    """What answers the questions."""

    play: Play
    playable: Callable[[Sequence[Task]], list[Task]]
    described: Mapping[str, Any]
    placeholder: int | None = None
    """Token of a picture, if it says what its tokens are."""


MakePlayer = Callable[[Recipe, Toolbox, ExitStack], Player]


def local_player(recipe: Recipe, toolbox: Toolbox, ending: ExitStack) -> Player:
    """The recipe's model on the recipe's engine."""
    chat = build.build_chat(recipe)
    engine = ending.enter_context(closing(build.build_engine(recipe, chat)))
    score = build.build_scoring(recipe, toolbox, ending)
    return Player(
        play=build.build_play(recipe, engine, chat, toolbox, score),
        playable=lambda tasks: build.playable_tasks(recipe, tasks, chat, toolbox),
        described=describe_model(recipe.model.path),
        placeholder=chat.image_token_id,
    )


def outside_player(endpoint: build.Endpoint) -> MakePlayer:
    """A model that somebody serves, with the recipe's prompt, tools and limits."""

    def make(recipe: Recipe, toolbox: Toolbox, ending: ExitStack) -> Player:
        score = build.build_scoring(recipe, toolbox, ending)
        return Player(
            play=build.build_outside_play(recipe, endpoint, toolbox, score, ending),
            playable=list,
            described={"endpoint": shown(endpoint.url), "model": endpoint.model},
        )

    return make


def evaluate_benchmarks(
    recipe: Recipe,
    benchmarks: Sequence[Benchmark],
    *,
    out: Path,
    repeats: int = 1,
    num_questions: int = 0,
    make_player: MakePlayer = local_player,
) -> str:
    """Ask, write the tables into `out`, and give them as Markdown.

    Args:
        repeats: attempts at each question; one is greedy, several are sampled.
        num_questions: only the first of each benchmark; 0: all.

    Raises:
        OutageError: too many attempts failed outside the policy. Those that did not are kept.
        ConfigError: `out` holds attempts that were asked for otherwise.
    """
    with ExitStack() as ending:
        asked, toolbox = _prepared(recipe, benchmarks, repeats, num_questions, make_player, ending)
        file = AttemptsFile(out, asked=asked.described(), rank=distributed.rank())
        for name, tasks in asked.questions.items():
            own = shard(tasks, distributed.rank(), distributed.world_size())
            held = {
                (one.task, one.repeat)
                for one in file.held()
                if one.benchmark == name and not one.failed
            }
            for written, _ in _played(asked, name, own, held):
                file.append(written)
        distributed.barrier()
        wanted = {(name, task.id) for name, tasks in asked.questions.items() for task in tasks}
        attempts = [one for one in file.held() if (one.benchmark, one.task) in wanted]
        _require_enough(recipe, attempts)
        return _write(out, asked, attempts, describe_searches(recipe, toolbox, attempts))


def evaluate_tasks(
    recipe: Recipe, tasks: Path, *, num_questions: int = 0, dump: Path | None = None
) -> str:
    """Ask one file's questions once, greedily, and say how many were right; nothing is resumed.

    Args:
        num_questions: only the first ones; 0: all.
        dump: where the trajectories go (jsonl).

    Raises:
        OutageError: too many attempts failed outside the policy.
        DataError: its authors want no dump of the file.
    """
    benchmark = Benchmark(tasks.name, tasks)
    with ExitStack() as ending:
        asked, _ = _prepared(recipe, [benchmark], 1, num_questions, local_player, ending)
        questions = asked.questions[benchmark.name]
        if dump is not None:
            require_open(questions, doing="dump of attempts")
        played = _played(asked, benchmark.name, questions, frozenset(), chunk=len(questions) or 1)
        attempts, trajectories = next(played, ([], []))
        if dump is not None:
            write_trajectories(dump, trajectories, placeholder=asked.player.placeholder)
        _require_enough(recipe, attempts)
        return accuracies(attempts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What is asked, and of whom."""

    recipe: Recipe
    player: Player
    repeats: int
    questions: Mapping[str, Sequence[Task]]

    def described(self) -> dict[str, Any]:
        """What makes attempts comparable."""
        return {
            "policy": self.player.described,
            "recipe": hashlib.sha256(to_yaml(self.recipe).encode()).hexdigest(),
            "repeats": self.repeats,
            "questions": {name: fingerprint(tasks) for name, tasks in self.questions.items()},
        }

    def manifest(self) -> dict[str, Any]:
        """What a table depends on, beside the searches."""
        temperature = self.recipe.rollout.temperature
        return {
            **describe_process(),
            **self.described(),
            "sampling": "greedy" if self.repeats == 1 else f"temperature {temperature:g}",
            "seed": self.recipe.run.seed,
            "judges": describe_judges(self.recipe),
            "n": {name: len(tasks) for name, tasks in self.questions.items()},
        }


def _whole_groups(recipe: Recipe) -> Recipe:
    """What training leaves out to save time, an evaluation waits for."""
    deadlines = replace(recipe.rollout.deadlines, step_s=None)
    rollout = replace(recipe.rollout, oversample=1.0, deadlines=deadlines)
    return replace(recipe, rollout=rollout)


def _prepared(
    recipe: Recipe,
    benchmarks: Sequence[Benchmark],
    repeats: int,
    num_questions: int,
    make_player: MakePlayer,
    ending: ExitStack,
) -> tuple[_Asked, Toolbox]:
    """Player and questions; what has to be closed is entered into `ending`."""
    build.require_custom_parts(recipe)
    recipe = _whole_groups(recipe)
    toolbox = ending.enter_context(closing(build.build_toolbox(recipe)))
    player = make_player(recipe, toolbox, ending)
    questions = {
        one.name: player.playable(
            build.read_tasks([str(one.path)], recipe)[: num_questions or None]
        )
        for one in benchmarks
    }
    return _Asked(recipe=recipe, player=player, repeats=repeats, questions=questions), toolbox


def _played(
    asked: _Asked,
    name: str,
    tasks: Sequence[Task],
    held: Set[tuple[str, int]],
    *,
    chunk: int = CHUNK,
) -> Iterator[tuple[list[Attempt], list[Trajectory]]]:
    """Play what is not among the `held` tasks and repeats, a few questions at a time."""
    repeats, limits = asked.repeats, asked.recipe.tools.limits
    prices = {tool: chosen.price for tool, chosen in limits.items()}
    size = max(1, chunk // repeats)
    for start in range(0, len(tasks), size):
        # By place in the file, so that a chunk holds the same questions when it is played again.
        missing = [
            task
            for task in tasks[start : start + size]
            if any((task.id, repeat) not in held for repeat in range(repeats))
        ]
        if not missing:
            continue
        groups = asked.player.play(missing, rollouts=repeats, greedy=repeats == 1, policy_version=0)
        rows = [(n, t) for group in groups for n, t in enumerate(group.trajectories)]
        attempts = [attempt_of(t, benchmark=name, repeat=n, prices=prices) for n, t in rows]
        yield attempts, [trajectory for _, trajectory in rows]


def _require_enough(recipe: Recipe, attempts: Sequence[Attempt]) -> None:
    require_enough(
        attempts,
        max_failed_fraction=recipe.rollout.max_failed_fraction,
        min_scored=recipe.reward.min_scored,
    )


def _judged_by(reward: RewardSettings) -> str:
    """Kinds of the parts that are the accuracy."""
    parts = [reward.parts, *reward.by_source.values()]
    kinds = {part.name for own in parts if (part := own.get("accuracy")) is not None}
    return " or ".join(sorted(kinds))


def _write(
    out: Path, asked: _Asked, attempts: Sequence[Attempt], searches: Mapping[str, Any]
) -> str:
    """The tables in three forms; the one to read."""
    judged_by = _judged_by(asked.recipe.reward)
    tables = summary(attempts, repeats=asked.repeats, judged_by=judged_by)
    manifest = {**asked.manifest(), **searches}
    text = markdown(tables, manifest)
    if distributed.rank() == 0:
        ids = {name: [task.id for task in tasks] for name, tasks in asked.questions.items()}
        results = {"tables": tables, "manifest": manifest, "subset ids": ids}
        write_atomically(out / "results.json", json.dumps(results, indent=1, allow_nan=False))
        write_atomically(out / "results.md", text)
        draw(tables, out / "results.png")
    return text
