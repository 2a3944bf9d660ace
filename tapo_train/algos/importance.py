"""Correction for tokens sampled by an engine that is not quite the learner.

The sampler (another program, other kernels, other precision, perhaps older weights)
drew the tokens with probability mu; the learner computes pi_old for the same tokens.
w = pi_old / mu multiplies the per-token loss AFTER the surrogate's own clipping.
Weights are constants: they carry no gradient. Tokens whose weight is 0 stay in every
denominator of the aggregation.

`uncorrected` is the baseline: weights of 1 with the same metrics. `log_linear_proximal` is no
correction: it estimates pi_old where nobody computed it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tapo_train.algos.losses import LOG_RATIO_BOUND
from tapo_train.algos.metrics import Metrics, by_index, pair
from tapo_train.errors import ConfigError, LearnerError

Level = Literal["token", "sequence"]
"""`token`: each token's own ratio. `sequence`: the product over all trained tokens of the
trajectory, the same for each of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """What the sampler and the learner say about the trained tokens of a micro-batch."""

    learner_logprobs: Tensor
    """[K] of the policy at the start of the step, computed by the learner."""
    sampler_logprobs: Tensor
    """[K] recorded while sampling, for the distribution the tokens were drawn from."""
    trajectory: Tensor
    """[K] int64, 0..n-1; whole trajectories."""
    num_trajectories: int
    current_logprobs: Tensor
    """[K] of the policy that is being updated, detached; at the first update `learner_logprobs`."""
    advantages: Tensor
    """[K]"""
    age: Tensor
    """[K] int64 >= 0: updates between the weights that drew the token and the start of the step."""
    max_age: int
    """Largest of them, known without asking the device."""

    def __post_init__(self) -> None:
        wanted = self.learner_logprobs.shape
        for name in ("sampler_logprobs", "trajectory", "current_logprobs", "advantages", "age"):
            found = getattr(self, name).shape
            if len(wanted) != 1 or found != wanted:
                raise LearnerError(
                    f"SampledTokens.{name} has shape {tuple(found)}, learner_logprobs "
                    f"{tuple(wanted)}; wanted the same [K]"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Importance weights and what they look like."""

    per_token: Tensor
    """[K] >= 0, detached."""
    metrics: Metrics
    """Detached (sum, count) pairs; see `algos.metrics`."""


Correction = Callable[[SampledTokens], Weights]
"""A correction with its hyper-parameters bound."""


@torch.no_grad()
def uncorrected(tokens: SampledTokens) -> Weights:
    """Weights of 1; the mismatch is measured all the same."""
    return Weights(
        per_token=torch.ones_like(tokens.learner_logprobs), metrics=_mismatch_metrics(tokens)
    )


@torch.no_grad()
def truncate(tokens: SampledTokens, *, level: Level = "token", high: float = 2.0) -> Weights:
    """min(w, high): truncated importance sampling.

    Args:
        high: largest weight, >= 1 (verl's default 2, TRL's 3).

    Raises:
        ConfigError: `high` below 1, unknown `level`.
    """
    if not high >= 1:
        raise ConfigError(f"truncate: high is {high}; wanted >= 1")
    raw = _ratio(tokens, level)
    weights = raw.clamp(max=high)
    metrics = _weight_metrics(raw, weights) | _mismatch_metrics(tokens)
    return Weights(per_token=weights, metrics=metrics)


@torch.no_grad()
def mask(
    tokens: SampledTokens, *, level: Level = "token", low: float = 0.5, high: float = 2.0
) -> Weights:
    """w inside [low, high] and 0 outside (token: IcePop; sequence: rejects trajectories).

    Raises:
        ConfigError: not 0 <= low <= 1 <= high, unknown `level`.
    """
    if not 0 <= low <= 1 <= high:
        raise ConfigError(f"mask: low, high are {low}, {high}; wanted 0 <= low <= 1 <= high")
    raw = _ratio(tokens, level)
    weights = raw * ((raw >= low) & (raw <= high))
    metrics = _weight_metrics(raw, weights) | _mismatch_metrics(tokens)
    return Weights(per_token=weights, metrics=metrics)


@torch.no_grad()
def geometric_mask(
    tokens: SampledTokens, *, low: float = 0.99, high: float = 1.01, cap: float = 2.0
) -> Weights:
    """min(w, cap), and 0 for whole trajectories whose geometric mean of w is outside [low, high].

    The mean over a trajectory's trained tokens does not grow with its length, so that long
    trajectories are not rejected for being long, as with the product.

    Args:
        cap: largest weight of a token that is left, >= 1.

    Raises:
        ConfigError: not 0 <= low <= 1 <= high, `cap` below 1.
    """
    if not 0 <= low <= 1 <= high:
        raise ConfigError(
            f"geometric_mask: low, high are {low}, {high}; wanted 0 <= low <= 1 <= high"
        )
    if not cap >= 1:
        raise ConfigError(f"geometric_mask: cap is {cap}; wanted >= 1")
    raw, mean = _ratio(tokens, "token"), _geometric_mean(tokens)
    weights = raw.clamp(max=cap) * ((mean >= low) & (mean <= high))
    metrics = _weight_metrics(raw, weights) | _mismatch_metrics(tokens)
    return Weights(per_token=weights, metrics=metrics)


@torch.no_grad()
def total_variation_mask(tokens: SampledTokens, *, delta: float = 0.2) -> Weights:
    """w, and 0 where the policy has gone far enough from the sampler in the token's direction.

    DPPO (2602.04879) with the binary total variation |pi - mu| of the token drawn: 0 where A > 0
    and pi - mu > delta, or A < 0 and mu - pi > delta. A change of probability and not of ratio,
    so rare tokens may move by large factors and common ones may not. Moving back is never masked.
    The weight itself has no cap: with the surrogate's own ratio pi / pi_old it makes pi / mu.

    Args:
        delta: in (0, 1].

    Raises:
        ConfigError: `delta` outside (0, 1].
    """
    if not 0 < delta <= 1:
        raise ConfigError(f"total_variation_mask: delta is {delta}; wanted in (0, 1]")
    moved = tokens.current_logprobs.exp() - tokens.sampler_logprobs.exp()
    raw = _ratio(tokens, "token")
    weights = raw * ~(moved * tokens.advantages.sign() > delta)
    metrics = _weight_metrics(raw, weights) | _mismatch_metrics(tokens)
    return Weights(per_token=weights, metrics=metrics)


@torch.no_grad()
def log_linear_proximal(current: Tensor, sampler: Tensor, age: Tensor) -> Tensor:
    """[K] estimate of log pi_old between sampler and current policy, without a forward pass.

    AReaL's `loglinear` (2505.24298's code): the weights moved on by one version a step, so the
    policy at the start of this step, `age` versions after the sampler's, lies at
    age / (age + 1) of the way from the sampler to the current policy (age + 1 versions after
    it), on a straight line of log-probabilities. A token of age 0 has its sampler's.

    Args:
        current: [K] log-probabilities of the policy that is being updated.
        sampler: [K] as sampled.
        age: [K] int64, see `SampledTokens.age`.
    """
    share = age.to(current.dtype) / (age + 1)
    return sampler + share * (current - sampler)


def _geometric_mean(tokens: SampledTokens) -> Tensor:
    """[K] geometric mean of pi_old / mu over the tokens of each one's trajectory."""
    log_ratio = tokens.learner_logprobs - tokens.sampler_logprobs
    sums = log_ratio.new_zeros(2, tokens.num_trajectories)
    sums[0].index_add_(0, tokens.trajectory, log_ratio)
    sums[1].index_add_(0, tokens.trajectory, torch.ones_like(log_ratio))
    return (sums[0] / sums[1])[tokens.trajectory].exp()


