"""A regression on the advantage, after Reg-GRPO (DeepVideo-R1, arXiv 2506.07464), without a clip.

    algo: {loss: {name: custom, path: tapo_train.systems.deepvideo:reg_grpo}}
    algo.aggregation: seq-mean-token-sum

With s_i = beta sum_t log(pi / pi_old) of trajectory i, what the policy says of its advantage is
s_i minus the mean of its question's trajectories; the loss is the squared distance to the
advantage A_i. A trajectory's gradient thus hangs on those of the same question, which is why the
micro-batches have to hold questions whole.
"""

from __future__ import annotations

import torch

from tapo_train.algos.losses import LossOutput, TokenBatch, over_groups
from tapo_train.algos.metrics import pair


@over_groups
def reg_grpo(batch: TokenBatch, *, beta: float = 1.0) -> LossOutput:
    """(s_i - mean of the group - A_i)^2, dealt out evenly to the trajectory's tokens [K]."""
    assert batch.group is not None
    count = batch.lengths.shape[0]
    trained = batch.lengths > 0
    ratio = batch.logprobs - batch.old_logprobs
    said = beta * ratio.new_zeros(count).index_add(0, batch.trajectory, ratio)
    groups = int(batch.group.max()) + 1
    size = torch.bincount(batch.group[trained], minlength=groups).clamp(min=1)
    mean = said.new_zeros(groups).index_add(0, batch.group, said) / size
    wanted = said.new_zeros(count).index_add(0, batch.trajectory, batch.advantages.to(said))
    wanted = wanted / batch.lengths.clamp(min=1)
    square = (said - mean[batch.group] - wanted) ** 2
    share = square / batch.lengths.clamp(min=1)
    return LossOutput(
        per_token=share[batch.trajectory],
        metrics={"policy/regression": pair(square[trained])},
    )
