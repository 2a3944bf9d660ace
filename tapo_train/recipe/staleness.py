"""What training on tokens of older weights asks of a recipe."""

from __future__ import annotations

from collections.abc import Iterable

from tapo_train.recipe import Recipe

__all__ = ["cautions", "staleness_problems"]


def staleness_problems(recipe: Recipe) -> Iterable[str]:
    """What does not go together."""
    rollout = recipe.rollout
    if rollout.active_questions is not None:
        yield from _active_problems(recipe, rollout.active_questions)
    if rollout.max_staleness:
        yield from _staleness_problems(recipe)


def cautions(recipe: Recipe) -> list[str]:
    """What may be meant, and is worth a word."""
    staleness, learner = recipe.rollout.max_staleness, recipe.learner
    updates = learner.updates_per_batch * learner.epochs
    if not staleness or updates == 1:
        return []
    return [
        (
            f"rollout.max_staleness is {staleness} and a step makes {updates} updates "
            "(learner.updates_per_batch × epochs): the last of them learns from tokens up to "
            f"{(staleness + 1) * updates - 1} updates old"
        )
    ]


def _active_problems(recipe: Recipe, active: int) -> Iterable[str]:
    per_step = recipe.data.questions_per_step
    most = (recipe.rollout.max_staleness + 1) * per_step
    if not per_step <= active <= most:
        yield (
            f"rollout.active_questions: found {active}, wanted {per_step} to {most}, from "
            "data.questions_per_step to (rollout.max_staleness + 1) times that"
        )


def _staleness_problems(recipe: Recipe) -> Iterable[str]:
    rollout, engine = recipe.rollout, recipe.rollout.engine
    found = f"rollout.max_staleness is {rollout.max_staleness}"
    if rollout.refill_rounds:
        yield (
            f"rollout.refill_rounds: found {rollout.refill_rounds}, wanted 0 because {found}: a "
            "group that is under way cannot be judged"
        )
    if engine.name == "vllm" and engine.tensor_parallel > 1:
        yield (
            f"rollout.max_staleness: found {rollout.max_staleness}, wanted 0 because "
            f"rollout.engine.tensor_parallel is {engine.tensor_parallel}: ranks that share an "
            "engine roll out in lockstep (engine servers do not)"
        )
    if recipe.learner.old_logprobs != "engine" and recipe.algo.importance.name == "none":
        yield (
            f"algo.importance: found none, wanted a correction because {found}: older weights "
            "sampled a part of what is trained (or learner.old_logprobs=engine)"
        )
