"""Weights between sampler and learner against loops; they never carry a gradient."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import reference_losses as reference
import torch
from algos_batches import LOSSES, padded_batch

from tapo_train.algos.importance import (
    Correction,
    SampledTokens,
    geometric_mask,
    log_linear_proximal,
    mask,
    total_variation_mask,
    truncate,
    uncorrected,
)
from tapo_train.algos.losses import TokenBatch
from tapo_train.algos.metrics import finalise
from tapo_train.errors import ConfigError, LearnerError

TOLERANCE = 1e-9
"""Rounding of float64 in sums of a dozen logarithms and their exponentials."""
FORMS = {"truncate": truncate, "mask": mask}
ALL = [uncorrected, truncate, mask, geometric_mask, total_variation_mask]


def sampled(
    learner: list[float],
    sampler: list[float],
    trajectory: list[int],
    *,
    current: list[float] | None = None,
    advantages: list[float] | None = None,
    age: list[int] | None = None,
) -> SampledTokens:
    ages = torch.tensor(age or [0] * len(learner))
    return SampledTokens(
        learner_logprobs=torch.tensor(learner, dtype=torch.float64),
        sampler_logprobs=torch.tensor(sampler, dtype=torch.float64),
        trajectory=torch.tensor(trajectory),
        num_trajectories=max(trajectory) + 1,
        current_logprobs=torch.tensor(current or learner, dtype=torch.float64),
        advantages=torch.tensor(advantages or [1.0] * len(learner), dtype=torch.float64),
        age=ages,
        max_age=int(ages.max()),
    )


def sampled_flat(batch: TokenBatch, num: int, current: torch.Tensor | None = None) -> SampledTokens:
    """The old log-probabilities of a batch as its sampler's."""
    return SampledTokens(
        learner_logprobs=batch.logprobs,
        sampler_logprobs=batch.old_logprobs,
        trajectory=batch.trajectory,
        num_trajectories=num,
        current_logprobs=batch.logprobs.detach() if current is None else current,
        advantages=batch.advantages,
        age=torch.zeros_like(batch.trajectory),
        max_age=0,
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("form", FORMS)
def test_weights_agree_with_the_loops(form: str, level: str) -> None:
    padded = padded_batch([0.0] * 9, spread=0.5)
    flat = padded.flat()
    correction = functools.partial(FORMS[form], level=level, high=1.5)
    found = correction(sampled_flat(flat, len(flat.lengths))).per_token
    rows = [[int(kept) for kept in row] for row in padded.rows("mask")]
    expected = reference.importance_weights(
        padded.rows("logp"), padded.rows("old"), rows, form=form, level=level, low=0.5, high=1.5
    )
    wanted = torch.tensor(expected, dtype=torch.float64)[padded.mask]
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
    assert (wanted == (1.5 if form == "truncate" else 0.0)).any()
    assert ((wanted != 1.5) & (wanted != 0.0)).any()


def test_truncation_holds_large_weights_and_masking_drops_both_tails() -> None:
    ratios = [0.1, 0.6, 1.0, 1.9, 5.0]
    tokens = sampled([math.log(r) for r in ratios], [0.0] * 5, [0] * 5)
    assert truncate(tokens).per_token.tolist() == pytest.approx([0.1, 0.6, 1.0, 1.9, 2.0])
    assert mask(tokens).per_token.tolist() == pytest.approx([0.0, 0.6, 1.0, 1.9, 0.0])
    assert uncorrected(tokens).per_token.tolist() == [1.0] * 5


def test_the_sequence_weight_is_the_product_over_its_tokens_alone() -> None:
    tokens = sampled([0.2, -0.1, 0.3], [0.0, 0.0, 0.0], [0, 1, 0])
    found = truncate(tokens, level="sequence").per_token.tolist()
    assert found == pytest.approx([math.exp(0.5), math.exp(-0.1), math.exp(0.5)])


def test_a_sequence_far_outside_is_rejected_whole() -> None:
    tokens = sampled([0.0, 1.0, 0.0], [0.0, 0.0, 0.1], [0, 0, 1])
    assert mask(tokens, level="sequence").per_token.tolist() == pytest.approx(
        [0.0, 0.0, math.exp(-0.1)]
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_extreme_ratios_stay_finite(level: str) -> None:
    tokens = sampled([0.0, -500.0], [-500.0, 0.0], [0, 1])
    found = truncate(tokens, level=level, high=1e12).per_token  # type: ignore[arg-type]
    assert found.tolist() == pytest.approx([math.exp(20), math.exp(-20)])


@pytest.mark.parametrize("correction", ALL)
def test_equal_log_probabilities_give_weights_of_one_and_no_mismatch(
    correction: Correction,
) -> None:
    weights = correction(sampled([-1.0, -2.0], [-1.0, -2.0], [0, 0]))
    assert weights.per_token.tolist() == [1.0, 1.0]
    means = finalise(weights.metrics)
    assert means["mismatch/k1"] == means["mismatch/k3"] == means["mismatch/abs_logprob_diff"] == 0
    assert means.get("importance/weight", 1.0) == 1.0


def test_metrics_tell_the_mismatch_and_what_was_done_about_it() -> None:
    tokens = sampled([math.log(4.0), 0.0, -0.5, 0.0], [0.0] * 4, [0, 0, 1, 1])
    means = finalise(truncate(tokens).metrics)
    assert means["importance/changed"] == 0.25
    assert means["importance/weight"] == pytest.approx((2 + 1 + math.exp(-0.5) + 1) / 4)
    assert means["importance/weight_squared"] == pytest.approx((4 + 1 + math.exp(-1) + 1) / 4)
    assert means["mismatch/k1"] == pytest.approx((-math.log(4) + 0.5) / 4)
    k3 = (3 - math.log(4)) + (math.exp(-0.5) - 1 + 0.5)
    assert means["mismatch/k3"] == pytest.approx(k3 / 4)
    assert means["mismatch/abs_logprob_diff"] == pytest.approx((math.log(4) + 0.5) / 4)
    bare = finalise(uncorrected(tokens).metrics)
    assert bare == {name: means[name] for name in bare}
    assert len(bare) == 3


@pytest.mark.parametrize("correction", ALL)
def test_weights_scale_the_gradient_and_carry_none_themselves(correction: Correction) -> None:
    padded = padded_batch([0.7, -0.4, 1.1])
    logprobs = padded.logp[padded.mask].requires_grad_()
    batch = dataclasses.replace(padded.flat(), logprobs=logprobs)
    weights = correction(sampled_flat(batch, 3))
    assert not weights.per_token.requires_grad
    assert not any(value.requires_grad for value in weights.metrics.values())
    loss = LOSSES["grpo"](batch).per_token
    (plain,) = torch.autograd.grad(loss.sum(), logprobs, retain_graph=True)
    (weighted,) = torch.autograd.grad((loss * weights.per_token).sum(), logprobs)
    torch.testing.assert_close(weighted, plain * weights.per_token, rtol=0, atol=TOLERANCE)


def test_impossible_settings_and_shapes_are_refused() -> None:
    tokens = sampled([0.0], [0.0], [0])
    with pytest.raises(ConfigError, match="high is"):
        truncate(tokens, high=0.5)
    with pytest.raises(ConfigError, match="low, high are"):
        mask(tokens, low=1.5)
    with pytest.raises(ConfigError, match="'word'"):
        truncate(tokens, level="word")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="low, high are"):
        geometric_mask(tokens, high=0.9)
    with pytest.raises(ConfigError, match="cap is"):
        geometric_mask(tokens, cap=0.9)
    for delta in (0.0, 1.1):
        with pytest.raises(ConfigError, match="delta is"):
            total_variation_mask(tokens, delta=delta)
    with pytest.raises(LearnerError, match="age"):
        dataclasses.replace(tokens, age=torch.zeros(2))
    with pytest.raises(LearnerError, match="sampler_logprobs"):
        dataclasses.replace(tokens, sampler_logprobs=torch.zeros(2))


def test_the_geometric_mask_agrees_with_the_loops() -> None:
    padded = padded_batch([0.0] * 9, spread=0.5)
    bounds = {"low": 0.95, "high": 1.2, "cap": 1.3}
    flat = padded.flat()
    found = geometric_mask(sampled_flat(flat, len(flat.lengths)), **bounds).per_token
    rows = [[int(kept) for kept in row] for row in padded.rows("mask")]
    expected = reference.geometric_weights(padded.rows("logp"), padded.rows("old"), rows, **bounds)
    wanted = torch.tensor(expected, dtype=torch.float64)[padded.mask]
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
    assert (wanted == 0).any() and (wanted == 1.3).any()
    assert ((wanted != 0) & (wanted != 1.3)).any()


def test_a_trajectory_is_judged_by_its_mean_and_not_by_its_length() -> None:
    """Ten tokens that drifted by 0.5 % each: their product is 5 % off, their mean is not."""
    tokens = sampled([0.005] * 10 + [0.02], [0.0] * 11, [0] * 10 + [1])
    found = geometric_mask(tokens).per_token
    assert found.tolist() == pytest.approx([math.exp(0.005)] * 10 + [0.0])
    edge = sampled([math.log(0.98)], [0.0], [0])
    assert geometric_mask(edge).per_token.tolist() == [0.0]


def test_the_total_variation_mask_agrees_with_the_cases() -> None:
    padded = padded_batch([1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 1.0, -1.0, 0.0], spread=0.5)
    flat = padded.flat()
    moved = padded.logp + torch.where(padded.mask, 0.3 * torch.sign(padded.logp + 1.5), 0.0)
    found = total_variation_mask(
        sampled_flat(flat, len(flat.lengths), current=moved[padded.mask]), delta=0.1
    ).per_token
    rows = [[int(kept) for kept in row] for row in padded.rows("mask")]
    expected = reference.total_variation_weights(
        padded.rows("logp"),
        padded.rows("old"),
        moved.tolist(),
        padded.rows("advantages"),
        rows,
        delta=0.1,
    )
    wanted = torch.tensor(expected, dtype=torch.float64)[padded.mask]
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
    assert (wanted == 0).any() and (wanted != 0).any()


def test_the_total_variation_mask_stops_moves_of_probability_towards_the_advantage() -> None:
    pi, mu = [0.6, 0.6, 0.3, 0.3, 0.6, 0.02], [0.3, 0.3, 0.6, 0.6, 0.3, 0.0002]
    tokens = sampled(
        [math.log(p) for p in mu],
        [math.log(p) for p in mu],
        [0] * 6,
        current=[math.log(p) for p in pi],
        advantages=[1.0, -1.0, 1.0, -1.0, 0.0, 1.0],
    )
    found = total_variation_mask(tokens, delta=0.2).per_token.tolist()
    assert found == pytest.approx([0.0, 1.0, 1.0, 0.0, 1.0, 1.0]), "a hundredfold rare token moves"
    assert total_variation_mask(tokens, delta=0.31).per_token.tolist() == pytest.approx([1.0] * 6)


def test_the_log_linear_policy_lies_between_sampler_and_present_by_the_age_of_the_token() -> None:
    current, sampler, ages = [-1.0, -1.0, -2.0, -0.5], [-3.0, -3.0, -0.4, -0.7], [0, 1, 3, 2]
    found = log_linear_proximal(
        torch.tensor(current, dtype=torch.float64),
        torch.tensor(sampler, dtype=torch.float64),
        torch.tensor(ages),
    )
    wanted = reference.log_linear(current, sampler, ages)
    assert found.tolist() == pytest.approx(wanted, abs=TOLERANCE)
    assert found.tolist() == pytest.approx([-3.0, -2.0, -0.4 - 0.75 * 1.6, -0.7 + 0.4 / 3])
    moving = torch.tensor(current, requires_grad=True)
    assert not log_linear_proximal(moving, moving * 1, torch.tensor(ages)).requires_grad


def test_the_mismatch_is_told_by_age_where_tokens_have_one() -> None:
    tokens = sampled([0.1, 0.2, 0.0, 0.4], [0.0] * 4, [0, 0, 1, 1], age=[0, 0, 2, 2])
    means = finalise(truncate(tokens).metrics)
    name = "mismatch/abs_logprob_diff/by_age"
    assert means[f"{name}/0"] == pytest.approx(0.15)
    assert means[f"{name}/1"] == 0.0
    assert means[f"{name}/2"] == pytest.approx(0.2)
