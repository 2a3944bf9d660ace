"""A module that answers micro-batches with log-probabilities: the learner's or the reference's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tapo_train.errors import LearnerError
from tapo_train.learner import distributed
from tapo_train.learner.batch import MicroBatch, join
from tapo_train.learner.inputs import model_inputs
from tapo_train.learner.layout import ModelLayout, PixelSource
from tapo_train.learner.sequence import ALONE, SequenceGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """What the sampler draws from: softmax(logits / temperature) over the ids not banned."""

    temperature: float = 1.0
    banned_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise LearnerError(f"temperature is {self.temperature}; wanted > 0")


RAW = Distribution()
"""The model's own distribution, which the probe compares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """Micro-batches in, log-probabilities of their trained tokens out, on `device`."""

    module: Callable[..., tuple[Tensor, Tensor]]
    """A `PackedModel`, or the engine around one."""
    layout: ModelLayout
    pixels: PixelSource
    device: torch.device
    chunk: int
    """Rows of logits in memory at a time."""
    distribution: Distribution
    sequence: SequenceGroup = ALONE
    """The module's."""
    on_progress: Callable[[], None] = lambda: None
    """Called after each micro-batch: a long update is no stall."""

    def __call__(
        self,
        batch: MicroBatch,
        *,
        with_entropy: bool = False,
        distribution: Distribution | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [K] of the trained tokens.

        Args:
            distribution: another than the sampler's.
        """
        asked = distribution or self.distribution
        inputs = model_inputs(
            batch,
            layout=self.layout,
            pixels=self.pixels,
            device=self.device,
            multiple_of=self.sequence.size,
        )
        banned = torch.tensor(sorted(asked.banned_token_ids), dtype=torch.int64)
        logprobs, entropy = self.module(
            inputs,
            batch.trained_index.to(self.device),
            batch.targets.to(self.device),
            temperature=asked.temperature,
            banned=banned.to(self.device) if len(banned) else None,
            chunk=self.chunk,
            with_entropy=with_entropy,
        )
        self.on_progress()
        return logprobs, entropy

    @torch.no_grad()
    def of_all(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """[K] log-probabilities of each micro-batch, on the CPU.

        On all ranks together. Ranks with fewer micro-batches take part with empty ones.
        """
        extra = distributed.all_reduce_max(len(batches)) - len(batches)
        answers = [self(batch)[0].cpu() for batch in [*batches, *[join([])] * extra]]
        return answers[: len(batches)]
