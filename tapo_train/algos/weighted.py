"""Two further surrogates: CISPO, which bounds a weight instead of the gradient, and GMPO.

Shapes and conventions are those of `losses`; at ratio 1 the derivative is -A in both.
"""

from __future__ import annotations

import torch

from tapo_train.algos.losses import (
    LossOutput,
    TokenBatch,
    attach,
    check_whole,
    log_ratio_of,
    ratio_metrics,
)
from tapo_train.algos.metrics import pair
from tapo_train.errors import ConfigError

__all__ = ["cispo", "gmpo"]


def cispo(batch: TokenBatch, *, clip_low: float = 1.0, clip_high: float = 0.28) -> LossOutput:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi (MiniMax-M1, 2506.13585, eq. 4-5).

    Every token keeps a gradient, whose weight is bounded.

    Args:
        clip_low: in (0, 1]; 1 leaves small weights as they are, as the paper does.
        clip_high: above 1 by at most this, > 0; the paper tunes it and does not say it.

    Raises:
        ConfigError: a hyper-parameter outside its range.
    """
    if not (0 < clip_low <= 1 and clip_high > 0):
        raise ConfigError(
            f"cispo: clip_low, clip_high are {clip_low}, {clip_high}; wanted in (0, 1] and > 0"
        )
    with torch.no_grad():
        log_ratio, _ = log_ratio_of(batch)
        metrics = ratio_metrics(log_ratio)
        ratio = log_ratio.exp()
        weight = ratio.clamp(1 - clip_low, 1 + clip_high)
        metrics["policy/clip_high"] = pair(weight < ratio)
        metrics["policy/clip_low"] = pair(weight > ratio)
        slope = weight.mul_(batch.advantages).neg_()
        value = slope * batch.logprobs.detach()
    return LossOutput(per_token=attach(batch.logprobs, value, slope), metrics=metrics)


def gmpo(batch: TokenBatch, *, clip_low: float = 0.4, clip_high: float = 0.4) -> LossOutput:
    """Geometric mean of clipped token ratios (GMPO, 2507.20673, eq. 4), in token form.

    With d = log(pi / pi_old) held at clip_high from above where A > 0 and at -clip_low from below
    elsewhere, s_i = exp(mean_t of the held d) is a constant of the trajectory; a token's loss is
    -A_t s_i, and its gradient -A_t s_i unless d was held. With one advantage per trajectory that
    is the paper's objective in value and gradient, under a sequence mean.

    Args:
        clip_low, clip_high: of the LOG ratio, > 0; the paper's range is (e^-0.4, e^0.4).

    Raises:
        ConfigError: a hyper-parameter outside its range.
        LearnerError: a trajectory was cut, so its mean cannot be computed.
    """
    if not (clip_low > 0 and clip_high > 0):
        raise ConfigError(f"gmpo: clip_low, clip_high are {clip_low}, {clip_high}; wanted > 0")
    with torch.no_grad():
        counts = check_whole(batch, name="gmpo")
        log_ratio, is_free = log_ratio_of(batch)
        metrics = ratio_metrics(log_ratio)
        above = (batch.advantages > 0) & (log_ratio > clip_high)
        below = (batch.advantages <= 0) & (log_ratio < -clip_low)
        held = log_ratio.masked_fill(above, clip_high).masked_fill(below, -clip_low)
        metrics["policy/clip_high"] = pair(above)
        metrics["policy/clip_low"] = pair(below)
        sums = held.new_zeros(counts.shape[0]).index_add_(0, batch.trajectory, held)
        mean = (sums / counts.clamp(min=1)).exp_()
        value = mean.index_select(0, batch.trajectory).mul_(batch.advantages).neg_()
        slope = value * (is_free & ~above & ~below)
    return LossOutput(per_token=attach(batch.logprobs, value, slope), metrics=metrics)
