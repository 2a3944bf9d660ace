"""From a recipe to the parts of a run: numbers of the loop."""

from __future__ import annotations

from pathlib import Path

from tapo_train.build.algo import is_recomputed_in_passing, skips_idle_rows
from tapo_train.learner import distributed
from tapo_train.recipe.compose import Recipe
from tapo_train.report.dumps import TrajectoryDump
from tapo_train.report.warnings import Watch
from tapo_train.rollout.chat import ChatFormat
from tapo_train.training.parts import Schedule


def build_schedule(recipe: Recipe) -> Schedule:
    """Numbers of the loop."""
    return Schedule(
        steps=recipe.run.steps,
        questions_per_step=recipe.data.questions_per_step,
        rollouts_per_question=recipe.rollout.rollouts_per_question,
        updates_per_batch=recipe.learner.updates_per_batch,
        epochs=recipe.learner.epochs,
        skip_idle_rows=skips_idle_rows(recipe),
        recompute_old_logprobs=(
            recipe.learner.old_logprobs == "recompute" and not is_recomputed_in_passing(recipe)
        ),
        drop_uniform_groups=recipe.algo.advantage.drop_uniform_groups,
        aggregation=recipe.algo.aggregation,
        norm_length=float(recipe.rollout.max_tokens),
        save_every=recipe.run.save_every,
        eval_every=recipe.run.eval_every,
    )


def build_watch(recipe: Recipe) -> Watch:
    """What looks out for collapse."""
    watch = recipe.watch
    return Watch(
        early_steps=watch.early_steps,
        recent_steps=watch.recent_steps,
        stop_on=watch.stop_on,
        stop_after=watch.stop_after,
    )


def build_dump(recipe: Recipe, folder: Path, chat: ChatFormat) -> TrajectoryDump:
    """What this rank writes of its trajectories into the run's folder."""
    return TrajectoryDump(
        folder,
        rank=distributed.rank(),
        decode=lambda tokens: chat.decode(tokens).text,
        placeholder=chat.image_token_id,
        every=recipe.report.dump_every,
        images=recipe.report.dump_images,
    )
