"""What the learner thought of each token it learned from, as JSON objects.

Seen in the update's own forward passes, so nothing is computed twice; nothing is moved off the
device before the objects are asked for, so no pass waits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tapo_train.algos.losses import LossOutput
from tapo_train.learner.batch import MicroBatch

__all__ = ["TokenScores"]

_DIGITS = 6
"""Significant ones; float32 has seven."""


class TokenScores:
    """Watches the updates of a step on one rank (`learner.objective.Observe`)."""

    def __init__(self) -> None:
        self._seen: list[tuple[tuple[str, ...], Tensor, Tensor]] = []

    def __call__(
        self, batch: MicroBatch, logprobs: Tensor, entropy: Tensor, output: LossOutput
    ) -> None:
        """Keep a micro-batch's log-probabilities, ratios and entropies, [K] each."""
        old = output.old_logprobs
        ratio = torch.full_like(logprobs, torch.nan) if old is None else (logprobs - old).exp()
        values = torch.stack((logprobs, ratio, entropy))
        self._seen.append((batch.row_ids, batch.lengths, values))

    def rows(self) -> Iterator[dict[str, Any]]:
        """One object per trajectory: its `id` and a number per sampled token, in order.

        `logprobs`: the learner's when it updated on the trajectory, the last time where it did so
        more than once; `ratio`: that over the probability which the loss compared with; `entropy`
        [nat] of the learner's distribution. Null where not finite. Trajectories that no update
        passed through (left out, or without any gradient) have no object.
        """
        found: dict[str, dict[str, Any]] = {}
        for names, lengths, values in self._seen:
            parts = values.cpu().split(lengths.tolist(), dim=1)
            for name, part in zip(names, parts, strict=True):
                logprobs, ratio, entropy = ([_short(v) for v in row] for row in part.tolist())
                found[name] = {
                    "id": name,
                    "logprobs": logprobs,
                    "ratio": ratio,
                    "entropy": entropy,
                }
        yield from found.values()


def _short(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
