"""From a recipe to the parts of a run: how long a trajectory, how far engine and learner apart."""

from __future__ import annotations

from tapo_train.families import Family
from tapo_train.recipe.compose import Recipe
from tapo_train.rollout.limits import Limits

PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
"""[nat] by number type: a hundred times what float32 shows, twice the most of a demo in bf16."""


def limits_of(recipe: Recipe) -> Limits:
    """How long a trajectory may become."""
    rollout = recipe.rollout
    return Limits(
        max_turns=rollout.max_turns,
        max_turn_tokens=rollout.max_turn_tokens,
        max_tokens=rollout.max_tokens,
        max_parallel_calls=rollout.max_parallel_calls,
    )


def packed_tokens(recipe: Recipe, family: Family) -> int:
    """[tokens] of a micro-batch; 1, so that each row goes alone, where rows cannot be packed."""
    return recipe.learner.micro_batch_tokens if family.packs else 1


def probe_tolerance(recipe: Recipe) -> float:
    """[nat] the recipe's, or that of its number type."""
    return recipe.probe.tolerance or PROBE_TOLERANCE[recipe.model.dtype]
