"""Entropy of the policy per token, and the bonus that rewards it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tapo_train.algos.losses import LossOutput
from tapo_train.algos.metrics import pair
from tapo_train.errors import ConfigError


def token_entropy(logits: Tensor) -> Tensor:
    """[..., V] logits to [...] entropies [nat]: H = logsumexp(z) - sum softmax(z) z.

    A banned token (logit -inf) adds nothing, and no NaN.
    """
    finite = logits.masked_fill(logits == -math.inf, 0.0)
    return torch.logsumexp(logits, dim=-1) - (logits.softmax(dim=-1) * finite).sum(dim=-1)


def entropy_bonus(entropy: Tensor, *, coefficient: float) -> LossOutput:
    """-coefficient H per token [K], to be added to a loss before the aggregation.

    Raises:
        ConfigError: a coefficient below 0, which would punish entropy.
    """
    if not coefficient >= 0:
        raise ConfigError(f"entropy_bonus: coefficient is {coefficient}; wanted >= 0")
    return LossOutput(per_token=entropy * -coefficient, metrics={"policy/entropy": pair(entropy)})
