"""From a recipe to the parts of a run: numbers of the loop."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path


from tapo_train.algos import importance, losses
from tapo_train.algos.advantages import batch_renorm, group_advantages
from tapo_train.config import Recipe
from tapo_train.credit.assigners import CreditAssigner, NoTransfer, Tapo
from tapo_train.credit.gigpo import GiGPO
from tapo_train.errors import ConfigError
from tapo_train.learner import distributed
from tapo_train.learner.objective import Objective, policy_gradient
from tapo_train.learner.policy import Policy
from tapo_train.learner.settings import LearnerSettings
from tapo_train.build.device import DEVICE
from tapo_train.build.algo import is_recomputed_in_passing
from tapo_train.parts import AdvantageFunction, Floats, Play, Schedule
from tapo_train.recipe import Advantage, GigpoCredit, GrpoLoss, GspoLoss, NoCredit
from tapo_train.rewards.reward import RewardFunction
from tapo_train.rollout.agent import Limits
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import Engine, Sampling
from tapo_train.tools.base import Tool, Toolbox
from tapo_train.tools.crop import ZoomTool
from tapo_train.tools.image_search import ImageIndex, ImageSearchTool
from tapo_train.tools.images import ImageDecoder
from tapo_train.tools.text_search import CorpusIndex, TextSearchTool
from tapo_train.types import Group, Task


def build_schedule(recipe: Recipe) -> Schedule:
    """Numbers of the loop."""
    return Schedule(
        steps=recipe.run.steps,
        questions_per_step=recipe.data.questions_per_step,
        rollouts_per_question=recipe.rollout.rollouts_per_question,
        updates_per_batch=recipe.learner.updates_per_batch,
        epochs=recipe.learner.epochs,
        micro_batch_tokens=recipe.learner.micro_batch_tokens,
        recompute_old_logprobs=(
            recipe.learner.old_logprobs == "recompute" and not is_recomputed_in_passing(recipe)
        ),
        drop_uniform_groups=recipe.algo.advantage.drop_uniform_groups,
        aggregation=recipe.algo.aggregation,
        norm_length=float(recipe.rollout.max_tokens),
        save_every=recipe.run.save_every,
        eval_every=recipe.run.eval_every,
        probe_tolerance=recipe.probe.tolerance,
    )
