"""The optimizer, and how a batch becomes updates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from tapo_train.recipe.values import (
    STRICT,
    BelowOne,
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    Positive,
)


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Learner:
    """The optimizer, and how a batch becomes updates."""

    lr: Positive = 1e-6
    """Peak learning rate of AdamW."""
    warmup_updates: CountOrZero = 0
    """[updates] of linear rise to lr."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up; cosine falls to min_lr_ratio · lr at the last update, so there must be
    updates after warmup_updates."""
    min_lr_ratio: Fraction = 0.0
    """Where a cosine ends, as a share of lr."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Decay of AdamW's running means of the gradient and of its square."""
    eps: Positive = 1e-8
    """Of AdamW: added to the root of the gradient's mean square. Gradients of a mean over a million
    tokens are small; where most are near eps the rate is lower than lr says."""
    weight_decay: NonNegative = 0.0
    """Of AdamW, decoupled."""
    max_grad_norm: NonNegative = 1.0
    """The gradient is scaled down to this 2-norm; 0: never."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed: 0 shards nothing, 1 the optimizer, 2 gradients too, 3 parameters too."""
    offload_optimizer: bool = False
    """Keep optimizer states in the host's memory; needs zero_stage 1 or more."""
    offload_parameters: bool = False
    """Keep the shards of the weights there too; needs zero_stage 3."""
    offload_in_rollout: bool = False
    """Keep optimizer states and master weights in the host's memory while the engine samples;
    needs zero_stage 2 without offload_optimizer, and pays on a GPU only."""
    live_elements: Count = 1_000_000_000
    """[weights] that may be whole on a device at a time with zero_stage 3, besides the module that
    computes; fewer are gathered more often."""
    bucket_elements: Count = 500_000_000
    """[gradients] that are reduced together with zero_stage 1 and up, 4 bytes each."""
    head_chunk_tokens: Count = 2048
    """[trained tokens] whose logits are in memory at a time, some 14 bytes for each entry of the
    vocabulary: fewer are slower and smaller."""
    picture_cache_gib: Positive = 4.0
    """[GiB] of processed pictures that each rank keeps in the host's memory between forward passes;
    one of 1280 x 960 pixels takes 29 MB. A picture that was thrown out is processed again."""
    micro_batch_tokens: Count = 16_384
    """[tokens] in one forward pass; a longer trajectory goes alone."""
    sequence_parallel: Count = 1
    """Neighbouring ranks that share each micro-batch, a slice of its tokens each, for trajectories
    that do not fit on one device (Ulysses): micro_batch_tokens is then over these ranks. Must
    divide the number of ranks and the model's attention heads. 1: off."""
    balance: bool = True
    """Even out the ranks' work before an update: rows move from ranks with more to ranks with
    less. false: each trains what it sampled. One rank: no difference."""
    updates_per_batch: Count = 1
    """Optimizer updates a step's trajectories are dealt out to; 1: on-policy."""
    epochs: Count = 1
    """Passes over a step's trajectories."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """An update whose loss or gradient is not finite: stop ends the run, skip leaves the update
    out. Its micro-batches are written to `nonfinite/` of the run folder either way."""
    gradient_checkpointing: bool = True
    """Compute activations twice and keep few: slower, far less memory."""
    old_logprobs: Literal["recompute", "engine", "log_linear"] = "recompute"
    """Where the ratio's denominator comes from. engine: the sampler, which saves a forward pass and
    wants algo/importance=none or total_variation. log_linear saves it too: estimated between
    sampler and present policy by the age of each token; only where a step makes several updates."""