def _ratio(tokens: SampledTokens, level: Level) -> Tensor:
    """[K] pi_old / mu at the level asked for; logarithms are held within ±20."""
    log_ratio = tokens.learner_logprobs - tokens.sampler_logprobs
    if level == "sequence":
        sums = log_ratio.new_zeros(tokens.num_trajectories)
        log_ratio = sums.index_add_(0, tokens.trajectory, log_ratio)[tokens.trajectory]
    elif level != "token":
        raise ConfigError(f"importance level is {level!r}; wanted one of {get_args(Level)}")
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def _weight_metrics(raw: Tensor, weights: Tensor) -> Metrics:
    """Moments of the weights used: (mean^2 / mean of squares) is the effective sample share."""
    return {
        "importance/weight": pair(weights),
        "importance/weight_squared": pair(weights.square()),
        "importance/changed": pair(weights != raw),
    }


def _mismatch_metrics(tokens: SampledTokens) -> Metrics:
    """Distance between sampler and learner, per token, before any correction.

    `k1` and `k3` estimate KL(mu || pi_old) from tokens drawn from mu.
    """
    log_ratio = tokens.learner_logprobs - tokens.sampler_logprobs
    log_ratio.clamp_(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    apart = log_ratio.abs()
    found = {
        "mismatch/k1": pair(-log_ratio),
        "mismatch/k3": pair(torch.expm1(log_ratio) - log_ratio),
        "mismatch/abs_logprob_diff": pair(apart),
    }
    if tokens.max_age == 0:
        return found
    by_age = by_index("mismatch/abs_logprob_diff/by_age", apart, tokens.age, tokens.max_age + 1)
    return found | by_age
