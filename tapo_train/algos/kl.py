"""Per-token estimators of KL(pi || pi_ref), from tokens drawn from pi.

With x = log pi_ref - log pi of the sampled token (Schulman, "Approximating KL
divergence", 2020):

    k1   -x               unbiased, may be negative
    abs  |x|
    k2   x^2 / 2          biased, its gradient is that of KL(pi || pi_ref)
    k3   e^x - x - 1      unbiased and >= 0 ("low_var_kl")
    k1+  value of k1, gradient of k2
    k3+  value of k3, gradient of k2

As a loss, k1's own gradient is grad log pi, which is zero in expectation and does
not pull towards the reference, and k3's is that of the reverse direction,
KL(pi_ref || pi): hence the straight-through forms.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from tapo_train.algos.losses import LossOutput
from tapo_train.algos.metrics import pair
from tapo_train.errors import ConfigError, LearnerError

KlKind = Literal["k1", "abs", "k2", "k3", "k1+", "k3+"]

LOG_RATIO_BOUND = 20.0
"""k3's x is held within ±20 (as verl does)."""
K3_BOUND = 10.0
"""k3 itself is held at 10 (as verl does), so one token cannot swamp a batch."""


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, *, kind: KlKind) -> Tensor:
    """[K] estimates; the gradient flows through `logprobs` alone.

    Args:
        logprobs: [K] of the policy being trained.
        ref_logprobs: [K] of the reference policy, taken as constants.

    Raises:
        ConfigError: unknown `kind`.
        LearnerError: shapes differ.
    """
    if logprobs.shape != ref_logprobs.shape:
        raise LearnerError(
            f"kl_per_token: logprobs have shape {tuple(logprobs.shape)}, ref_logprobs "
            f"{tuple(ref_logprobs.shape)}; wanted the same [K]"
        )
    if kind not in get_args(KlKind):
        raise ConfigError(f"kl kind is {kind!r}; wanted one of {get_args(KlKind)}")
    x = ref_logprobs.detach() - logprobs
    if kind == "k1":
        return -x
    if kind == "abs":
        return x.abs()
    if kind == "k2":
        return x.square() / 2
    if kind == "k3":
        return _k3(x)
    value = -x if kind == "k1+" else _k3(x)
    return _with_gradient_of(value, x.square() / 2)


def kl_penalty(
    logprobs: Tensor, ref_logprobs: Tensor, *, kind: KlKind, coefficient: float
) -> LossOutput:
    """coefficient KL per token [K], to be added to a loss before the aggregation.

    The metrics hold the estimate asked for and, whatever that is, k1 (unbiased), k2 and k3.

    Raises:
        ConfigError: unknown `kind`, or a coefficient below 0.
        LearnerError: shapes differ.
    """
    if not coefficient >= 0:
        raise ConfigError(f"kl_penalty: coefficient is {coefficient}; wanted >= 0")
    estimate = kl_per_token(logprobs, ref_logprobs, kind=kind)
    with torch.no_grad():
        others = {
            f"kl/{name}": pair(kl_per_token(logprobs, ref_logprobs, kind=name))
            for name in ("k1", "k2", "k3")
        }
    return LossOutput(
        per_token=estimate * coefficient, metrics={"policy/ref_kl": pair(estimate)} | others
    )


def _k3(x: Tensor) -> Tensor:
    bounded = x.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return (torch.expm1(bounded) - bounded).clamp(max=K3_BOUND)


def _with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    """`value` forwards, `other` backwards."""
    return value.detach() + (other - other.detach())
