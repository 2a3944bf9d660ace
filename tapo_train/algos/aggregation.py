"""From per-token values to one scalar, with the counts of the whole optimizer step.

The step's tokens are spread over micro-batches and ranks. Each call returns one
share; the sum of all shares over micro-batches and ranks is the mean over the
step, whatever the cut. A learner whose gradient reduction averages over ranks
instead of adding must multiply its share by the number of ranks.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from tapo_train.errors import ConfigError, LearnerError

Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]


def aggregate(
    per_token: Tensor,
    trajectory: Tensor,
    lengths: Tensor,
    *,
    mode: Aggregation,
    step_tokens: int,
    step_sequences: int,
    norm_length: float | None = None,
) -> Tensor:
    """This micro-batch's share of the step-wide mean of `per_token`.

    With the sequence i's tokens l_it, its length L_i and N sequences in the step:

        token-mean               sum_it l_it / step_tokens           (DAPO, 2503.14476)
        seq-mean-token-mean      sum_i (sum_t l_it / L_i) / N        (GRPO, GSPO, SAPO)
        seq-mean-token-sum       sum_i (sum_t l_it) / N
        seq-mean-token-sum-norm  sum_i (sum_t l_it) / (N norm_length)    (Dr. GRPO, 2503.20783)

    Args:
        per_token: [K] values of the trained tokens.
        trajectory: [K] int64, index into `lengths`.
        lengths: [n] trained tokens of each WHOLE trajectory; 0 for one without any.
        step_tokens: trained tokens of the step, over all micro-batches and ranks.
            Tokens whose advantage became 0 or whose importance weight is 0 count.
        step_sequences: trajectories with at least one trained token, over the same.
        norm_length: constant of the last mode [tokens], e.g. the longest response allowed.

    Raises:
        ConfigError: unknown mode, or `norm_length` missing or not positive where needed.
        LearnerError: a step without trained tokens or sequences.
    """
    if step_tokens <= 0 or step_sequences <= 0:
        raise LearnerError(
            f"aggregate: the step holds {step_tokens} trained tokens in {step_sequences} "
            "sequences; wanted at least one of each"
        )
    if mode == "token-mean":
        return per_token.sum() / step_tokens
    if mode == "seq-mean-token-mean":
        # Weighing tokens sums more accurately in float32 than adding up each trajectory in
        # turn, and several times faster. No token selects the 1/0 of an empty trajectory.
        weights = lengths.to(per_token.dtype).reciprocal()
        return (per_token * weights.index_select(0, trajectory)).sum() / step_sequences
    if mode == "seq-mean-token-sum":
        return per_token.sum() / step_sequences
    if mode == "seq-mean-token-sum-norm":
        if norm_length is None or not norm_length > 0:
            raise ConfigError(
                f"aggregate: norm_length is {norm_length}; {mode} wants a positive number of tokens"
            )
        return per_token.sum() / (step_sequences * norm_length)
    raise ConfigError(f"aggregate: mode is {mode!r}; wanted one of {get_args(Aggregation)}")
