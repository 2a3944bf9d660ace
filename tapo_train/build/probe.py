"""From a recipe to the parts of a run: what engine and learner are compared by."""

from __future__ import annotations

from dataclasses import replace

from tapo_train.build.limits import limits_of, probe_tolerance
from tapo_train.build.rollout import build_play
from tapo_train.learner import distributed
from tapo_train.recipe.compose import Recipe
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.driver import EngineDriver
from tapo_train.rollout.engine import Engine
from tapo_train.tools.toolbox import Toolbox
from tapo_train.training.probe import Probe, Turn
from tapo_train.types import Task, Trajectory

MOST_TOKENS = 256
"""[tokens] of the turn: enough to judge by, and soon scored."""


def build_probe(
    recipe: Recipe,
    engine: Engine,
    chat: ChatFormat,
    toolbox: Toolbox,
    task: Task,
    driver: EngineDriver | None = None,
) -> Probe:
    """The first turn of `task`, most probable token by token; its calls are not run."""
    own = limits_of(recipe)
    limits = replace(own, max_turns=1, max_turn_tokens=min(own.max_turn_tokens, MOST_TOKENS))
    play = build_play(recipe, engine, chat, toolbox, _unscored, limits=limits, driver=driver)

    def first_turn() -> Turn:
        # One rank asks and all compare the same, so that ranks may share an engine.
        asked = [task] if distributed.rank() == 0 else []
        groups = play(asked, rollouts=1, greedy=True, policy_version=0)
        turn: Turn = distributed.broadcast_object(
            next((_turn(group.trajectories[0]) for group in groups), None)
        )
        return turn

    return Probe(first_turn, unsampled=chat.banned_token_ids, tolerance=probe_tolerance(recipe))


async def _unscored(trajectory: Trajectory) -> Trajectory:
    return trajectory


def _turn(played: Trajectory) -> Turn:
    return Turn(tokens=played.tokens, images=played.images, sampled_from=played.turns[0].span.start)
