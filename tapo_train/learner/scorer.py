"""A module that answers micro-batches with log-probabilities: the learner's or the reference's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor

from tapo_train.errors import LearnerError
from tapo_train.learner import distributed
from tapo_train.learner.batch import MicroBatch, join
from tapo_train.learner.inputs import ModelInputs, model_inputs
from tapo_train.learner.layout import ModelLayout, PixelSource
from tapo_train.learner.sequence import ALONE, SequenceGroup

Item = TypeVar("Item")
Made = TypeVar("Made")


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
        inputs: ModelInputs | None = None,
        *,
        with_entropy: bool = False,
        distribution: Distribution | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [K] of the trained tokens.

        Args:
            inputs: of the micro-batch, if they are made already; see `ahead`.
            distribution: another than the sampler's.
        """
        asked = distribution or self.distribution
        inputs = (inputs or self.inputs(batch)).to(self.device)
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

    def inputs(self, batch: MicroBatch) -> ModelInputs:
        """What the module takes of a micro-batch that is on the CPU."""
        return model_inputs(
            batch, layout=self.layout, pixels=self.pixels, multiple_of=self.sequence.size
        )

    def ahead(self, batches: Sequence[MicroBatch]) -> Iterator[tuple[MicroBatch, ModelInputs]]:
        """Each micro-batch with its inputs; while one is computed, a thread makes the next."""
        return made_ahead(self.inputs, batches)

    @torch.no_grad()
    def of_all(
        self, batches: Sequence[MicroBatch], *, distribution: Distribution | None = None
    ) -> list[Tensor]:
        """[K] log-probabilities of each micro-batch, on the CPU.

        On all ranks together. Ranks with fewer micro-batches take part with empty ones.
        """
        extra = distributed.all_reduce_max(len(batches)) - len(batches)
        padded = [*batches, *[join([])] * extra]
        answers = [
            self(batch, inputs, distribution=distribution)[0].cpu()
            for batch, inputs in self.ahead(padded)
        ]
        return answers[: len(batches)]


def made_ahead(make: Callable[[Item], Made], items: Sequence[Item]) -> Iterator[tuple[Item, Made]]:
    """Each item with what is made of it, by a thread that is one item ahead.

    Pictures are decoded and processed on the CPU, half a second for a dozen of a megapixel: too
    long for the thread that feeds the device.
    """
    if not items:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        coming = thread.submit(make, items[0])
        for item, following in zip_longest(items, items[1:]):
            made = coming.result()
            if following is not None:
                coming = thread.submit(make, following)
            yield item, made
