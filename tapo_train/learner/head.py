"""Log-probabilities at the trained positions: the LM head, never on all tokens.

Hidden states [K, h] come in, log-probabilities [K] go out; logits exist for one chunk
of rows at a time, in the forward pass and again, recomputed, in the backward pass.
The derivative of a log-probability by its logits is known (one-hot minus softmax),
so it is written down instead of traced.

Logits are float32 whatever the weights are. A logit of 20 in bf16 is known to 1/16 only: the
ratio of a sequence would leave GSPO's clip of 4e-4 by rounding alone. The sampler does the same
(`vllm_engine.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LogprobHead(nn.Linear):
    """An LM head that answers with log-probabilities of given targets.

    A Linear without bias that takes over the weight of the model's own head, so that
    names, tied weights and saved files stay what they are. It is called once per forward
    pass whatever the number of chunks, as ZeRO-3 gathers the weight once per call and the
    ranks must gather equally often.
    """

    @classmethod
    def around(cls, head: nn.Linear) -> LogprobHead:
        """A head that shares `head`'s weight."""
        wrapped = cls(1, 1, bias=False, device="meta")
        wrapped.in_features, wrapped.out_features = head.in_features, head.out_features
        wrapped.weight = head.weight
        return wrapped

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        temperature: float,
        banned: Tensor | None,
        chunk: int,
        with_entropy: bool,
    ) -> Tensor:
        """Log-probabilities of `targets` and entropies [nat] as one [2, K] float32 tensor.

        One tensor and not two: sharded training follows the gradient through every output
        of a module, and one that an objective leaves unused would take another path on
        the rank that does use it.

        The distribution is the sampler's: softmax(logits / temperature) over the ids that
        are not banned.

        Args:
            hidden: [K, h]; `targets`: [K] int64, none of them banned.
            banned: [B] int64 ids that cannot be sampled; None for none.
            chunk: rows of logits held at a time.
            with_entropy: False leaves the entropies at 0 and saves their cost.
        """
        answer: Tensor = _ChunkedLogprobs.apply(
            hidden, self.weight, targets, banned, 1.0 / temperature, chunk, with_entropy
        )
        return answer


CAST_ROWS = 2048
"""Rows of a half-precision weight that are float32 at a time where torch cannot mix types."""


def float32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [rows, h] @ weight [V, h].T, summed and kept in float32.

    Products of two bf16 numbers are exact in float32, so only the sum rounds. CUDA sums into
    float32 by itself; elsewhere the weight is cast a piece at a time, never as a whole.
    """
    if weight.dtype == torch.float32:
        return nn.functional.linear(hidden, weight)
    if weight.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    rows = hidden.float()
    logits = torch.empty(len(rows), len(weight), dtype=torch.float32, device=weight.device)
    for part, piece in zip(logits.split(CAST_ROWS, dim=1), weight.split(CAST_ROWS), strict=True):
        part.copy_(nn.functional.linear(rows, piece.float()))
    return logits


def _logits(hidden: Tensor, weight: Tensor, banned: Tensor | None, scale: float) -> Tensor:
    """[rows, vocabulary] float32 logits over temperature, -inf where banned."""
    logits = float32_logits(hidden, weight)
    if scale != 1.0:
        logits.mul_(scale)
    if banned is not None:
        logits.index_fill_(1, banned, -torch.inf)
    return logits


class _ChunkedLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / T)[targets] without keeping logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        banned: Tensor | None,
        scale: float,
        chunk: int,
        with_entropy: bool,
    ) -> Tensor:
        num_rows = hidden.shape[0]
        picked = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
        normaliser = torch.empty_like(picked)
        entropy = torch.zeros_like(picked)
        for start in range(0, num_rows, chunk):
            rows = slice(start, start + chunk)
            logits = _logits(hidden[rows], weight, banned, scale)
            normaliser[rows] = torch.logsumexp(logits, dim=1)
            picked[rows] = logits.gather(1, targets[rows, None]).squeeze(1)
            if with_entropy:
                entropy[rows] = _entropy(logits, normaliser[rows])
        ctx.save_for_backward(hidden, weight, targets, normaliser, entropy)
        ctx.banned, ctx.scale, ctx.chunk, ctx.with_entropy = banned, scale, chunk, with_entropy
        return torch.stack((picked - normaliser, entropy))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normaliser, entropy = ctx.saved_tensors
        slope, entropy_slope = grads[0]
        grad_hidden = torch.empty_like(hidden)
        # Sums over chunks stay in float32: bf16 would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logprobs = _logits(hidden[rows], weight, ctx.banned, ctx.scale)
            logprobs.sub_(normaliser[rows, None])
            factor = -slope[rows, None]
            if ctx.with_entropy:
                # dH / dlogit_v = -p_v (log p_v + H)
                excess = _finite(logprobs) + entropy[rows, None]
                factor = factor - entropy_slope[rows, None] * excess
            grad = logprobs.exp_().mul_(factor)
            grad.scatter_add_(1, targets[rows, None], slope[rows, None])
            grad = grad.mul_(ctx.scale).to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[rows])
            grad_weight += grad.t() @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def _entropy(logits: Tensor, normaliser: Tensor) -> Tensor:
    """[rows] entropy in nats."""
    logprobs = logits - normaliser[:, None]
    return -(logprobs.exp() * _finite(logprobs)).sum(dim=1)


def _finite(logprobs: Tensor) -> Tensor:
    """Log-probabilities with 0 for the banned ids, whose probability of 0 meets no -inf then."""
    return logprobs.masked_fill(torch.isneginf(logprobs), 0.0)
