"""Ragged batches for the tests of `algos`: padded with a mask, and flat."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tapo_train.algos.losses import PolicyLoss, TokenBatch, grpo, gspo, sapo
from tapo_train.algos.weighted import cispo, gmpo

LOSSES: dict[str, PolicyLoss] = {
    "grpo": functools.partial(grpo, clip_low=0.2, clip_high=0.28, dual_clip=3.0),
    "gspo": gspo,
    "sapo": sapo,
    "cispo": functools.partial(cispo, clip_high=1.0),
    "gmpo": gmpo,
}

MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
NORM_LENGTH = 16.0


@dataclass(frozen=True, kw_only=True)
class Padded:
    """[B, T] arrays; what the mask hides is rubbish on purpose."""

    logp: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor

    def rows(self, name: str) -> list[list[float]]:
        values: list[list[float]] = getattr(self, name).tolist()
        return values

    def flat(self, logp: Tensor | None = None) -> TokenBatch:
        """The trained tokens alone; `logp` [B, T] may carry a gradient."""
        logp = self.logp if logp is None else logp
        return TokenBatch(
            logprobs=logp[self.mask],
            old_logprobs=self.old[self.mask],
            advantages=self.advantages[self.mask],
            trajectory=self.mask.nonzero()[:, 0],
            lengths=self.mask.sum(dim=1),
        )

    def trajectories(self, index: slice) -> Padded:
        return Padded(
            logp=self.logp[index],
            old=self.old[index],
            advantages=self.advantages[index],
            mask=self.mask[index],
        )

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum())

    @property
    def num_sequences(self) -> int:
        return int(self.mask.any(dim=1).sum())


def padded_batch(
    per_trajectory: list[float],
    *,
    seed: int = 0,
    length: int = 12,
    per_token: bool = False,
    spread: float = 1.0,
    untrained: tuple[int, ...] = (2,),
) -> Padded:
    """A batch with one advantage per trajectory, or shifted from turn to turn.

    Log-ratios have about `spread`, so clips and dual clips do occur. Trajectories in
    `untrained` have no trained token. Masked positions hold -inf, nan and huge numbers.
    """
    rng = np.random.default_rng(seed)
    shape = (len(per_trajectory), length)
    mask = rng.random(shape) < 0.6
    mask[:, 0] = True
    mask[list(untrained)] = False
    old = -rng.exponential(1.0, shape)
    # The sequence ratio of GSPO needs trajectories inside and outside its narrow clip.
    scale = np.where(np.arange(shape[0]) % 3 == 0, 1e-4, spread)[:, None]
    logp = old + rng.normal(0.0, 1.0, shape) * scale
    advantages = np.repeat(np.asarray(per_trajectory)[:, None], length, axis=1)
    if per_token:
        advantages = advantages + rng.choice([-0.7, 0.0, 0.9], shape)
    for values, rubbish in ((old, np.nan), (logp, -np.inf), (advantages, 1e30)):
        values[~mask] = rubbish
    return Padded(
        logp=torch.from_numpy(logp),
        old=torch.from_numpy(old),
        advantages=torch.from_numpy(advantages),
        mask=torch.from_numpy(mask),
    )
