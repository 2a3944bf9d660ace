"""The three policy surrogates on flat trained tokens: GRPO, GSPO, SAPO.

Shapes: K trained tokens of the micro-batch in one vector, n trajectories. Entry k
speaks of one token: its log-probability given everything before it. Tokens that
are not trained do not occur, so there is no mask and nothing they could leak.

A loss returns per-token values; `aggregation.aggregate` averages them. Advantages
are per token, as the credit stage leaves them. In all three losses a token's value
depends on the gradient-carrying log-probability of that token alone, so the
derivative is one number per token. It is written down beside the value and handed
to autograd: one saved vector in place of the dozen a traced formula keeps.

At ratio 1 the derivative is -A, REINFORCE's, for all three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tapo_train.algos.metrics import Metrics, by_index, pair
from tapo_train.errors import ConfigError, LearnerError

LOG_RATIO_BOUND = 20.0
"""Token log-ratios beyond ±20 are held there, without gradient (as verl does)."""
SEQUENCE_LOG_RATIO_BOUND = 10.0
"""A sequence's mean log-ratio is held at 10 from above, without gradient (as verl does)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """The trained tokens of one micro-batch. Whole trajectories only."""

    logprobs: Tensor
    """[K] of the policy being trained; carries the gradient."""
    old_logprobs: Tensor
    """[K] of the policy at the start of the step (the learner's own)."""
    advantages: Tensor
    """[K] of each token."""
    trajectory: Tensor
    """[K] int64, 0..n-1 within the micro-batch."""
    lengths: Tensor
    """[n] trained tokens of each whole trajectory."""
    group: Tensor | None = None
    """[n] int64, 0..groups-1: trajectories of one question share a number. All of a question's
    are in the micro-batch only for a loss that says `@over_groups`."""
    turn: Tensor | None = None
    """[K] int64, assistant turn of each token: clips and gates are then told by turn as well."""
    num_turns: int = 0
    """More than every entry of `turn`."""

    def __post_init__(self) -> None:
        wanted = self.logprobs.shape
        for name in ("old_logprobs", "advantages", "trajectory"):
            found = getattr(self, name).shape
            if len(wanted) != 1 or found != wanted:
                raise LearnerError(
                    f"TokenBatch.{name} has shape {tuple(found)}, logprobs {tuple(wanted)}; "
                    "wanted the same [K]"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """Per-token loss and its metrics."""

    per_token: Tensor
    """[K] loss to be minimised; not yet averaged."""
    metrics: Metrics
    """Detached (sum, count) pairs; see `algos.metrics`."""
    old_logprobs: Tensor | None = None
    """[K] what the probability ratio was taken to, without gradient; None where there is none."""


PolicyLoss = Callable[[TokenBatch], LossOutput]
"""A loss with its hyper-parameters bound."""

L = TypeVar("L", bound=Callable[..., object])


def over_groups(loss: L) -> L:
    """Mark a loss (a function, or a class of losses) that compares a question's trajectories.

    Its micro-batches then hold every question whole, however large that makes them, and its
    `TokenBatch.group` says which trajectories belong together.
    """
    loss.is_over_groups = True  # type: ignore[attr-defined]
    return loss


def is_over_groups(loss: Callable[..., object]) -> bool:
    """Whether a loss, its hyper-parameters bound or not, was marked so."""
    return bool(getattr(getattr(loss, "func", loss), "is_over_groups", False))


def grpo(
    batch: TokenBatch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
) -> LossOutput:
    """Clipped token-level surrogate (GRPO, 2402.03300; clip-higher: DAPO, 2503.14476).

    With r = pi / pi_old:  max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), and for
    A < 0 at most -A dual_clip (dual clip, 1912.09729).

    Args:
        clip_low: below 1 by at most this, in (0, 1).
        clip_high: above 1 by at most this; 0.28 in DAPO.
        dual_clip: ratio beyond which a negative token is held; > 1, None for never.

    Raises:
        ConfigError: a hyper-parameter outside its range.
    """
    _check_clip("grpo", clip_low, clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ConfigError(f"grpo: dual_clip is {dual_clip}; wanted > 1 or none")
    with torch.no_grad():
        log_ratio, is_free = log_ratio_of(batch)
        metrics = ratio_metrics(log_ratio)
        ratio = log_ratio.exp_()
    bounds = (1 - clip_low, 1 + clip_high, dual_clip)
    return _clipped(batch, ratio, is_free, bounds=bounds, metrics=metrics)


def gspo(batch: TokenBatch, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> LossOutput:
    """Sequence-level ratio in token form (GSPO-token, 2507.18071 eq. 13-14).

    s_i = exp(mean_t log(pi / pi_old)) over the policy's own tokens of trajectory i, as a
    constant; s_it = s_i pi_t / sg[pi_t] carries each token's gradient;
    max(-A_t s_it, -A_t clip(s_it, 1 - clip_low, 1 + clip_high)). With one advantage per
    trajectory it equals plain GSPO in value and gradient under a sequence mean; with
    per-step advantages plain GSPO would smear them over the sequence.

    Raises:
        ConfigError: a hyper-parameter outside its range.
        LearnerError: a trajectory was cut, so its ratio cannot be computed.
    """
    _check_clip("gspo", clip_low, clip_high)
    with torch.no_grad():
        log_sequence_ratio, metrics = _sequence_log_ratio(batch)
        bounded = log_sequence_ratio.clamp(max=SEQUENCE_LOG_RATIO_BOUND)
        ratio = bounded.exp().index_select(0, batch.trajectory)
        is_free = (bounded == log_sequence_ratio).index_select(0, batch.trajectory)
    bounds = (1 - clip_low, 1 + clip_high, None)
    return _clipped(batch, ratio, is_free, bounds=bounds, metrics=metrics)


def sapo(batch: TokenBatch, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> LossOutput:
    """Soft gate in place of the clip (SAPO, 2511.20347).

    -A f(r) with f(r) = sigmoid(tau (r - 1)) 4 / tau, tau = tau_pos where A > 0 and
    tau_neg elsewhere, by each token's own advantage. Derivative by log pi:
    -A r 4 p (1 - p), p = sigmoid(tau (r - 1)).

    Args:
        tau_pos, tau_neg: temperatures > 0; the larger, the faster distant tokens fade.

    Raises:
        ConfigError: a temperature that is not positive.
    """
    if not (tau_pos > 0 and tau_neg > 0):
        raise ConfigError(f"sapo: tau_pos, tau_neg are {tau_pos}, {tau_neg}; wanted > 0")
    with torch.no_grad():
        log_ratio, is_free = log_ratio_of(batch)
        metrics = ratio_metrics(log_ratio)
        ratio = log_ratio.exp_()
        tau = torch.full_like(ratio, tau_neg).masked_fill_(batch.advantages > 0, tau_pos)
        gate = ((ratio - 1) * tau).sigmoid_()
        weight = torch.addcmul(gate, gate, gate, value=-1).mul_(4)  # 4 p (1 - p)
        metrics["policy/gate_weight"] = pair(weight)
        metrics |= by_index("policy/gate_weight/by_turn", weight, batch.turn, batch.num_turns)
        slope = weight.mul_(ratio).mul_(batch.advantages).neg_().mul_(is_free)
        value = gate.mul_(-4).div_(tau).mul_(batch.advantages)
    return LossOutput(per_token=attach(batch.logprobs, value, slope), metrics=metrics)


class _KnownSlope(torch.autograd.Function):
    """`value` forwards, `slope` times the incoming gradient backwards."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grads[0] * slope, None, None


def attach(logprobs: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """`value` [K] whose derivative by `logprobs` [K] is `slope` [K]."""
    attached: Tensor = _KnownSlope.apply(logprobs, value, slope)
    return attached


def log_ratio_of(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Bounded log(pi / pi_old) [K], and where the bound did not bite [K]."""
    free = batch.logprobs.detach() - batch.old_logprobs
    is_free = free.abs() <= LOG_RATIO_BOUND
    return free.clamp_(-LOG_RATIO_BOUND, LOG_RATIO_BOUND), is_free


def _clipped(
    batch: TokenBatch,
    ratio: Tensor,
    is_free: Tensor,
    *,
    bounds: tuple[float, float, float | None],
    metrics: Metrics,
) -> LossOutput:
    """max(-A r, -A clip(r, low, high)), for A < 0 at most -A top; `bounds` is (low, high, top).

    The pessimistic choice bites on one side only, which the sign of A tells: above `high`
    for positive tokens; below `low`, and above `top`, for the others. As r is the
    exponential of log pi plus a constant, the derivative of -A r is -A r itself, and 0
    where r is held or was bounded before (`is_free` False).
    """
    low, high, top = bounds
    held = torch.where(batch.advantages > 0, ratio.clamp(max=high), ratio.clamp(min=low, max=top))
    is_free &= held == ratio
    metrics |= _clip_metrics(ratio, held, batch)
    value = held.mul_(batch.advantages).neg_()
    return LossOutput(per_token=attach(batch.logprobs, value, value * is_free), metrics=metrics)


def _sequence_log_ratio(batch: TokenBatch) -> tuple[Tensor, Metrics]:
    """[n] mean of each whole trajectory's log(pi / pi_old), and the tokens' metrics.

    0 for a trajectory without trained tokens, which no token refers to.
    """
    counts = check_whole(batch, name="gspo")
    log_ratio = batch.logprobs.detach() - batch.old_logprobs
    sums = log_ratio.new_zeros(counts.shape[0]).index_add_(0, batch.trajectory, log_ratio)
    return sums / counts.clamp(min=1), ratio_metrics(log_ratio)


def check_whole(batch: TokenBatch, *, name: str) -> Tensor:
    """[n] trained tokens of each trajectory, which is here as a whole.

    Raises:
        LearnerError: a trajectory was cut.
    """
    counts = torch.bincount(batch.trajectory, minlength=batch.lengths.shape[0])
    if not torch.equal(counts, batch.lengths.to(counts.dtype)):
        raise LearnerError(
            f"{name}: the micro-batch holds other numbers of trained tokens per trajectory than "
            "`lengths` says; wanted whole trajectories, as the ratio is a mean over all of one's "
            "tokens"
        )
    return counts


def ratio_metrics(log_ratio: Tensor) -> Metrics:
    """Distance between the policy and the one at the start of the step, per token.

    `policy/kl` is the k3 estimate of KL(pi_old || pi) = E_old[r - 1 - log r].
    """
    excess = torch.expm1(log_ratio)
    return {
        "policy/ratio_minus_one": pair(excess),
        "policy/kl": pair(excess - log_ratio),
    }


def _clip_metrics(ratio: Tensor, held: Tensor, batch: TokenBatch) -> Metrics:
    """Shares of tokens held above, below and by the dual clip; by turn whichever it was."""
    is_above, advantages = held < ratio, batch.advantages
    return {
        "policy/clip_high": pair(is_above & (advantages > 0)),
        "policy/clip_low": pair((held > ratio) & (advantages < 0)),
        "policy/clip_dual": pair(is_above & (advantages < 0)),
    } | by_index(
        "policy/clip/by_turn", (held != ratio) & (advantages != 0), batch.turn, batch.num_turns
    )


def _check_clip(name: str, clip_low: float, clip_high: float) -> None:
    if not (0 < clip_low < 1 and clip_high > 0):
        raise ConfigError(
            f"{name}: clip_low, clip_high are {clip_low}, {clip_high}; wanted in (0, 1) and > 0"
        )
