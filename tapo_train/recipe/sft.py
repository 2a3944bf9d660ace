"""The supervised warm start."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from tapo_train.recipe.values import STRICT, Count, CountOrZero


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Sft:
    """The supervised warm start (`sft` subcommand); optimizer settings are `learner`'s."""

    demonstrations: tuple[str, ...] = ()
    """Files that `collect` wrote, imitated for able_updates; worlds, drills, habits are then left
    out."""
    world: Literal["houses", "chains", "lookups"] = "houses"
    """The demo's world, demonstrated poorly in habit; or chains of one to five text searches
    without pictures, demonstrated by someone who searches well and then guesses; or one search
    each, by someone who guesses half of the time."""
    worlds: Count = 8
    """Worlds demonstrated in, of the seeds first_world_seed, first_world_seed + 1, …"""
    first_world_seed: CountOrZero = 1000
    """Keep it away from the seeds of worlds used for training and evaluation."""
    questions_per_world: Count = 2000
    """Each is demonstrated once without and once with faults."""
    drills: tuple[tuple[Count, Count], ...] = ((1, 150), (2, 600), (4, 500), (6, 300))
    """Stages of copying drills: [names in the list, updates]; the lists should grow. []: none,
    for a model that can copy."""
    able_updates: CountOrZero = 4500
    """Updates on faultless demonstrations, which come first."""
    habit_updates: CountOrZero = 700
    """Updates on faulty ones, which set the habits training starts from."""
    trajectories_per_update: Count = 8
    """Demonstrations in one update, over all ranks."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights that are written at the end."""
