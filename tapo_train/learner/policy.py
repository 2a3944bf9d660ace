"""The policy being trained: a vision-language model inside a DeepSpeed engine.

All ranks call every method together (collectives run inside), `logprobs` and `score`
with as many micro-batches as each likes unless the weights are sharded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from tapo_train.algos.aggregation import Aggregation, aggregate
from tapo_train.algos.metrics import Metrics, merge, pair
from tapo_train.errors import LearnerError
from tapo_train.learner import distributed, engine
from tapo_train.learner.attention import PACKED
from tapo_train.learner.batch import MicroBatch, TrainingRow, join
from tapo_train.learner.gradients import GradientGuard
from tapo_train.learner.head import LogprobHead
from tapo_train.learner.inputs import ModelInputs, model_inputs
from tapo_train.learner.layout import ModelLayout, PixelSource
from tapo_train.learner.objective import Objective
from tapo_train.learner.settings import LearnerSettings
from tapo_train.types import Image, Span

GATHER_ELEMENTS = 64 * 2**20
"""Sharded weights are made whole in buckets of about this many elements."""


class Policy:
    """Log-probabilities, updates and weights of the model in a folder.

    Args:
        model: a Hugging Face folder.
        pixels: pictures -> patches, e.g. `ChatFormat.pixels`.
        temperature, banned_token_ids: the distribution the sampler draws from; all
            log-probabilities are of it, except in `score`.
        measure_entropy: entropies cost a softmax per trained token; they are 0 without.
    """

    def __init__(
        self,
        model: Path,
        *,
        settings: LearnerSettings,
        pixels: PixelSource,
        device: str = "cpu",
        temperature: float = 1.0,
        banned_token_ids: Sequence[int] = (),
        measure_entropy: bool = True,
    ) -> None:
        if not temperature > 0:
            raise LearnerError(f"temperature is {temperature}; wanted > 0")
        self.source = model
        self.settings = settings
        self._device = distributed.init(device=device)
        self._pixels = pixels
        self._temperature = temperature
        self._banned = torch.tensor(sorted(banned_token_ids), dtype=torch.int64)
        self._measure_entropy = measure_entropy
        self.model = _load(model, settings)
        self.layout = ModelLayout.of(self.model)
        self._engine = engine.start(
            _PackedModel(self.model), settings=settings, device=self._device
        )
        self._guard = GradientGuard(self._engine, settings=settings)

    def logprobs(self, batch: MicroBatch) -> Tensor:
        """[K] log-probabilities of the trained tokens, on the CPU, without gradient."""
        with torch.no_grad():
            return self._forward(batch, with_entropy=False)[0].cpu()

    def with_old_logprobs(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches with `old_logprobs` computed by the present weights.

        Ranks may hold different numbers of micro-batches.
        """
        extra = distributed.all_reduce_max(len(batches)) - len(batches)
        scored = [replace(batch, old_logprobs=self.logprobs(batch)) for batch in batches]
        for _ in range(extra):
            self.logprobs(join([]))
        return scored

    def update(
        self,
        batches: Sequence[MicroBatch],
        objective: Objective,
        *,
        aggregation: Aggregation = "token-mean",
        norm_length: float | None = None,
    ) -> Metrics:
        """One optimizer step on all ranks' micro-batches together.

        The loss is the mean over the step, whatever its cut into micro-batches and ranks.
        Ranks with fewer micro-batches take part with empty ones.

        Returns:
            This rank's (sum, count) pairs: of the objective, and `loss`, `grad_norm`,
            `learning_rate`, which are the same on all ranks. Add them over ranks.

        Raises:
            LearnerError: nothing to train on, or the loss or its gradient is not finite;
                the weights are untouched then.
        """
        counts = [len(batches), *_totals(batches)]
        num_steps = distributed.all_reduce_max(len(batches))
        step_tokens, step_sequences = distributed.all_reduce_sum(counts[1:])
        padded = [*batches, *(join([]) for _ in range(num_steps - len(batches)))]
        shares: list[Tensor] = []
        metrics: Metrics = {}
        self._engine.train()
        for batch in padded:
            moved = batch.to(self._device)
            logprobs, entropy = self._forward(moved, with_entropy=self._measure_entropy)
            if moved.num_trained:
                output = objective(moved, logprobs, entropy)
                share = aggregate(
                    output.per_token,
                    moved.trajectory,
                    moved.lengths,
                    mode=aggregation,
                    step_tokens=int(step_tokens),
                    step_sequences=int(step_sequences),
                    norm_length=norm_length,
                )
                metrics = merge(metrics, output.metrics)
            else:
                share = logprobs.sum()
            self._guard.backward(share)
            shares.append(share.detach())
        loss = self._guard.finite_loss(shares, padded)
        rate = self._engine.get_lr()[0]
        norm = self._guard.step()
        for name, value in (("loss", loss), ("grad_norm", norm), ("learning_rate", rate)):
            metrics[f"update/{name}"] = pair(
                torch.tensor(value, dtype=torch.float64, device=self._device)
            )
        return metrics

    def score(
        self, tokens: npt.NDArray[np.int32], images: Sequence[Image]
    ) -> npt.NDArray[np.float32]:
        """[T - 1] log-probabilities of tokens[1:] at temperature 1, nothing banned."""
        row = TrainingRow.supervised(
            id="probe",
            tokens=tokens,
            images=tuple(images),
            spans=(Span(start=1, end=len(tokens)),),
        )
        with torch.no_grad():
            scored, _ = self._forward(join([row]), with_entropy=False, raw=True)
        answer: npt.NDArray[np.float32] = scored.cpu().numpy()
        return answer

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight whole, under its Hugging Face name, bucket by bucket.

        Tied weights appear under both names, as an engine that repacks weights keeps its
        own copy of the head. A tensor is valid until the next one is asked for.
        """
        tied = {id(p): name for name, p in self.model.named_parameters()}
        head = self.model.lm_head.weight
        for bucket in _buckets(self.model):
            with engine.gathered([p for _, p in bucket], settings=self.settings):
                for name, parameter in bucket:
                    yield name, parameter.data
                    if parameter is head and tied[id(head)] != "lm_head.weight":
                        yield "lm_head.weight", parameter.data

    def close(self) -> None:
        """Give the engine's memory and hooks back; the policy is unusable afterwards."""
        distributed.barrier()
        self._engine.destroy()
        del self._engine, self._guard, self.model

    def _forward(
        self, batch: MicroBatch, *, with_entropy: bool, raw: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [K] of the trained tokens, on the device."""
        inputs = model_inputs(batch, layout=self.layout, pixels=self._pixels, device=self._device)
        banned = self._banned.to(self._device) if len(self._banned) and not raw else None
        answer: tuple[Tensor, Tensor] = self._engine(
            inputs,
            batch.trained_index.to(self._device),
            batch.targets.to(self._device),
            temperature=1.0 if raw else self._temperature,
            banned=banned,
            chunk=self.settings.head_chunk_tokens,
            with_entropy=with_entropy,
        )
        return answer


class _PackedModel(nn.Module):
    """Body on all tokens, head on the trained ones: the module DeepSpeed wraps."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs: ModelInputs, trained_index: Tensor, targets: Tensor, **head: Any
    ) -> tuple[Tensor, Tensor]:
        hidden = self.model.model(
            input_ids=inputs.input_ids,
            position_ids=inputs.positions,
            mm_token_type_ids=inputs.token_types,
            pixel_values=inputs.pixel_values,
            image_grid_thw=inputs.grids,
            use_cache=False,
            boundaries=inputs.boundaries,
        )[0]
        answer: tuple[Tensor, Tensor] = self.model.lm_head(
            hidden[0, trained_index], targets, **head
        )
        return answer


def _load(folder: Path, settings: LearnerSettings) -> Any:
    """The model with packed attention in its text part and a log-probability head."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=torch.bfloat16 if settings.precision == "bf16" else torch.float32,
        attn_implementation={"text_config": PACKED, "vision_config": "sdpa"},
    )
    if model.lm_head.bias is not None:
        raise LearnerError(f"{folder}: {config['model_type']} has a head with bias; wanted none")
    model.lm_head = LogprobHead.around(model.lm_head)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _totals(batches: Sequence[MicroBatch]) -> tuple[int, int]:
    """Trained tokens and sequences with any, over the micro-batches."""
    return sum(b.num_trained for b in batches), sum(b.num_sequences for b in batches)


def _buckets(model: nn.Module) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Named parameters in runs of about `GATHER_ELEMENTS`."""
    bucket: list[tuple[str, nn.Parameter]] = []
    held = 0
    for name, parameter in model.named_parameters():
        size = engine.full_size(parameter)
        if bucket and held + size > GATHER_ELEMENTS:
            yield bucket
            bucket, held = [], 0
        bucket.append((name, parameter))
        held += size
    if bucket:
        yield bucket
