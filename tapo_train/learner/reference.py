"""The reference policy of a KL penalty: the model a run started from, never trained.

It scores every micro-batch once, before the updates of a step. It is always the folder the
recipe names: a resumed run that took its checkpoint instead would be pulled elsewhere than
the run that was never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tapo_train.learner import adapter, engine, packed_model
from tapo_train.learner.batch import MicroBatch
from tapo_train.learner.layout import ModelLayout, PixelSource
from tapo_train.learner.policy import Policy
from tapo_train.learner.scorer import Distribution, Scorer
from tapo_train.learner.sequence import ALONE, SequenceGroup
from tapo_train.learner.settings import LearnerSettings


class Reference(Protocol):
    """Gives micro-batches the log-probabilities of a frozen policy."""

    def __call__(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches with `reference_logprobs`. On all ranks together."""
        ...

    def close(self) -> None:
        """Give memory back; the reference is unusable afterwards."""
        ...


class NoReference:
    """Without a KL penalty: the micro-batches as they are."""

    def __call__(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """See `Reference`."""
        return list(batches)

    def close(self) -> None:
        """See `Reference`."""


class AdapterFree:
    """The learner itself with its adapters switched off: no second copy of the weights."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def __call__(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """See `Reference`."""
        with adapter.switched_off(self._policy.model):
            answers = self._policy.logprobs_of_all(batches)
        return _with_reference(batches, answers)

    def close(self) -> None:
        """See `Reference`."""


class FrozenReference:
    """A second copy of the model in the learner's number type, without gradient or optimizer.

    Under ZeRO-3 its weights are sharded over the ranks, else every rank holds them whole.

    Args:
        model: a Hugging Face folder.
        settings: precision, stage and chunk of the learner.
        pixels: pictures -> patches, as the learner's.
        device: where the learner's tensors are.
        distribution: the one the learner's log-probabilities are of.
        sequence: the ranks that share each micro-batch, as the learner's.
        on_progress: called after each micro-batch.
    """

    def __init__(
        self,
        model: Path,
        *,
        settings: LearnerSettings,
        pixels: PixelSource,
        device: torch.device,
        distribution: Distribution,
        sequence: SequenceGroup = ALONE,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        loaded = packed_model.load(model, settings=replace(settings, adapter=None), device=device)
        loaded.requires_grad_(False)
        layout = ModelLayout.of(loaded)
        self._engine = engine.start_frozen(
            packed_model.PackedModel(loaded, sequence), settings=settings, device=device
        )
        self._score = Scorer(
            module=self._engine,
            layout=layout,
            pixels=pixels,
            device=device,
            chunk=settings.head_chunk_tokens,
            distribution=distribution,
            sequence=sequence,
            on_progress=on_progress,
        )

    def __call__(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """See `Reference`."""
        return _with_reference(batches, self._score.of_all(batches))

    def close(self) -> None:
        """See `Reference`."""
        engine.stop_frozen(self._engine)
        del self._engine, self._score


def _with_reference(batches: Sequence[MicroBatch], answers: Sequence[Tensor]) -> list[MicroBatch]:
    return [
        replace(batch, reference_logprobs=logprobs)
        for batch, logprobs in zip(batches, answers, strict=True)
    ]
