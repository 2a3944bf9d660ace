"""From a recipe to the parts of a run: the only file that knows both fields and classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

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

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build_policy(recipe: Recipe, chat: ChatFormat, *, updates: int | None = None) -> Policy:
    """The learner, scoring the distribution the sampler draws from.

    Args:
        updates: optimizer updates of the run; default those of a training run.
    """
    if updates is None:
        per_step = recipe.learner.updates_per_batch * recipe.learner.epochs
        updates = recipe.run.steps * per_step
    return Policy(
        Path(recipe.model.path),
        settings=learner_settings(recipe, updates),
        pixels=chat.pixels,
        device=DEVICE,
        temperature=recipe.rollout.temperature or 1.0,
        banned_token_ids=chat.banned_token_ids,
        measure_entropy=recipe.algo.entropy_coef > 0,
    )


def learner_settings(recipe: Recipe, updates: int) -> LearnerSettings:
    """Optimizer and engine numbers of a run of `updates` updates."""
    learner = recipe.learner
    return LearnerSettings(
        precision="bf16" if recipe.model.dtype == "bfloat16" else "fp32",
        zero_stage=learner.zero_stage,
        offload_optimizer=learner.offload_optimizer,
        learning_rate=learner.lr,
        betas=learner.betas,
        weight_decay=learner.weight_decay,
        max_grad_norm=learner.max_grad_norm,
        schedule=learner.schedule,
        final_ratio=learner.min_lr_ratio,
        warmup_updates=learner.warmup_updates,
        total_updates=updates,
        gradient_checkpointing=learner.gradient_checkpointing,
        freeze_vision=recipe.model.freeze_vision,
    )


def build_engine(recipe: Recipe, chat: ChatFormat) -> Engine:
    """The sampler of this rank."""
    seed = recipe.run.seed * 1000 + distributed.rank()
    engine = recipe.rollout.engine
    if engine.name == "hf":
        from tapo_train.rollout.hf_engine import HfEngine

        dtype = torch.bfloat16 if recipe.model.dtype == "bfloat16" else torch.float32
        return HfEngine(chat, dtype=dtype, device=DEVICE, seed=seed)
    from tapo_train.rollout.vllm_engine import VllmEngine, VllmOptions

    return VllmEngine(
        chat,
        VllmOptions(
            dtype=recipe.model.dtype,
            max_model_len=recipe.rollout.max_tokens,
            max_num_seqs=recipe.rollout.max_in_flight,
            memory_fraction=engine.gpu_memory_utilization,
            cache_gib=engine.kv_cache_gib,
            max_images=16 + recipe.rollout.max_turns * max(1, recipe.tools.image_top_k),
            seeded=_samples_by_seed(recipe),
            seed=seed,
        ),
    )


def build_toolbox(recipe: Recipe, *, world: Path | None = None) -> Toolbox:
    """The tools the recipe names, in its order.

    Args:
        world: a world's folder, whose indexes take the place of the recipe's.
    """
    tools, decoder = recipe.tools, ImageDecoder()
    image_index, corpus = tools.image_index, tools.corpus
    if world is not None:
        image_index, corpus = str(world / "image_index.jsonl"), str(world / "corpus.jsonl")
    made: list[Tool] = []
    for name in tools.names:
        if name == "image_zoom_in_tool":
            made.append(ZoomTool(decoder, min_side_px=tools.min_crop_side))
        elif name == "image_search_tool":
            path = _needed(image_index, "tools.image_index", name)
            made.append(ImageSearchTool(ImageIndex.load(path), decoder, top_k=tools.image_top_k))
        else:
            path = _needed(corpus, "tools.corpus", name)
            index, chars = CorpusIndex.load(path), tools.max_observation_chars
            made.append(TextSearchTool(index, top_k=tools.text_top_k, max_chars=chars))
    return Toolbox(made, deadline_s=tools.deadline_s)


def build_play(recipe: Recipe, engine: Engine, chat: ChatFormat, toolbox: Toolbox) -> Play:
    """Rollouts with the recipe's prompt, tools and limits."""
    rollout = recipe.rollout
    limits = Limits(
        max_turns=rollout.max_turns,
        max_turn_tokens=rollout.max_turn_tokens,
        max_tokens=rollout.max_tokens,
    )
    seed = recipe.run.seed if _samples_by_seed(recipe) else None

    def play(
        tasks: Sequence[Task], *, rollouts: int, greedy: bool, policy_version: int
    ) -> list[Group]:
        temperature = 0.0 if greedy else rollout.temperature
        return collect(
            tasks,
            engine=engine,
            chat=chat,
            toolbox=toolbox,
            system_prompt=recipe.data.system_prompt,
            rollouts_per_task=rollouts,
            limits=limits,
            sampling=Sampling(temperature=temperature, seed=seed),
            policy_version=policy_version,
            max_in_flight=rollout.max_in_flight,
        )

    return play


def _samples_by_seed(recipe: Recipe) -> bool:
    """Whether each request draws from a stream of its own, derived from seed and request id.

    Then a run does not depend on the order of requests or the number of ranks, and a
    resumed one samples what an uninterrupted one would have. On GPUs one generator per
    request costs more than that is worth.
    """
    return recipe.rollout.engine.name == "hf" or DEVICE == "cpu"


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
        correction=build_correction(recipe),
        kl_kind=algo.kl.estimator,
        kl_coefficient=algo.kl.coef,
        entropy_coefficient=algo.entropy_coef,
        is_only_update=is_recomputed_in_passing(recipe),
    )


def is_recomputed_in_passing(recipe: Recipe) -> bool:
    """Whether old log-probabilities are those of the update's own forward pass.

    With one update per batch the policy has not moved yet, so a pass of its own would
    compute the same numbers again.
    """
    learner = recipe.learner
    is_single = learner.updates_per_batch * learner.epochs == 1
    return is_single and learner.old_logprobs == "recompute"


def build_correction(recipe: Recipe) -> importance.Correction:
    """The importance correction between sampler and learner."""
    settings = recipe.algo.importance
    if settings.mode == "off":
        return importance.uncorrected
    if settings.mode == "truncate":
        return partial(importance.truncate, level=settings.level, high=settings.threshold)
    low, high = 1 / settings.threshold, settings.threshold
    return partial(importance.mask, level=settings.level, low=low, high=high)


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


def _needed(path: str | None, field: str, tool: str) -> Path:
    if path is None:
        raise ConfigError(f"{field}: found nothing; {tool} wants a file")
    return Path(path)
