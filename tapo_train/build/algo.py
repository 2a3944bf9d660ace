"""From a recipe to the parts of a run: reward, advantage, credit and loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast, get_args

from tapo_train import recipe as recipes
from tapo_train.algos import importance, losses, weighted
from tapo_train.algos.advantages import AdvantageKind
from tapo_train.algos.turn_advantages import (
    Advantages,
    RewardRow,
    TurnKind,
    advantages_of,
    outcome_advantages,
    renormalised,
    turn_advantages,
)
from tapo_train.build.custom import custom_credit, custom_part
from tapo_train.credit.assigners import CreditAssigner, NoTransfer, Tapo
from tapo_train.credit.controls import Placebo, Shrink
from tapo_train.credit.gigpo import GiGPO
from tapo_train.learner.objective import Objective, policy_gradient
from tapo_train.recipe import (
    Advantage,
    CispoLoss,
    Custom,
    GigpoCredit,
    GmpoLoss,
    GrpoLoss,
    GspoLoss,
    NoCredit,
    PlaceboCredit,
    SapoLoss,
    ShrinkCredit,
)
from tapo_train.recipe.compose import Recipe
from tapo_train.training.credit_over_ranks import OverRanks
from tapo_train.training.parts import AdvantageFunction


def build_advantage(settings: Advantage) -> AdvantageFunction:
    """Rewards to advantages as the recipe says."""

    own = settings.custom

    def advantage(rows: Sequence[RewardRow]) -> Advantages:
        found = compute(rows)
        return renormalised(rows, found) if settings.batch_renorm else found

    compute: AdvantageFunction
    if own is not None:
        call = custom_part(own, where="algo.advantage.custom")
        compute = lambda rows: advantages_of(rows, call(rows))  # noqa: E731
    elif settings.kind in get_args(TurnKind):
        by_turn = cast(TurnKind, settings.kind)
        compute = partial(turn_advantages, kind=by_turn, gamma=settings.gamma, std=settings.std)
    else:
        by_outcome = cast(AdvantageKind, settings.kind)
        compute = partial(outcome_advantages, kind=by_outcome, std=settings.std)
    return advantage


def build_credit(recipe: Recipe) -> CreditAssigner:
    """The credit stage, over the rows of all ranks where it looks beyond single questions."""
    credit = recipe.credit
    if isinstance(credit, NoCredit):
        return NoTransfer()
    if isinstance(credit, Custom):
        return custom_credit(credit)
    if isinstance(credit, GigpoCredit):
        return GiGPO(credit)
    if isinstance(credit, PlaceboCredit):
        return OverRanks(Placebo(credit))
    if isinstance(credit, ShrinkCredit):
        return OverRanks(Shrink(credit))
    return OverRanks(Tapo(credit)) if credit.scope == "batch" else Tapo(credit)


def build_objective(recipe: Recipe) -> Objective:
    """Surrogate, importance correction, KL penalty and entropy bonus."""
    algo = recipe.algo
    return policy_gradient(
        build_loss(recipe),
        correction=build_correction(algo.importance),
        kl_kind=algo.kl.estimator,
        kl_coefficient=algo.kl.coef,
        entropy_coefficient=algo.entropy_coef,
        is_only_update=is_recomputed_in_passing(recipe),
        proximal=(
            importance.log_linear_proximal if recipe.learner.old_logprobs == "log_linear" else None
        ),
    )


def build_loss(recipe: Recipe) -> losses.PolicyLoss:
    """The surrogate with its hyper-parameters."""
    loss = recipe.algo.loss
    if isinstance(loss, Custom):
        return custom_part(loss, where="algo.loss")
    if isinstance(loss, GrpoLoss):
        return partial(
            losses.grpo, clip_low=loss.clip_low, clip_high=loss.clip_high, dual_clip=loss.dual_clip
        )
    if isinstance(loss, GspoLoss):
        return partial(losses.gspo, clip_low=loss.clip_low, clip_high=loss.clip_high)
    if isinstance(loss, CispoLoss):
        return partial(weighted.cispo, clip_low=loss.clip_low, clip_high=loss.clip_high)
    if isinstance(loss, GmpoLoss):
        return partial(weighted.gmpo, clip_low=loss.clip_low, clip_high=loss.clip_high)
    return partial(losses.sapo, tau_pos=loss.tau_pos, tau_neg=loss.tau_neg)


def is_over_groups(recipe: Recipe) -> bool:
    """Whether the loss wants all trajectories of a question in one micro-batch."""
    return losses.is_over_groups(build_loss(recipe))


def is_recomputed_in_passing(recipe: Recipe) -> bool:
    """Whether old log-probabilities are those of the update's own forward pass.

    With one update per batch the policy has not moved yet, so a pass of its own would
    compute the same numbers again.
    """
    learner = recipe.learner
    is_single = learner.updates_per_batch * learner.epochs == 1
    return is_single and learner.old_logprobs == "recompute"


def skips_idle_rows(recipe: Recipe) -> bool:
    """Whether a row whose advantages are all 0 has no gradient: every term scales with them.

    Of a loss from elsewhere that is not known.
    """
    scales = isinstance(recipe.algo.loss, GrpoLoss | GspoLoss | SapoLoss)
    return scales and recipe.algo.kl.coef == 0 and recipe.algo.entropy_coef == 0


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
