"""How much memory the learner takes on one device, from the shape of the model.

    peak = states + gathered weights + buckets + tokens x bytes kept per token
           + the larger of: a layer at work, the head at work

Pure arithmetic, without torch. The factors were counted (docs/memory.md says how and how near
they come). Text and pictures count alike as tokens; the tower's own activations come on top.
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
PIXEL = 4
"""[B] of a number of a processed picture."""
HEAD_FORWARD = 8
"""[B] per row of a chunk and entry of the vocabulary in the forward pass: logits in float32 and
what the sum of their exponentials needs, or the last chunk's (4 + 4)."""
HEAD_ENTROPY = 20
"""[B] the same with entropies: logits, log-probabilities, those that are finite, probabilities and
their product (4 each)."""
HEAD_BACKWARD = {"bf16": (10, 18), "fp32": (8, 20)}
"""[B] the same in the backward pass, without and with entropies: logits beside the gradient of the
chunk before (4 + 4, and 2 in bf16); with entropies its factors are still held."""
HEAD_GRADIENT = {"bf16": 6, "fp32": 8}
"""[B] per element of the head: its gradient summed in fp32, and the share of a chunk."""
PREFETCH = 5 * 10**7
"""Weights that DeepSpeed gathers ahead together, its default."""
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
    offload_parameters: bool = False
    freeze_vision: bool = False
    adapter_weights: int | None = None
    """Elements of the low-rank adapters; None trains the weights themselves."""
    with_entropy: bool = False
    head_chunk_tokens: int = 2048
    live_elements: int = 10**9
    bucket_elements: int = 5 * 10**8
    sequence_parallel: int = 1
    """Ranks that share a micro-batch, at most as many as the model has heads of keys; counted in
    num_ranks. Each holds its slice of the layers' activations and all of the tower's."""


def trained_weights(shape: ModelShape, plan: Plan) -> int:
    """Elements that are updated."""
    if plan.adapter_weights is not None:
        return plan.adapter_weights
    return shape.text_weights + (0 if plan.freeze_vision else shape.vision.weights)


def weight_bytes(shape: ModelShape, plan: Plan) -> float:
    """The weights on one device, as they lie between two forward passes [B]."""
    if plan.offload_parameters:
        return 0.0
    shards = plan.num_ranks if plan.zero_stage == 3 else 1
    return float(shape.weights * ELEMENT[plan.precision] / shards)


def gradient_bytes(shape: ModelShape, plan: Plan) -> float:
    """Gradients on one device, summed over micro-batches [B]."""
    trained = trained_weights(shape, plan)
    if plan.zero_stage == 0:
        return float(trained * ELEMENT[plan.precision])
    return 4.0 * trained / (plan.num_ranks if plan.zero_stage >= 2 else 1)


def optimizer_bytes(shape: ModelShape, plan: Plan) -> float:
    """Master weights and averages on one device [B]."""
    trained = trained_weights(shape, plan)
    if plan.zero_stage == 0:
        return float(trained * (12 if plan.precision == "bf16" else 8))
    return 0.0 if plan.offload_optimizer else (STEP - 4.0) * trained / plan.num_ranks


def state_bytes(shape: ModelShape, plan: Plan) -> float:
    """Weights, gradients and optimizer on one device, between two micro-batches [B]."""
    return weight_bytes(shape, plan) + gradient_bytes(shape, plan) + optimizer_bytes(shape, plan)


def gathered_bytes(shape: ModelShape, plan: Plan) -> float:
    """Weights that are whole on a device at a time, of those that are sharded [B].

    A module's weights are gathered before it computes; what comes next is gathered ahead and what
    is used again soon is kept, up to `live_elements`. The largest module is the head. What is
    just being gathered is there twice.
    """
    if plan.zero_stage < 3:
        return 0.0
    live = min(shape.weights, plan.live_elements + shape.head_weights)
    coming = max(shape.head_weights, min(plan.live_elements, PREFETCH, shape.weights))
    return float((live + coming) * ELEMENT[plan.precision])


def bucket_bytes(shape: ModelShape, plan: Plan) -> float:
    """Gradients on their way to the rank that keeps them [B].

    A bucket in fp32. A gradient larger than it is reduced alone, as the head's.
    """
    if plan.zero_stage == 0:
        return 0.0
    return 4.0 * plan.bucket_elements


def kept_bytes_per_token(shape: ModelShape, plan: Plan) -> float:
    """What a forward pass keeps of a token, on each rank that shares it [B].

    With checkpointing every layer keeps its input only.
    """
    whole = ELEMENT[plan.precision] * shape.hidden
    layer = whole if plan.gradient_checkpointing else _layer_bytes(shape, plan)
    outside = OUTSIDE[plan.precision] * shape.hidden
    return float((shape.layers * layer + outside) / plan.sequence_parallel)


