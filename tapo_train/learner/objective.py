"""What is minimised: per-token losses of a micro-batch's log-probabilities.

Policy gradient and supervised training are two objectives of one type, so the update
knows neither. Averages are taken elsewhere (`algos.aggregation`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tapo_train.algos.entropy import entropy_bonus
from tapo_train.algos.importance import Correction, SampledTokens, uncorrected
from tapo_train.algos.kl import KlKind, kl_penalty
from tapo_train.algos.losses import LossOutput, PolicyLoss, TokenBatch
from tapo_train.algos.metrics import pair
from tapo_train.errors import LearnerError
from tapo_train.learner.batch import MicroBatch

Objective = Callable[[MicroBatch, Tensor, Tensor | None], LossOutput]
"""(micro-batch, log-probabilities [K], entropies [K] if measured) -> per-token loss, metrics."""

Observe = Callable[[MicroBatch, Tensor, Tensor, LossOutput], None]
"""(micro-batch, log-probabilities [K], entropies [K], what the objective made of them), all without
gradient and where the device has them: told of every micro-batch that is learned from."""

Proximal = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(current [K], sampler [K], age [K]) -> log-probabilities [K] at the start of the step."""


def policy_gradient(
    loss: PolicyLoss,
    *,
    correction: Correction = uncorrected,
    is_only_update: bool = False,
    proximal: Proximal | None = None,
    kl_kind: KlKind = "k3+",
    kl_coefficient: float = 0.0,
    entropy_coefficient: float = 0.0,
) -> Objective:
    """A surrogate times the importance weights, plus KL penalty and entropy bonus.

    The weights between sampler and learner multiply after the surrogate's clipping and
    carry no gradient; the two other terms are not weighted.

    Args:
        is_only_update: every row is used in one update only, so the policy's log-probabilities
            at the start of the step are the ones of that very pass: `old_logprobs` are not
            read, and the forward pass that would compute them is saved.
        proximal: estimates them instead, as `log_linear_proximal` does.
        kl_coefficient: 0 leaves the reference policy out; above 0 the micro-batches must
            hold `reference_logprobs`.
        entropy_coefficient: above 0 the policy must measure entropies.
    """

    def objective(batch: MicroBatch, logprobs: Tensor, entropy: Tensor | None) -> LossOutput:
        current = logprobs.detach()
        old = current if is_only_update else batch.old_logprobs
        if proximal is not None:
            old = proximal(current, batch.sampler_logprobs, batch.age)
        weights = correction(_sampled(batch, old, current))
        surrogate = loss(_tokens(batch, logprobs, old))
        per_token = surrogate.per_token * weights.per_token
        metrics = surrogate.metrics | weights.metrics
        if entropy is not None:
            bonus = entropy_bonus(entropy, coefficient=entropy_coefficient)
            per_token = per_token + bonus.per_token
            metrics |= bonus.metrics
        elif entropy_coefficient > 0:
            raise LearnerError(
                f"entropy_coefficient is {entropy_coefficient} but the policy does not measure "
                "entropies; wanted Policy(measure_entropy=True)"
            )
        if kl_coefficient > 0:
            penalty = kl_penalty(
                logprobs, _reference(batch), kind=kl_kind, coefficient=kl_coefficient
            )
            per_token = per_token + penalty.per_token
            metrics |= penalty.metrics
        return LossOutput(per_token=per_token, metrics=metrics, old_logprobs=old)

    return objective


def supervised(batch: MicroBatch, logprobs: Tensor, entropy: Tensor | None) -> LossOutput:
    """Weighted negative log-likelihood: -weight log p(token).

    `advantages` of the rows are the weights. Metrics are unweighted.
    """
    metrics = {"supervised/nll": pair(-logprobs)}
    if entropy is not None:
        metrics["supervised/entropy"] = pair(entropy)
    return LossOutput(per_token=-logprobs * batch.advantages, metrics=metrics)


def _tokens(batch: MicroBatch, logprobs: Tensor, old: Tensor) -> TokenBatch:
    return TokenBatch(
        logprobs=logprobs,
        old_logprobs=old,
        advantages=batch.advantages,
        trajectory=batch.trajectory,
        lengths=batch.lengths,
        group=batch.group,
        turn=batch.turn,
        num_turns=batch.num_turns,
    )


def _sampled(batch: MicroBatch, old: Tensor, current: Tensor) -> SampledTokens:
    return SampledTokens(
        learner_logprobs=old,
        sampler_logprobs=batch.sampler_logprobs,
        trajectory=batch.trajectory,
        num_trajectories=len(batch.row_ids),
        current_logprobs=current,
        advantages=batch.advantages,
        age=batch.age,
        max_age=batch.max_age,
    )


def _reference(batch: MicroBatch) -> Tensor:
    if batch.reference_logprobs is None:
        raise LearnerError(
            f"micro-batch of {batch.row_ids[0]} and others has no reference_logprobs; a KL "
            "penalty wants the reference policy's log-probabilities"
        )
    return batch.reference_logprobs
