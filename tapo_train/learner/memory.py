"""How much memory an update takes on one device, from the shape of the model.

    peak = states + tokens x bytes per token + head + buffers

Pure arithmetic. The factors were measured (docs/memory.md says how); against the peak of real
updates they are exact to 15 %, on the safe side with checkpointing. Text and pictures count
alike as tokens; the tower's own activations come on top, unless it is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

from tapo_train.learner.settings import Precision
from tapo_train.learner.shape import ModelShape

KEPT = {"bf16": (16, 8, 10, 10), "fp32": (24, 16, 16, 16)}
"""[B/token] a layer keeps for its backward pass, per unit of (hidden, intermediate, width of
the queries, width of the keys). bf16 is more than half of fp32: norms compute in fp32."""
KEPT_BY_TOWER = {"bf16": (22, 4), "fp32": (44, 8)}
"""[B/patch] a layer of the vision tower keeps, per unit of (hidden, intermediate)."""
OUTSIDE = {"bf16": 6, "fp32": 8}
"""[B/token] before the first and after the last layer, per unit of hidden."""
ELEMENT = {"bf16": 2, "fp32": 4}
"""[B] of a weight, and of an activation between layers."""
STEP = 16
"""[B/parameter] gradient in fp32, fp32 weights and AdamW's two averages: 4 each. Without
sharding fp32 needs no second weights, and bf16 keeps its gradients in bf16."""
HEAD_ROW = 14
"""[B] per row of a chunk and entry of the vocabulary: logits (2), in fp32 (4), log-probabilities
and their gradient (4 + 4)."""
BUFFER = 2e9
"""[B] of DeepSpeed's reduction bucket (5e8 elements, fp32), with sharding."""
USABLE = 0.95
"""Of a device's memory; the rest goes to the context and to fragments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a model is trained."""

    precision: Precision = "bf16"
    zero_stage: int = 2
    num_ranks: int = 1
    gradient_checkpointing: bool = True
    offload_optimizer: bool = False
    freeze_vision: bool = False
    head_chunk_tokens: int = 2048
    sequence_parallel: int = 1
    """Ranks that share a micro-batch, at most as many as the model has heads of keys; counted in
    num_ranks. Each holds its slice of the layers' activations and all of the tower's."""


def state_bytes(shape: ModelShape, plan: Plan) -> float:
    """Weights, gradients and optimizer on one device, between two micro-batches [B]."""
    trained = shape.text_weights + (0 if plan.freeze_vision else shape.vision.weights)
    element = ELEMENT[plan.precision]
    if plan.zero_stage == 0:
        optimizer = 12 if plan.precision == "bf16" else 8
        return shape.weights * element + trained * float(element + optimizer)
    weights = shape.weights * element / (plan.num_ranks if plan.zero_stage == 3 else 1)
    gradient = 4 / (plan.num_ranks if plan.zero_stage >= 2 else 1)
    optimizer_share = 0.0 if plan.offload_optimizer else (STEP - 4) / plan.num_ranks
    return weights + trained * (gradient + optimizer_share)


def bytes_per_token(shape: ModelShape, plan: Plan) -> float:
    """What one more token in a micro-batch takes at the peak on each rank that shares it [B]."""
    per = KEPT[plan.precision]
    widths = (
        shape.hidden,
        shape.intermediate,
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
    )
    kept = sum(a * b for a, b in zip(per, widths, strict=True))
    element = ELEMENT[plan.precision]
    # With checkpointing every layer keeps its input, and one at a time is whole.
    layers = shape.layers * kept
    if plan.gradient_checkpointing:
        layers = shape.layers * element * shape.hidden + kept
    gradients = 2 * element * shape.intermediate
    whole = layers + gradients + OUTSIDE[plan.precision] * shape.hidden
    return float(whole / plan.sequence_parallel)


def bytes_per_patch(shape: ModelShape, plan: Plan) -> float:
    """What one more patch of a picture takes in the tower [B]; 4 patches are a token."""
    if plan.freeze_vision:
        return 0.0
    vision = shape.vision
    wide, middle = KEPT_BY_TOWER[plan.precision]
    kept = wide * vision.hidden + middle * vision.intermediate
    if plan.gradient_checkpointing:
        return float(vision.layers * ELEMENT[plan.precision] * vision.hidden + kept)
    return float(vision.layers * kept)


def head_bytes(shape: ModelShape, plan: Plan) -> float:
    """A chunk of logits, and the head's gradient summed in fp32 [B]."""
    chunk = plan.head_chunk_tokens * shape.vocabulary * HEAD_ROW
    return chunk + 4.0 * shape.head_weights


def peak_bytes(shape: ModelShape, plan: Plan, *, tokens: int, patches: int = 0) -> float:
    """The most an update holds on one device with a micro-batch of this size [B]."""
    buffers = BUFFER if plan.zero_stage else 0.0
    activations = tokens * bytes_per_token(shape, plan) + patches * bytes_per_patch(shape, plan)
    return state_bytes(shape, plan) + activations + head_bytes(shape, plan) + buffers


def longest_trajectory(
    shape: ModelShape, plan: Plan, *, device_bytes: float, picture_share: float = 0.0
) -> int:
    """Tokens of the longest trajectory that fits on a device; 0 if not even the states do.

    Args:
        picture_share: of the tokens, those that are a picture's.
    """
    empty = peak_bytes(shape, plan, tokens=0)
    merged = shape.vision.merge_size**2
    per_token = bytes_per_token(shape, plan)
    per_token += picture_share * merged * bytes_per_patch(shape, plan)
    return max(0, int((USABLE * device_bytes - empty) / per_token))