def working_bytes_per_token(shape: ModelShape, plan: Plan) -> float:
    """What the layer that is differentiated takes on top [B]: made again, and its gradients."""
    made_again = _layer_bytes(shape, plan) if plan.gradient_checkpointing else 0.0
    gradients = 2 * ELEMENT[plan.precision] * shape.intermediate
    return float((made_again + gradients) / plan.sequence_parallel)


def bytes_per_patch(shape: ModelShape, plan: Plan) -> float:
    """What one more patch of a picture takes in a trained tower [B]; 4 patches are a token."""
    if plan.freeze_vision:
        return 0.0
    vision = shape.vision
    kept = _tower_layer_bytes(shape, plan)
    if plan.gradient_checkpointing:
        return float(vision.layers * ELEMENT[plan.precision] * vision.hidden + kept)
    return float(vision.layers * kept)


def pixel_bytes(shape: ModelShape, plan: Plan) -> float:
    """What one more patch takes whether the tower is trained or not [B].

    Its numbers, in fp32 and in the model's type, and its share of what the mergers hand over.
    """
    vision = shape.vision
    element = ELEMENT[plan.precision]
    handed_over = vision.mergers * vision.out * element / vision.merge_size**2
    return vision.patch_width * (PIXEL + element) + handed_over


def head_bytes(shape: ModelShape, plan: Plan) -> float:
    """Chunks of logits and the head's gradient, at the larger of the two passes [B]."""
    chunk = plan.head_chunk_tokens * shape.vocabulary
    forward = scored_head_bytes(shape, plan)
    if plan.with_entropy:
        forward = float(chunk * HEAD_ENTROPY)
    logits = HEAD_BACKWARD[plan.precision][plan.with_entropy]
    backward = chunk * logits + HEAD_GRADIENT[plan.precision] * shape.head_weights
    return float(max(forward, backward))


def scored_head_bytes(shape: ModelShape, plan: Plan) -> float:
    """Chunks of logits of a forward pass alone, without entropies [B]."""
    return float(plan.head_chunk_tokens * shape.vocabulary * HEAD_FORWARD)


def activation_bytes(
    shape: ModelShape, plan: Plan, *, tokens: int, patches: int = 0
) -> tuple[float, float]:
    """(kept, at work besides the head) of a micro-batch of this size, on one device [B]."""
    per_patch = bytes_per_patch(shape, plan) + pixel_bytes(shape, plan)
    kept = tokens * kept_bytes_per_token(shape, plan) + patches * per_patch
    return kept, tokens * working_bytes_per_token(shape, plan)


def scoring_bytes(
    shape: ModelShape, plan: Plan, *, tokens: int, patches: int = 0
) -> tuple[float, float]:
    """The same without gradient: pictures and hidden states, and half a layer at a time [B]."""
    hidden = OUTSIDE[plan.precision] * shape.hidden / plan.sequence_parallel
    at_work = _layer_bytes(shape, plan) / plan.sequence_parallel / 2
    return tokens * hidden + patches * pixel_bytes(shape, plan), tokens * at_work


def peak_bytes(shape: ModelShape, plan: Plan, *, tokens: int, patches: int = 0) -> float:
    """The most an update holds on one device with a micro-batch of this size [B]."""
    kept, at_work = activation_bytes(shape, plan, tokens=tokens, patches=patches)
    around = gathered_bytes(shape, plan) + bucket_bytes(shape, plan)
    return state_bytes(shape, plan) + around + kept + max(at_work, head_bytes(shape, plan))


def longest_trajectory(
    shape: ModelShape, plan: Plan, *, device_bytes: float, picture_share: float = 0.0
) -> int:
    """Tokens of the longest trajectory that fits on a device; 0 if not even the states do.

    Args:
        picture_share: of the tokens, those that are a picture's.
    """
    head = head_bytes(shape, plan)
    room = USABLE * device_bytes - (peak_bytes(shape, plan, tokens=0) - head)
    merged = shape.vision.merge_size**2
    per_patch = bytes_per_patch(shape, plan) + pixel_bytes(shape, plan)
    kept = kept_bytes_per_token(shape, plan) + picture_share * merged * per_patch
    with_layer = room / (kept + working_bytes_per_token(shape, plan))
    return max(0, int(min(with_layer, (room - head) / kept)))


def _layer_bytes(shape: ModelShape, plan: Plan) -> float:
    """A layer of the language model keeps so much of a token [B]."""
    widths = (
        shape.hidden,
        shape.intermediate,
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
    )
    return float(sum(a * b for a, b in zip(KEPT[plan.precision], widths, strict=True)))


def _tower_layer_bytes(shape: ModelShape, plan: Plan) -> float:
    wide, middle = KEPT_BY_TOWER[plan.precision]
    return float(wide * shape.vision.hidden + middle * shape.vision.intermediate)
