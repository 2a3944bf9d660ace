"""What each phase of a step takes of a device, planned before anything heavy starts.

    rollout   the engine samples; the learner's weights and states wait
    sync      the engine takes the learner's weights, parameter by parameter
    scoring   log-probabilities of the step's start (and of the reference), without gradient
    update    forward and backward pass, and the optimizer's step

The learner's figures are those of `learner/memory.py`; the engine's share is what the recipe
gives it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tapo_train.learner import memory
from tapo_train.learner.memory import ELEMENT, USABLE, Plan
from tapo_train.learner.shape import ModelShape
from tapo_train.recipe import Recipe

GB = 1e9
PICTURE_SHARE = 0.5
"""Of a full micro-batch's tokens, those that are taken to be of pictures."""
ASLEEP = 1.5e9
"""[B] that a sleeping engine does not give back: CUDA graphs and its libraries. Assumed."""
ENGINE_TOKENS = 8192
"""Tokens that vLLM computes in one step at most, by its default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a run is planned for."""

    memory_bytes: float
    """[B] of one device; without a GPU the host's memory over its ranks."""
    count: int
    """Ranks, one on each device."""
    is_gpu: bool = True

    @property
    def usable_bytes(self) -> float:
        """[B] without the context and fragments."""
        return USABLE * self.memory_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of a step and what it holds on one device."""

    name: str
    parts: Mapping[str, float]
    """[B] by what it is."""

    @property
    def total(self) -> float:
        """[B]"""
        return sum(self.parts.values())


def plan_phases(recipe: Recipe, shape: ModelShape, device: Device) -> tuple[Phase, ...]:
    """The phases of a step, in order."""
    plan = learner_plan(recipe, shape, device)
    resident = _waiting_learner(recipe, shape, plan)
    states = {
        "learner's weights": memory.weight_bytes(shape, plan) + _reference(recipe, shape, plan),
        "gradients": memory.gradient_bytes(shape, plan),
        "optimizer": memory.optimizer_bytes(shape, plan),
    }
    engine = _engine_parts(recipe, shape, device)
    weights = {"engine's weights": engine.get("engine's weights", 0.0)}
    tokens, patches = micro_batch(recipe, shape)
    gathered = {"gathered weights": memory.gathered_bytes(shape, plan)}
    # One parameter is handed over while the next is gathered.
    whole = {"gathered weights": 2.0 * shape.head_weights * ELEMENT[plan.precision]}
    beside = {"asleep": ASLEEP} if _sleeps(recipe) else engine
    scored = memory.scoring_bytes(shape, plan, tokens=tokens, patches=patches)
    updated = memory.activation_bytes(shape, plan, tokens=tokens, patches=patches)
    score = _activations(*scored, head=memory.scored_head_bytes(shape, plan))
    update = _activations(*updated, head=memory.head_bytes(shape, plan))
    buckets = {"buckets": memory.bucket_bytes(shape, plan)}
    return (
        Phase(name="rollout", parts=engine | resident),
        Phase(name="sync", parts=(weights if _sleeps(recipe) else engine) | resident | whole),
        Phase(name="scoring", parts=beside | states | gathered | score),
        Phase(name="update", parts=beside | states | gathered | update | buckets),
    )


def _activations(kept: float, at_work: float, *, head: float) -> dict[str, float]:
    """A layer is at work when the head is done with."""
    return {"activations": kept, "layer at work": max(0.0, at_work - head), "head": head}


def learner_plan(recipe: Recipe, shape: ModelShape, device: Device) -> Plan:
    """How the recipe trains the model on so many devices."""
    learner, lora = recipe.learner, recipe.model.lora
    return Plan(
        precision="bf16" if recipe.model.dtype == "bfloat16" else "fp32",
        zero_stage=learner.zero_stage,
        num_ranks=device.count,
        gradient_checkpointing=learner.gradient_checkpointing,
        offload_optimizer=learner.offload_optimizer,
        offload_parameters=learner.offload_parameters,
        freeze_vision=recipe.model.freeze_vision,
        adapter_weights=_adapter_weights(recipe, shape) if lora.rank else None,
        with_entropy=recipe.algo.entropy_coef > 0,
        head_chunk_tokens=learner.head_chunk_tokens,
        live_elements=learner.live_elements,
        bucket_elements=learner.bucket_elements,
        sequence_parallel=learner.sequence_parallel,
    )


def micro_batch(recipe: Recipe, shape: ModelShape) -> tuple[int, int]:
    """Tokens of the largest micro-batch, and its patches of pictures."""
    tokens = max(recipe.learner.micro_batch_tokens, recipe.rollout.max_tokens)
    return tokens, int(tokens * PICTURE_SHARE) * shape.vision.merge_size**2


def cached_tokens(recipe: Recipe, shape: ModelShape, device: Device) -> int:
    """Tokens whose keys and values the engine in this process holds; 0 without one."""
    parts = _engine_parts(recipe, shape, device)
    return int(parts.get("keys and values", 0.0) / _cache_bytes_per_token(recipe, shape))


def table(phases: tuple[Phase, ...], device: Device) -> str:
    """The plan as text, a row per kind of memory and a column per phase [GB]."""
    names = list(dict.fromkeys(name for phase in phases for name in phase.parts))
    lines = [["[GB] per device", *(phase.name for phase in phases)]]
    for name in names:
        cells = [phase.parts.get(name, 0.0) / GB for phase in phases]
        if any(cells):
            lines.append([name, *(f"{cell:.1f}" if cell else "-" for cell in cells)])
    lines.append(["together", *(f"{phase.total / GB:.1f}" for phase in phases)])
    lines.append(["left", *(f"{(device.usable_bytes - p.total) / GB:.1f}" for p in phases)])
    return "\n".join("".join([row[0].ljust(20), *(c.rjust(9) for c in row[1:])]) for row in lines)


def _waiting_learner(recipe: Recipe, shape: ModelShape, plan: Plan) -> dict[str, float]:
    """What the learner holds while the engine samples."""
    weights = memory.weight_bytes(shape, plan) + _reference(recipe, shape, plan)
    held = {"learner's weights": weights}
    if plan.zero_stage == 3:
        held["gradients"] = memory.gradient_bytes(shape, plan)
    if not recipe.learner.offload_in_rollout:
        held["optimizer"] = memory.optimizer_bytes(shape, plan)
    return held


def _reference(recipe: Recipe, shape: ModelShape, plan: Plan) -> float:
    """[B] of the frozen policy of a KL penalty; adapters are switched off instead."""
    needs = recipe.algo.kl.coef > 0 and not recipe.model.lora.rank
    return memory.weight_bytes(shape, plan) if needs else 0.0


def _sleeps(recipe: Recipe) -> bool:
    engine = recipe.rollout.engine
    return engine.name == "vllm" and engine.sleep_in_update


def _engine_parts(recipe: Recipe, shape: ModelShape, device: Device) -> dict[str, float]:
    """[B] of the engine in the training process; on a GPU they are its share of the device."""
    engine = recipe.rollout.engine
    if engine.name == "server":
        return {}
    element = ELEMENT["bf16" if recipe.model.dtype == "bfloat16" else "fp32"]
    if engine.name == "hf":
        return {"engine's weights": float(shape.weights * element)}
    weights = shape.weights * element / engine.tensor_parallel
    if not device.is_gpu:
        return {"engine's weights": weights, "keys and values": engine.kv_cache_gib * 2.0**30}
    working = ENGINE_TOKENS * element * (2 * shape.intermediate + 4 * shape.hidden)
    share = engine.gpu_memory_utilization * device.memory_bytes
    return {
        "engine's weights": weights,
        "keys and values": max(0.0, share - weights - working),
        "engine at work": float(working),
    }


def _cache_bytes_per_token(recipe: Recipe, shape: ModelShape) -> float:
    """[B] of keys and values of a token on one device."""
    element = ELEMENT["bf16" if recipe.model.dtype == "bfloat16" else "fp32"]
    engine = recipe.rollout.engine
    ways = engine.tensor_parallel if engine.name == "vllm" else 1
    heads = max(1.0, shape.kv_heads / ways)
    return 2.0 * shape.layers * heads * shape.head_dim * element


def _adapter_weights(recipe: Recipe, shape: ModelShape) -> int:
    """Elements of the adapters in the language model."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sides = {
        "q_proj": shape.hidden + queries,
        "k_proj": shape.hidden + keys,
        "v_proj": shape.hidden + keys,
        "o_proj": queries + shape.hidden,
        "gate_proj": shape.hidden + shape.intermediate,
        "up_proj": shape.hidden + shape.intermediate,
        "down_proj": shape.intermediate + shape.hidden,
    }
    lora = recipe.model.lora
    return lora.rank * shape.layers * sum(sides.get(name, 0) for name in lora.targets)
