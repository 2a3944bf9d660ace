"""From a recipe to the parts of a run: reward, advantage, credit and loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tapo_train import recipe as recipes
from tapo_train.algos import importance, losses
from tapo_train.algos.advantages import batch_renorm, group_advantages
from tapo_train.credit.assigners import CreditAssigner, NoTransfer, Tapo
from tapo_train.credit.gigpo import GiGPO
from tapo_train.learner.objective import Objective, policy_gradient
from tapo_train.recipe import Advantage, GigpoCredit, GrpoLoss, GspoLoss, NoCredit
from tapo_train.recipe.compose import Recipe
from tapo_train.rewards.reward import RewardFunction
from tapo_train.training.parts import AdvantageFunction, Floats


def build_reward(recipe: Recipe) -> RewardFunction:
    """Correctness and form with the recipe's weights."""
    return RewardFunction(
        accuracy_weight=recipe.reward.accuracy_weight, format_weight=recipe.reward.format_weight
    )


def build_advantage(settings: Advantage) -> AdvantageFunction:
    """Rewards to advantages as the recipe says."""

    def advantage(rewards: Floats, group: Sequence[str], leave_out: Sequence[bool]) -> Floats:
        values = group_advantages(
            rewards, group, kind=settings.kind, std=settings.std, leave_out=leave_out
        )
        return batch_renorm(values, leave_out=leave_out) if settings.batch_renorm else values

    return advantage


def build_credit(recipe: Recipe) -> CreditAssigner:
    """The credit stage."""
    credit = recipe.credit
    if isinstance(credit, NoCredit):
        return NoTransfer()
    if isinstance(credit, GigpoCredit):
        return GiGPO(credit)
    return Tapo(credit)


def build_objective(recipe: Recipe) -> Objective:
    """Surrogate, importance correction, KL penalty and entropy bonus."""
    algo, loss = recipe.algo, recipe.algo.loss
    surrogate: losses.PolicyLoss
    if isinstance(loss, GrpoLoss):
        surrogate = partial(
            losses.grpo, clip_low=loss.clip_low, clip_high=loss.clip_high, dual_clip=loss.dual_clip
        )
    elif isinstance(loss, GspoLoss):
        surrogate = partial(losses.gspo, clip_low=loss.clip_low, clip_high=loss.clip_high)
    else:
        surrogate = partial(losses.sapo, tau_pos=loss.tau_pos, tau_neg=loss.tau_neg)
    return policy_gradient(
        surrogate,
        correction=build_correction(algo.importance),
        kl_kind=algo.kl.estimator,
        kl_coefficient=algo.kl.coef,
        entropy_coefficient=algo.entropy_coef,
        is_only_update=is_recomputed_in_passing(recipe),
        proximal=(
            importance.log_linear_proximal if recipe.learner.old_logprobs == "log_linear" else None
        ),
    )


def is_recomputed_in_passing(recipe: Recipe) -> bool:
    """Whether old log-probabilities are those of the update's own forward pass.

    With one update per batch the policy has not moved yet, so a pass of its own would
    compute the same numbers again.
    """
    learner = recipe.learner
    is_single = learner.updates_per_batch * learner.epochs == 1
    return is_single and learner.old_logprobs == "recompute"


def build_correction(settings: recipes.ImportanceChoice) -> importance.Correction:
    """The importance correction between sampler and learner."""
    match settings:
        case recipes.TruncatedImportance():
            return partial(importance.truncate, level=settings.level, high=settings.high)
        case recipes.MaskedImportance():
            return partial(
                importance.mask, level=settings.level, low=settings.low, high=settings.high
            )
        case recipes.GeometricImportance():
            return partial(
                importance.geometric_mask,
                low=settings.low,
                high=settings.high,
                cap=settings.cap,
            )
        case recipes.TotalVariationImportance():
            return partial(importance.total_variation_mask, delta=settings.delta)
        case recipes.NoImportance():
            return importance.uncorrected
