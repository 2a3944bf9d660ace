"""KL estimators and entropy: golden values, and exact expectations over a small vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tapo_train.algos.entropy import entropy_bonus, token_entropy
from tapo_train.algos.kl import kl_penalty, kl_per_token
from tapo_train.algos.metrics import finalise
from tapo_train.errors import ConfigError, LearnerError

TOLERANCE = 1e-12
"""Rounding of float64."""
KINDS = ("k1", "abs", "k2", "k3", "k1+", "k3+")


def logits() -> Tensor:
    return torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)


REFERENCE = torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=torch.float64).log()


def gradient(loss: Tensor, parameter: Tensor) -> Tensor:
    return torch.autograd.grad(loss, parameter)[0]


def expected_gradient(kind: str) -> Tensor:
    """Gradient of the estimator as a loss, averaged exactly over tokens drawn from the policy."""
    parameter = logits()
    logp = parameter.log_softmax(0)
    estimate = kl_per_token(logp, REFERENCE, kind=kind)  # type: ignore[arg-type]
    return gradient((logp.exp().detach() * estimate).sum(), parameter)


@pytest.mark.parametrize(
    ("kind", "ref_above", "ref_below"),
    [
        ("k1", -0.5, 0.5),
        ("abs", 0.5, 0.5),
        ("k2", 0.125, 0.125),
        ("k3", 0.148721, 0.106531),
        ("k1+", -0.5, 0.5),
        ("k3+", 0.148721, 0.106531),
    ],
)
def test_estimators_have_their_golden_values(kind: str, ref_above: float, ref_below: float) -> None:
    logprobs = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    reference = torch.tensor([-0.5, -1.5], dtype=torch.float64)
    found = kl_per_token(logprobs, reference, kind=kind)  # type: ignore[arg-type]
    assert found.tolist() == pytest.approx([ref_above, ref_below], abs=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k3", "k1+", "k3+"])
def test_unbiased_estimators_average_to_the_divergence(kind: str) -> None:
    logp = logits().log_softmax(0).detach()
    estimate = kl_per_token(logp, REFERENCE, kind=kind)  # type: ignore[arg-type]
    divergence = (logp.exp() * (logp - REFERENCE)).sum()
    assert (logp.exp() * estimate).sum().item() == pytest.approx(divergence.item(), abs=TOLERANCE)


@pytest.mark.parametrize("kind", ["k2", "k1+", "k3+"])
def test_k2_and_the_straight_through_forms_descend_the_divergence(kind: str) -> None:
    parameter = logits()
    logp = parameter.log_softmax(0)
    true = gradient((logp.exp() * (logp - REFERENCE)).sum(), parameter)
    torch.testing.assert_close(expected_gradient(kind), true, rtol=0, atol=TOLERANCE)
    assert true.abs().max() > 0.1


def test_k3_as_a_loss_descends_the_reverse_divergence_and_k1_nothing() -> None:
    parameter = logits()
    reverse = (REFERENCE.exp() * (REFERENCE - parameter.log_softmax(0))).sum()
    true = gradient(reverse, parameter)
    torch.testing.assert_close(expected_gradient("k3"), true, rtol=0, atol=TOLERANCE)
    assert expected_gradient("k1").abs().max() < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_the_reference(kind: str) -> None:
    reference = REFERENCE.clone().requires_grad_()
    estimate = kl_per_token(logits().log_softmax(0), reference, kind=kind)  # type: ignore[arg-type]
    assert torch.autograd.grad(estimate.sum(), reference, allow_unused=True)[0] is None


@pytest.mark.parametrize("kind", ["k3", "k3+"])
def test_k3_is_held_at_ten_for_one_distant_token(kind: str) -> None:
    logprobs = torch.tensor([-400.0, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.0, -400.0, -4.0], dtype=torch.float64)
    found = kl_per_token(logprobs, reference, kind=kind)  # type: ignore[arg-type]
    assert found.tolist() == pytest.approx([10.0, 10.0, math.exp(-4) + 3])
    assert gradient(found.sum(), logprobs).isfinite().all()


def test_the_penalty_is_the_estimate_times_its_coefficient_and_reports_the_estimate() -> None:
    logprobs, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0])
    output = kl_penalty(logprobs, reference, kind="k1", coefficient=0.1)
    assert output.per_token.tolist() == pytest.approx([0.05, 0.0])
    # x is -0.5 and 0: k1 .5, k2 .125, k3 exp(-.5) + .5 - 1 = .106531, halved by the mean
    assert finalise(output.metrics) == {
        "policy/ref_kl": pytest.approx(0.25),
        "kl/k1": pytest.approx(0.25),
        "kl/k2": pytest.approx(0.0625),
        "kl/k3": pytest.approx(0.0532653),
    }


def test_entropy_of_a_uniform_policy_is_the_log_of_its_size_and_bans_add_nothing() -> None:
    scores = torch.zeros(2, 5, dtype=torch.float64)
    scores[1, 3:] = -math.inf
    scores.requires_grad_()
    entropy = token_entropy(scores)
    assert entropy.tolist() == pytest.approx([math.log(5), math.log(3)])
    assert gradient(entropy.sum(), scores).isfinite().all()


def test_entropy_and_its_gradient_agree_with_the_definition() -> None:
    parameter = logits()
    logp = parameter.log_softmax(0)
    definition = -(logp.exp() * logp).sum()
    entropy = token_entropy(parameter)
    assert entropy.item() == pytest.approx(definition.item(), abs=TOLERANCE)
    torch.testing.assert_close(
        gradient(entropy, parameter), gradient(definition, parameter), rtol=0, atol=TOLERANCE
    )


def test_descending_the_bonus_raises_the_entropy() -> None:
    parameter = logits()
    before = token_entropy(parameter)
    bonus = entropy_bonus(before[None], coefficient=0.01)
    assert bonus.per_token.item() == pytest.approx(-0.01 * before.item())
    assert finalise(bonus.metrics)["policy/entropy"] == pytest.approx(before.item())
    after = token_entropy(parameter - 10 * gradient(bonus.per_token.sum(), parameter))
    assert after > before


def test_impossible_settings_and_shapes_are_refused() -> None:
    one = torch.zeros(1)
    with pytest.raises(ConfigError, match="'k4'"):
        kl_per_token(one, one, kind="k4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="coefficient is -"):
        kl_penalty(one, one, kind="k2", coefficient=-1)
    with pytest.raises(ConfigError, match="coefficient is -"):
        entropy_bonus(one, coefficient=-0.1)
    with pytest.raises(LearnerError, match="ref_logprobs"):
        kl_per_token(one, torch.zeros(2), kind="k2")
