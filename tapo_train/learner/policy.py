"""The policy being trained: a vision-language model inside a DeepSpeed engine.

All ranks call every method together (collectives run inside), `logprobs` and `score`
with as many micro-batches as each likes unless the weights are sharded. Ranks of one
sequence group (`sequence`) bring the same micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoConfig

from tapo_train.algos.aggregation import Aggregation, aggregate
from tapo_train.algos.metrics import Metrics, merge, pair
from tapo_train.errors import NonFiniteError
from tapo_train.learner import distributed, engine, fragments, packed_model, weights
from tapo_train.learner.batch import MicroBatch, TrainingRow, join
from tapo_train.learner.gradients import GradientGuard
from tapo_train.learner.layout import ModelLayout, PixelSource
from tapo_train.learner.objective import Objective, Observe
from tapo_train.learner.scorer import RAW, Distribution, Scorer
from tapo_train.learner.sequence import SequenceGroup
from tapo_train.learner.settings import LearnerSettings
from tapo_train.types import Image, Span


class Policy:
    """Log-probabilities, updates and weights of the model in a folder.

    Args:
        model: a Hugging Face folder.
        pixels: pictures -> patches, e.g. `ChatFormat.pixels`.
        temperature, banned_token_ids: the distribution the sampler draws from; all
            log-probabilities are of it, except in `score`.
        measure_entropy: entropies cost a softmax per trained token; objectives get None
            without.
        on_progress: called after the forward pass of each micro-batch.
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
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.source = model
        self.settings = settings
        self.distribution = Distribution(
            temperature=temperature, banned_token_ids=tuple(banned_token_ids)
        )
        self.device = distributed.init(device=device)
        self.sequence = SequenceGroup(settings.sequence_parallel)
        self._measure_entropy = measure_entropy
        # Before the weights are read, which takes minutes for a large model.
        config = AutoConfig.from_pretrained(model)
        self.sequence.check_heads(config.get_text_config().num_attention_heads)
        self.model = packed_model.load(model, settings=settings, device=self.device)
        self.layout = ModelLayout.of(self.model)
        self._engine = engine.start(
            packed_model.PackedModel(self.model, self.sequence),
            settings=settings,
            device=self.device,
        )
        self._guard = GradientGuard(self._engine, settings=settings)
        self._score = Scorer(
            module=self._engine,
            layout=self.layout,
            pixels=pixels,
            device=self.device,
            chunk=settings.head_chunk_tokens,
            distribution=self.distribution,
            sequence=self.sequence,
            on_progress=on_progress,
        )

    def logprobs(self, batch: MicroBatch) -> Tensor:
        """[K] log-probabilities of the trained tokens, on the CPU, without gradient."""
        with torch.no_grad():
            return self._score(batch)[0].cpu()

    def with_old_logprobs(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches with `old_logprobs` computed by the present weights.

        Ranks may hold different numbers of micro-batches.
        """
        return [
            replace(batch, old_logprobs=logprobs)
            for batch, logprobs in zip(batches, self.logprobs_of_all(batches), strict=True)
        ]

    def logprobs_of_all(
        self, batches: Sequence[MicroBatch], *, distribution: Distribution | None = None
    ) -> list[Tensor]:
        """[K] log-probabilities of each micro-batch, on all ranks together.

        Args:
            distribution: another than the sampler's.
        """
        return self._score.of_all(batches, distribution=distribution)

    def update(
        self,
        batches: Sequence[MicroBatch],
        objective: Objective,
        *,
        aggregation: Aggregation = "token-mean",
        norm_length: float | None = None,
        observe: Observe | None = None,
    ) -> Metrics:
        """One optimizer step on all ranks' micro-batches together.

        The loss is the mean over the step, whatever its cut into micro-batches and ranks.
        Ranks with fewer micro-batches take part with empty ones. Without a trained token on
        any rank no step is taken, and the answer is empty. `observe` looks on and changes nothing;
        entropies are measured for it, whether the objective wants them or not.

        Returns:
            This rank's (sum, count) pairs: of the objective, and `loss`, `grad_norm`,
            `learning_rate`, which are the same on all ranks. Add them over ranks.

        Raises:
            NonFiniteError: the loss or its gradient is not finite; weights and optimizer are
                untouched, and the next update is as if this one had not been asked for.
        """
        # Where all rows are idle a step is taken all the same: the optimizer has a momentum.
        num_steps = max(1, distributed.all_reduce_max(len(batches)))
        tokens, sequences, idle_tokens, idle_sequences = map(
            int, distributed.all_reduce_sum(_totals(batches))
        )
        # The ranks of a sequence group bring the same micro-batches, and idle rows of their own.
        step_tokens = tokens // self.sequence.size + idle_tokens
        step_sequences = sequences // self.sequence.size + idle_sequences
        if not step_tokens:
            return {}
        padded = [*batches, *(join([]) for _ in range(num_steps - len(batches)))]
        shares: list[Tensor] = []
        metrics: Metrics = {}
        self._engine.train()
        for batch, inputs in self._score.ahead(padded):
            moved = batch.to(self.device)
            measure = self._measure_entropy or observe is not None
            logprobs, entropy = self._score(moved, inputs, with_entropy=measure)
            if moved.num_trained:
                output = objective(moved, logprobs, entropy if self._measure_entropy else None)
                if observe is not None:
                    observe(moved, logprobs.detach(), entropy.detach(), output)
                share = aggregate(
                    output.per_token,
                    moved.trajectory,
                    moved.lengths,
                    mode=aggregation,
                    step_tokens=step_tokens,
                    step_sequences=step_sequences,
                    norm_length=norm_length,
                )
                metrics = merge(metrics, output.metrics)
            else:
                share = logprobs.sum()
            self._guard.backward(share)
            shares.append(share.detach())
        return metrics | self._step(self._finite_loss(shares, padded))

    def _step(self, loss: float) -> Metrics:
        """Let the optimizer step; what of it is the same on all ranks."""
        rate = self._engine.get_lr()[0]
        found = {"loss": loss, "grad_norm": self._guard.step(), "learning_rate": rate}
        return {
            f"update/{name}": pair(torch.tensor(value, dtype=torch.float64, device=self.device))
            for name, value in found.items()
        }

    def _finite_loss(self, shares: Sequence[Tensor], batches: Sequence[MicroBatch]) -> float:
        """The step's loss; NonFiniteError, with nothing left of its gradients, if it is none."""
        try:
            return self._guard.finite_loss(shares, batches)
        except NonFiniteError:
            largest = max(batches, key=lambda batch: batch.num_trained)
            self._guard.discard(self._score(largest)[0].sum())
            raise

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
            scored, _ = self._score(join([row]), distribution=RAW)
        answer: npt.NDArray[np.float32] = scored.cpu().numpy()
        return answer

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight whole, tied ones under both names; see `weights.named_weights`."""
        return weights.named_weights(self.model, settings=self.settings)

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder: weights, configuration and the source's processor."""
        files = self.model_files()
        if distributed.rank() == 0:
            files.write(folder)
        distributed.barrier()

    def model_files(self) -> weights.ModelFiles:
        """What `export` writes, as of now; on rank 0."""
        return weights.model_files(self.model, source=self.source, settings=self.settings)

    def offload_states(self) -> None:
        """Move master weights and optimizer states off the device until `reload_states`.

        Scores, exports and the sync work as before; ZeRO-2 only.
        """
        engine.offload_states(self._engine, device=self.device)

    def reload_states(self) -> None:
        """Move the states back: an update needs them."""
        engine.reload_states(self._engine)

    def learner_state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Copies of this rank's share of master weights and optimizer state, with metadata."""
        return fragments.collect(self._engine, self.model)

    def restore(self, files: Sequence[Path], *, updates: int) -> None:
        """Go on from `learner_state` of all ranks, after so many updates.

        Rates, betas and the like stay those of the settings.

        Raises:
            CheckpointError: the files are of other parameters.
        """
        fragments.restore(self._engine, self.model, files)
        engine.set_updates(self._engine, updates)

    @property
    def updates(self) -> int:
        """Optimizer updates done."""
        return int(self._engine.lr_scheduler.last_epoch)

    def close(self) -> None:
        """Give the engine's memory and hooks back; the policy is unusable afterwards."""
        distributed.barrier()
        self._engine.destroy()
        del self._engine, self._guard, self._score, self.model


def _totals(batches: Sequence[MicroBatch]) -> tuple[int, int, int, int]:
    """Trained tokens and sequences with any, over the micro-batches and over the idle rows."""
    return (
        sum(b.num_trained for b in batches),
        sum(b.num_sequences for b in batches),
        sum(b.idle_tokens for b in batches),
        sum(b.idle_sequences for b in batches),
    )
