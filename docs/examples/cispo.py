"""CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4-5): a loss outside the package.

algo/loss=custom algo.loss.path=cispo:cispo algo.loss.arguments={clip_high: 2.0}
"""

from __future__ import annotations

import torch

from tapo_train.algos.losses import LossOutput, TokenBatch
from tapo_train.algos.metrics import pair


def cispo(batch: TokenBatch, *, clip_low: float = 1.0, clip_high: float = 0.28) -> LossOutput:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi: the clip bounds a weight, no gradient.

    Args:
        clip_low: 1 bounds the weight by 0 alone, as the paper does.
    """
    with torch.no_grad():
        ratio = (batch.logprobs - batch.old_logprobs).clamp(-20, 20).exp()
        weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return LossOutput(
        per_token=-weight * batch.advantages * batch.logprobs,
        metrics={"policy/cispo_clipped": pair(weight != ratio)},
    )
