"""What a run can set about its learner, and the schedule of the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from tapo_train.errors import ConfigError

Precision = Literal["fp32", "bf16"]
Schedule = Literal["constant", "cosine"]
OptimizerKind = Literal["adamw", "sgd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """Low-rank adapters in place of training the weights themselves."""

    rank: int
    alpha: float
    """The adapters' product is scaled by alpha / rank."""
    targets: tuple[str, ...]
    """Last parts of the names of the linear layers that get one."""
    seed: int = 0
    """Of the adapters' first factors; the second are zero."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not self.targets:
            raise ConfigError(
                f"adapter of rank {self.rank}, alpha {self.alpha} for {len(self.targets)} "
                "targets; wanted a rank >= 1, an alpha > 0 and at least one target"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """Numbers of the optimizer and of the engine around it."""

    precision: Precision = "bf16"
    """Type of weights and activations; optimizer states are float32 either way."""
    zero_stage: int = 2
    """0 replicates everything, 1 shards optimizer states, 2 gradients, 3 weights too."""
    offload_optimizer: bool = False
    """Keep the optimizer's states in the host's memory (ZeRO 1 and up)."""
    offload_parameters: bool = False
    """Keep the shards of the weights in the host's memory too (ZeRO 3)."""
    persistent_elements: int = 100_000
    """Weights up to this size stay whole on every rank under ZeRO 3."""
    live_elements: int = 10**9
    """Weights that may be whole at a time under ZeRO 3, beside the persistent ones."""
    bucket_elements: int = 5 * 10**8
    """Gradients that are reduced together where they are sharded, 4 bytes each."""
    optimizer: OptimizerKind = "adamw"
    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled; on all parameters."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this 2-norm; 0 leaves it alone."""
    schedule: Schedule = "constant"
    warmup_updates: int = 0
    """Updates of linear warm-up; the first has learning_rate / warmup_updates."""
    total_updates: int = 0
    """Where a cosine ends; unused by a constant schedule."""
    final_ratio: float = 0.0
    """Learning rate at the end of the cosine, as a share of learning_rate."""
    sequence_parallel: int = 1
    """Neighbouring ranks that share each micro-batch, a slice of its tokens each."""
    gradient_checkpointing: bool = False
    """Recompute activations of each layer in the backward pass."""
    freeze_vision: bool = False
    """Leave the vision tower as it is; only the language model is trained."""
    adapter: AdapterSettings | None = None
    """None trains the weights themselves."""
    head_chunk_tokens: int = 2048
    """Rows of logits in memory at a time; vocabulary x 4 bytes each."""

    def __post_init__(self) -> None:
        self._check("precision", self.precision in get_args(Precision), "one of fp32, bf16")
        self._check("optimizer", self.optimizer in get_args(OptimizerKind), "one of adamw, sgd")
        self._check("schedule", self.schedule in get_args(Schedule), "one of constant, cosine")
        self._check("zero_stage", self.zero_stage in (0, 1, 2, 3), "0, 1, 2 or 3")
        self._check("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        self._check("learning_rate", self.learning_rate > 0, "> 0")
        self._check("sequence_parallel", self.sequence_parallel >= 1, ">= 1")
        self._check("max_grad_norm", self.max_grad_norm >= 0, ">= 0")
        self._check("warmup_updates", self.warmup_updates >= 0, ">= 0")
        self._check("final_ratio", 0 <= self.final_ratio <= 1, "in [0, 1]")
        self._check("head_chunk_tokens", self.head_chunk_tokens >= 1, ">= 1")
        self._check("bucket_elements", self.bucket_elements >= 1, ">= 1")
        if self.schedule == "cosine":
            enough = self.total_updates > self.warmup_updates
            self._check("total_updates", enough, "> warmup_updates for a cosine")
        if self.offload_optimizer:
            self._check("zero_stage", self.zero_stage >= 1, ">= 1 with offload_optimizer")
        if self.offload_parameters:
            self._check("zero_stage", self.zero_stage == 3, "3 with offload_parameters")

    def _check(self, name: str, is_good: bool, wanted: str) -> None:
        if not is_good:
            raise ConfigError(f"learner.{name} is {getattr(self, name)!r}; wanted {wanted}")

    @property
    def plain_optimizer(self) -> bool:
        """Whether the engine steps torch's optimizer directly, without a wrapper of its own."""
        return self.zero_stage == 0 and self.precision == "fp32"


def rate_factor(update: int, *, settings: LearnerSettings) -> float:
    """Learning rate of the 0-based `update`, as a share of `settings.learning_rate`."""
    if update < settings.warmup_updates:
        return (update + 1) / settings.warmup_updates
    if settings.schedule == "constant":
        return 1.0
    span = settings.total_updates - settings.warmup_updates
    progress = min((update - settings.warmup_updates) / span, 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return settings.final_ratio + (1 - settings.final_ratio) * cosine
