"""From a recipe to the parts of a run: the learner and its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tapo_train.build.algo import is_over_groups
from tapo_train.build.device import DEVICE
from tapo_train.build.limits import packed_tokens
from tapo_train.build.rollout import sleeps_in_update
from tapo_train.errors import ConfigError
from tapo_train.families import Family, family_of
from tapo_train.learner.balance import Balanced, Kept, RowCost, RowExchange
from tapo_train.learner.isolation import require_isolation
from tapo_train.learner.policy import Policy
from tapo_train.learner.reference import AdapterFree, FrozenReference, NoReference, Reference
from tapo_train.learner.settings import AdapterSettings, LearnerSettings
from tapo_train.learner.shape import ModelShape
from tapo_train.recipe.compose import Recipe, training_updates
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.engine import Engine, Sleeper
from tapo_train.training.colocation import DeviceSharing

PACKED_TEXTS = (
    "The Eiffel Tower was built from 1887 to 1889.",
    "One, two, three, four, five.",
    "Water boils at 100 degrees at the level of the sea, and earlier on a mountain.",
)
"""What a model is asked with whether its rows mix; some tokens are probable, some are not."""


def build_policy(
    recipe: Recipe,
    chat: ChatFormat,
    *,
    updates: int | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> Policy:
    """The learner, scoring the distribution the sampler draws from; its rows do not mix.

    Args:
        updates: optimizer updates of the run; default those of a training run.
        on_progress: called after each micro-batch.

    Raises:
        ConfigError: rows of this model see each other when they are packed.
    """
    if updates is None:
        updates = training_updates(recipe)
    if not chat.family.packs:
        require_alone(recipe, chat.family)
    policy = Policy(
        Path(recipe.model.path),
        settings=learner_settings(recipe, updates),
        pixels=chat.pixels,
        device=DEVICE,
        temperature=recipe.rollout.temperature or 1.0,
        banned_token_ids=chat.banned_token_ids,
        measure_entropy=recipe.algo.entropy_coef > 0,
        on_progress=on_progress,
    )
    if chat.family.packs:
        require_isolation(policy, [chat.plain(text) for text in PACKED_TEXTS])
    return policy


def require_alone(recipe: Recipe, family: Family) -> None:
    """Refuse what needs several rows in one forward pass, or a row over several ranks.

    Raises:
        ConfigError: the recipe wants it of a family whose rows go alone.
    """
    if recipe.learner.sequence_parallel > 1:
        raise ConfigError(
            f"learner.sequence_parallel: found {recipe.learner.sequence_parallel}, wanted 1: "
            f"{family.name} carries a state from token to token, which no slice can begin with"
        )
    if is_over_groups(recipe):
        raise ConfigError(
            f"algo.loss: found one over groups, wanted one of single trajectories: rows of "
            f"{family.name} go through the model one at a time"
        )


def build_reference(
    recipe: Recipe,
    policy: Policy,
    chat: ChatFormat,
    *,
    on_progress: Callable[[], None] = lambda: None,
) -> Reference:
    """The policy a KL penalty pulls towards: the recipe's model, also when a run is resumed.

    Args:
        on_progress: called after each micro-batch.
    """
    if recipe.algo.kl.coef == 0:
        return NoReference()
    if policy.settings.adapter is not None:
        return AdapterFree(policy)
    return FrozenReference(
        Path(recipe.model.path),
        settings=policy.settings,
        pixels=chat.pixels,
        device=policy.device,
        distribution=policy.distribution,
        sequence=policy.sequence,
        on_progress=on_progress,
    )


def build_exchange(recipe: Recipe, policy: Policy) -> RowExchange:
    """Which rank trains which rows."""
    family = family_of(policy.model.config.model_type)
    budget, sequence = packed_tokens(recipe, family), policy.sequence
    whole = is_over_groups(recipe)
    if not recipe.learner.balance:
        return Kept(budget_tokens=budget, sequence=sequence, whole_groups=whole)
    shape = ModelShape.of(policy.model.config)
    cost = RowCost(shape=shape, image_token_id=policy.layout.image_token_id)
    return Balanced(cost=cost, budget_tokens=budget, sequence=sequence, whole_groups=whole)


def build_sharing(recipe: Recipe, policy: Policy, engine: Engine) -> DeviceSharing:
    """Who holds the device's memory when."""
    learning: list[Callable[[], None]] = []
    sampling: list[Callable[[], None]] = []
    if recipe.learner.offload_in_rollout:
        learning.append(policy.reload_states)
        sampling.append(policy.offload_states)
    if isinstance(engine, Sleeper) and sleeps_in_update(recipe):
        # The engine leaves before the states come, and comes after they have left.
        learning.insert(0, engine.sleep)
        sampling.append(engine.wake)
    return DeviceSharing(before_learning=learning, before_sampling=sampling)


def learner_settings(recipe: Recipe, updates: int) -> LearnerSettings:
    """Optimizer and engine numbers of a run of `updates` updates."""
    learner = recipe.learner
    return LearnerSettings(
        precision="bf16" if recipe.model.dtype == "bfloat16" else "fp32",
        zero_stage=learner.zero_stage,
        offload_optimizer=learner.offload_optimizer,
        offload_parameters=learner.offload_parameters,
        live_elements=learner.live_elements,
        bucket_elements=learner.bucket_elements,
        head_chunk_tokens=learner.head_chunk_tokens,
        learning_rate=learner.lr,
        betas=learner.betas,
        eps=learner.eps,
        weight_decay=learner.weight_decay,
        max_grad_norm=learner.max_grad_norm,
        schedule=learner.schedule,
        final_ratio=learner.min_lr_ratio,
        warmup_updates=learner.warmup_updates,
        total_updates=updates,
        sequence_parallel=learner.sequence_parallel,
        gradient_checkpointing=learner.gradient_checkpointing,
        freeze_vision=recipe.model.freeze_vision,
        adapter=adapter_settings(recipe),
    )


def adapter_settings(recipe: Recipe) -> AdapterSettings | None:
    """The adapters of a run; None if the weights themselves are trained."""
    lora = recipe.model.lora
    if lora.rank == 0:
        return None
    return AdapterSettings(
        rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=recipe.run.seed
    )
