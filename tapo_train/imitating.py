"""`sft`: the supervised warm start, on scripted demonstrations or on those that `collect` wrote."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tapo_train import build
from tapo_train.demo.warm_start import (
    WORLD_KINDS,
    Progress,
    WarmStart,
    copying_drill,
    record_world,
    warm_start,
)
from tapo_train.errors import DataError
from tapo_train.learner import distributed
from tapo_train.learner.batch import TrainingRow
from tapo_train.learner.convert import convert_weights
from tapo_train.recipe.compose import Recipe
from tapo_train.report.run_folder import RunFolder
from tapo_train.report.sinks import duration
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.demonstrations import read_demonstrations
from tapo_train.runs import export

__all__ = ["sft"]


def sft(recipe: Recipe) -> Path:
    """Warm-start `model.path` on demonstrations; the exported policy's folder."""
    distributed.init(device=build.DEVICE)
    folder = RunFolder(recipe.run.dir)
    chat = build.build_chat(recipe)
    is_collected = bool(recipe.sft.demonstrations)
    settings = WarmStart(
        drills=() if is_collected else recipe.sft.drills,
        able_updates=recipe.sft.able_updates,
        habit_updates=0 if is_collected else recipe.sft.habit_updates,
        trajectories_per_update=recipe.sft.trajectories_per_update,
        micro_batch_tokens=build.packed_tokens(recipe, chat.family),
    )
    able, habit = (
        (collected_demonstrations(recipe, chat), list[TrainingRow]())
        if is_collected
        else record_demonstrations(recipe, chat, folder)
    )
    policy = build.build_policy(recipe, chat, updates=settings.updates)
    warm_start(
        policy,
        drill=partial(copying_drill, chat, syllables=WORLD_KINDS[recipe.sft.world].syllables),
        able=able,
        habit=habit,
        settings=settings,
        seed=recipe.run.seed,
        report=_show,
    )
    export(recipe, policy, folder.export)
    if distributed.rank() == 0 and recipe.sft.export_dtype != recipe.model.dtype:
        convert_weights(folder.export, dtype=recipe.sft.export_dtype)
    policy.close()
    return folder.export


def collected_demonstrations(recipe: Recipe, chat: ChatFormat) -> list[TrainingRow]:
    """The rows of the files that the recipe names.

    Raises:
        DataError: there are fewer than an update takes, or one is longer than a micro-batch.
    """
    paths = recipe.sft.demonstrations
    rows = [row for path in paths for row in read_demonstrations(Path(path), chat)]
    if len(rows) < recipe.sft.trajectories_per_update:
        raise DataError(
            f"sft.demonstrations: found {len(rows)}, wanted at least "
            f"sft.trajectories_per_update = {recipe.sft.trajectories_per_update}"
        )
    return rows


def record_demonstrations(
    recipe: Recipe, chat: ChatFormat, folder: RunFolder
) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """(faultless, faulty) demonstrations in the worlds of `sft`."""
    able: list[TrainingRow] = []
    habit: list[TrainingRow] = []
    for number in range(recipe.sft.worlds):
        seed = recipe.sft.first_world_seed + number
        if distributed.rank() == 0:
            print(f"demonstrating in world {seed} ({number + 1}/{recipe.sft.worlds})", flush=True)
        faultless, faulty = record_world(
            folder.path / "worlds" / f"{seed}.rank{distributed.rank()}",
            seed=seed,
            questions=recipe.sft.questions_per_world,
            chat=chat,
            toolbox=lambda world: build.build_toolbox(recipe, world=world, decoder=chat.decoder),
            system_prompt=recipe.data.system_prompt,
            kind=WORLD_KINDS[recipe.sft.world],
        )
        able += faultless
        habit += faulty
    return able, habit


def _show(progress: Progress) -> None:
    """A line for every hundredth update, on rank 0; every tenth part of a short warm start."""
    every = min(100, max(1, progress.total // 10))
    if distributed.rank() == 0 and (
        progress.update % every == 0 or progress.update == progress.total
    ):
        left = (progress.total - progress.update) * progress.seconds
        print(
            f"update {progress.update}/{progress.total}  nll {progress.nll:.4f}  "
            f"{progress.tokens_per_s:.0f} tokens/s  {duration(left)} left",
            flush=True,
        )
