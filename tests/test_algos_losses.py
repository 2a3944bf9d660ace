"""The three losses against golden numbers and against loops written from the papers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import reference_losses as reference
import torch
from algos_batches import LOSSES, MODES, NORM_LENGTH, Padded, padded_batch

from tapo_train.algos.advantages import batch_renorm, group_advantages
from tapo_train.algos.aggregation import aggregate
from tapo_train.algos.losses import PolicyLoss, TokenBatch, grpo, gspo, sapo
from tapo_train.algos.metrics import finalise
from tapo_train.algos.weighted import cispo, gmpo
from tapo_train.errors import ConfigError, LearnerError

TOLERANCE = 1e-6
"""Asked of float64 against the loops."""
EXACT = 1e-12
"""Rounding of float64."""
GOLDEN = 5e-7
"""Golden numbers are given to six decimals."""
SLOPE_TOLERANCE = 1e-6
"""Central differences with a step of 1e-6 of values near 1."""

KINDS = ("grpo", "mean_only", "leave_one_out", "reinforce_pp", "reinforce_pp_baseline", "bn")
REWARDS = [1.0, 0.0, 1.0, 0.5, 0.0, 1.5, 0.25]
GROUP = [0, 0, 0, 1, 1, 1, 2]


def one_trajectory(log_ratio: list[float], advantages: list[float]) -> TokenBatch:
    count = len(log_ratio)
    return TokenBatch(
        logprobs=torch.tensor(log_ratio, dtype=torch.float64).requires_grad_(),
        old_logprobs=torch.zeros(count, dtype=torch.float64),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        trajectory=torch.zeros(count, dtype=torch.int64),
        lengths=torch.tensor([count]),
    )


def slopes(batch: TokenBatch, name: str) -> torch.Tensor:
    """[K] derivative of the sum of the losses by each token's log-probability."""
    loss = LOSSES[name](batch).per_token.sum()
    return torch.autograd.grad(loss, batch.logprobs)[0]


@pytest.mark.parametrize(
    ("name", "losses", "derivatives"),
    [
        ("grpo", [0.221034, 0.16, 1.0, 1.648721], [0.221034, 0.0, 1.0, 1.648721]),
        (
            "gspo",
            [0.215577, 0.215577, 1.077884, 1.077884],
            [0.215577, 0.215577, 1.077884, 1.077884],
        ),
        ("sapo", [0.401965, 0.329434, 1.904762, 2.529512], [0.220362, 0.145454, 1.0, 1.471352]),
    ],
)
def test_losses_and_slopes_of_a_mixed_row_have_their_golden_values(
    name: str, losses: list[float], derivatives: list[float]
) -> None:
    batch = one_trajectory([0.1, -0.3, 0.0, 0.5], [-0.2, -0.2, -1.0, -1.0])
    assert LOSSES[name](batch).per_token.tolist() == pytest.approx(losses, abs=GOLDEN)
    assert slopes(batch, name).tolist() == pytest.approx(derivatives, abs=GOLDEN)


@pytest.mark.parametrize(
    ("name", "mean"), [("grpo", -1.031497), ("gspo", -1.0004), ("sapo", -2.118556)]
)
def test_losses_of_a_positive_row_have_their_golden_means(name: str, mean: float) -> None:
    batch = one_trajectory([0.1, -0.3, 0.0, 0.5], [1.0] * 4)
    assert LOSSES[name](batch).per_token.mean().item() == pytest.approx(mean, abs=GOLDEN)


@pytest.mark.parametrize(
    ("ratio", "f_pos", "f_neg", "w_pos", "w_neg"),
    [
        (0.5, 1.5102, 1.4159, 0.9400, 0.9341),
        (0.8, 1.8007, 1.7055, 0.9901, 0.9891),
        (1.0, 2.0, 1.9048, 1.0, 1.0),
        (1.28, 2.2782, 2.1828, 0.9807, 0.9787),
        (2.0, 2.9242, 2.8220, 0.7864, 0.7681),
        (4.0, 3.8103, 3.6530, 0.1807, 0.1576),
    ],
)
def test_sapo_gate_and_its_weight_follow_the_table(
    ratio: float, f_pos: float, f_neg: float, w_pos: float, w_neg: float
) -> None:
    log_ratio = float(torch.tensor(ratio, dtype=torch.float64).log())
    batch = one_trajectory([log_ratio, log_ratio], [1.0, -1.0])
    assert sapo(batch).per_token.tolist() == pytest.approx([-f_pos, f_neg], abs=5e-5)
    assert slopes(batch, "sapo").tolist() == pytest.approx(
        [-w_pos * ratio, w_neg * ratio], abs=5e-5 * ratio
    )


@pytest.mark.parametrize("per_token", [False, True], ids=["constant", "per-token"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_agree_with_the_loops(
    name: str, mode: str, kind: str, per_token: bool
) -> None:
    constants = advantages_of(kind)
    assert constants == pytest.approx(reference.advantages(REWARDS, GROUP, kind=kind), abs=EXACT)
    padded = padded_batch(constants, per_token=per_token)
    logp = padded.logp.clone().requires_grad_()
    loss = whole_loss(padded, logp, name, mode)
    rows = {key: padded.rows(key) for key in ("logp", "old", "advantages")}
    mask = [[int(kept) for kept in row] for row in padded.rows("mask")]
    losses = reference.token_losses(name, mask=mask, **rows)
    assert loss.item() == pytest.approx(
        reference.average(losses, mask, mode, NORM_LENGTH), abs=TOLERANCE
    )
    loss.backward()
    expected = expected_gradient(padded, reference.slopes(name, mask=mask, **rows), mode)
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad, expected, rtol=0, atol=SLOPE_TOLERANCE)


def advantages_of(kind: str) -> list[float]:
    if kind == "bn":
        return batch_renorm(group_advantages(REWARDS, GROUP, kind="grpo")).tolist()
    return group_advantages(REWARDS, GROUP, kind=kind).tolist()  # type: ignore[arg-type]


def whole_loss(padded: Padded, logp: torch.Tensor, name: str, mode: str) -> torch.Tensor:
    batch = padded.flat(logp)
    return aggregate(
        LOSSES[name](batch).per_token,
        batch.trajectory,
        batch.lengths,
        mode=mode,  # type: ignore[arg-type]
        step_tokens=padded.num_tokens,
        step_sequences=padded.num_sequences,
        norm_length=NORM_LENGTH,
    )


def expected_gradient(padded: Padded, token_slopes: list[list[float]], mode: str) -> torch.Tensor:
    """[B, T] each token's slope times its weight in the average; 0 where masked."""
    lengths = padded.mask.sum(dim=1, keepdim=True).clamp(min=1).double()
    weight = {
        "token-mean": torch.full_like(lengths, 1) / padded.num_tokens,
        "seq-mean-token-mean": 1 / lengths / padded.num_sequences,
        "seq-mean-token-sum": torch.full_like(lengths, 1) / padded.num_sequences,
        "seq-mean-token-sum-norm": torch.full_like(lengths, 1) / padded.num_sequences / NORM_LENGTH,
    }[mode]
    return torch.tensor(token_slopes, dtype=torch.float64) * weight


def test_the_batches_of_these_tests_clip_in_every_way() -> None:
    padded = padded_batch([1.2, -0.8, 0.3, -1.5, 0.7, -0.2, 0.9], per_token=True)
    for name, kinds in (("grpo", ("high", "low", "dual")), ("gspo", ("high", "low"))):
        metrics = finalise(LOSSES[name](padded.flat()).metrics)
        for kind in kinds:
            assert 0 < metrics[f"policy/clip_{kind}"] < 0.5, (name, kind)


@pytest.mark.parametrize("name", LOSSES)
def test_untrained_positions_get_exactly_zero_gradient_whatever_they_hold(name: str) -> None:
    padded = padded_batch([1.2, -0.8, 0.3, -1.5], per_token=True)
    assert not torch.isfinite(padded.logp[~padded.mask]).any()
    logp = padded.logp.clone().requires_grad_()
    loss = whole_loss(padded, logp, name, "token-mean")
    loss.backward()
    assert logp.grad is not None
    assert loss.isfinite()
    assert (logp.grad[~padded.mask] == 0).all()
    assert (logp.grad[padded.mask] != 0).any()
    other = dataclasses.replace(padded, old=padded.old.nan_to_num(nan=-3.0))
    assert whole_loss(other, padded.logp.nan_to_num(neginf=-5.0), name, "token-mean") == loss


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_token", [False, True], ids=["constant", "per-token"])
@pytest.mark.parametrize("name", LOSSES)
def test_at_ratio_one_the_gradient_is_reinforce(name: str, per_token: bool, mode: str) -> None:
    padded = padded_batch([1.2, -0.8, 0.3, -1.5], per_token=per_token)
    on_policy = dataclasses.replace(padded, old=padded.logp)
    logp = padded.logp.clone().requires_grad_()
    whole_loss(on_policy, logp, name, mode).backward()
    minus_advantages = torch.where(padded.mask, -padded.advantages, 0.0).tolist()
    expected = expected_gradient(padded, minus_advantages, mode)
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", LOSSES)
def test_a_token_with_advantage_zero_has_zero_loss_and_zero_gradient(name: str) -> None:
    batch = one_trajectory([0.1, -0.9, 2.0, 0.5, -30.0], [1.0, 0.0, 0.0, -1.0, 0.0])
    losses = LOSSES[name](batch).per_token
    derivatives = slopes(batch, name)
    assert losses[[1, 2, 4]].tolist() == [0.0, 0.0, 0.0]
    assert derivatives[[1, 2, 4]].tolist() == [0.0, 0.0, 0.0]
    assert losses[3].item() > 0


def test_gspo_equals_its_sequence_form_when_advantages_are_constant() -> None:
    rows = [[0.1, -0.3, 0.2, 0.0003], [-2e-4, 1e-4, 0.0, -1e-4], [0.4, 0.1, -0.2, 0.1]]
    for advantage in (0.9, -0.9):
        for row in rows:
            batch = one_trajectory(row, [advantage] * 4)
            plain = reference.gspo_plain(row, [0.0] * 4, advantage, 3e-4, 4e-4)
            assert gspo(batch).per_token.mean().item() == pytest.approx(plain, abs=EXACT)


def test_gspo_keeps_a_step_correction_with_its_own_tokens() -> None:
    batch = one_trajectory([1e-4, -2e-4, 1e-4, 0.0], [0.0, 0.0, -1.0, -1.0])
    assert slopes(batch, "gspo").tolist() == pytest.approx([0.0, 0.0, 1.0, 1.0], abs=1e-3)
    assert slopes(batch, "gspo")[:2].tolist() == [0.0, 0.0]


def test_gspo_refuses_a_trajectory_that_was_cut() -> None:
    batch = dataclasses.replace(one_trajectory([0.1, 0.2], [1.0, 1.0]), lengths=torch.tensor([3]))
    with pytest.raises(LearnerError, match="whole trajectories"):
        gspo(batch)


def test_dual_clip_bounds_negative_tokens_only_and_can_be_switched_off() -> None:
    batch = one_trajectory([2.0, 2.0], [-1.0, 1.0])
    assert grpo(batch, clip_high=0.28).per_token.tolist() == pytest.approx([3.0, -1.28])
    assert grpo(batch, dual_clip=10.0).per_token[0].item() == pytest.approx(7.389056, abs=GOLDEN)
    far = one_trajectory([4.0], [-1.0])
    assert grpo(far, dual_clip=10.0).per_token.tolist() == [10.0]
    assert grpo(far, dual_clip=None).per_token[0].item() == pytest.approx(54.598150, abs=GOLDEN)


@pytest.mark.parametrize(
    ("name", "log_ratio", "advantage", "loss"),
    [
        ("grpo", 25.0, -1.0, 485165195.409790),
        ("gspo", 25.0, -1.0, 22026.465795),
        ("sapo", 25.0, -1.0, 4 / 1.05),
        ("grpo", -25.0, 1.0, -2.061154e-09),
        ("sapo", -25.0, 1.0, -4 / (1 + 2.718281828)),
    ],
)
def test_log_ratios_beyond_their_bound_are_held_without_gradient(
    name: str, log_ratio: float, advantage: float, loss: float
) -> None:
    batch = one_trajectory([log_ratio], [advantage])
    output = grpo(batch, dual_clip=None) if name == "grpo" else LOSSES[name](batch)
    assert output.per_token.item() == pytest.approx(loss, rel=1e-6)
    assert torch.autograd.grad(output.per_token.sum(), batch.logprobs)[0].item() == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_float32_tokens_give_the_float64_loss_within_float32_rounding(name: str) -> None:
    padded = padded_batch([1.2, -0.8, 0.3, -1.5], per_token=True, spread=0.05)
    batch = padded.flat()
    single = dataclasses.replace(
        batch,
        logprobs=batch.logprobs.float(),
        old_logprobs=batch.old_logprobs.float(),
        advantages=batch.advantages.float(),
    )
    found = LOSSES[name](single).per_token
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), LOSSES[name](batch).per_token, rtol=0, atol=2e-6)


def test_metrics_count_tokens_and_carry_no_gradient() -> None:
    batch = one_trajectory([0.5, -0.5, 2.0, 0.0], [1.0, -1.0, -1.0, 0.0])
    metrics = grpo(batch).metrics
    assert not any(value.requires_grad for value in metrics.values())
    assert metrics["policy/clip_high"].tolist() == [1.0, 4.0]
    assert metrics["policy/clip_low"].tolist() == [1.0, 4.0]
    assert metrics["policy/clip_dual"].tolist() == [1.0, 4.0]
    ratios = [1.6487212707, 0.6065306597, 7.3890560989, 1.0]
    means = finalise(metrics)
    assert means["policy/ratio_minus_one"] == pytest.approx(sum(ratios) / 4 - 1)
    assert means["policy/kl"] == pytest.approx((sum(ratios) - 4 - 2.0) / 4)


def test_clips_and_gates_are_told_by_turn() -> None:
    batch = one_trajectory([0.5, 0.5, -0.5, 2.0, -0.5, 0.0], [1.0, -1.0, -1.0, -1.0, 0.0, 1.0])
    by_turn = dataclasses.replace(batch, turn=torch.tensor([0, 0, 2, 2, 2, 2]), num_turns=4)
    pairs = {n: v.tolist() for n, v in grpo(by_turn).metrics.items() if "by_turn" in n}
    # Held: the first from above, the third from below, the fourth by the dual clip. A token
    # with advantage 0 is held by nothing.
    assert grpo(by_turn).metrics["policy/clip_low"].tolist() == [1.0, 6.0]
    assert pairs == {
        "policy/clip/by_turn/0": [1.0, 2.0],
        "policy/clip/by_turn/1": [0.0, 0.0],
        "policy/clip/by_turn/2": [2.0, 4.0],
        "policy/clip/by_turn/3": [0.0, 0.0],
    }
    metrics = sapo(by_turn).metrics
    parts = [metrics[f"policy/gate_weight/by_turn/{turn}"] for turn in range(4)]
    torch.testing.assert_close(sum(parts), metrics["policy/gate_weight"], rtol=1e-12, atol=0)
    tau = torch.tensor([1.0, 1.05], dtype=torch.float64)
    gate = torch.sigmoid(tau * (1.6487212707 - 1))
    assert parts[0].tolist() == pytest.approx([float((4 * gate * (1 - gate)).sum()), 2.0])
    assert not [name for name in grpo(batch).metrics if "by_turn" in name]
    assert torch.equal(grpo(by_turn).per_token, grpo(batch).per_token)


def test_the_sequence_ratio_of_a_single_token_is_its_own() -> None:
    batch = one_trajectory([2e-4], [1.0])
    assert gspo(batch).per_token.item() == pytest.approx(-math.exp(2e-4), abs=EXACT)


def test_sapo_takes_the_negative_temperature_for_an_advantage_of_zero() -> None:
    ratio_two = one_trajectory([0.6931471806], [0.0])
    assert finalise(sapo(ratio_two).metrics)["policy/gate_weight"] == pytest.approx(
        0.7681, abs=5e-5
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda batch: grpo(batch, clip_low=1.0), "clip_low"),
        (lambda batch: grpo(batch, clip_high=0.0), "clip_high"),
        (lambda batch: grpo(batch, dual_clip=1.0), "dual_clip"),
        (lambda batch: gspo(batch, clip_low=-1e-4), "gspo"),
        (lambda batch: sapo(batch, tau_neg=0.0), "tau"),
    ],
)
def test_hyper_parameters_outside_their_range_are_refused(call, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message):
        call(one_trajectory([0.1], [1.0]))


@pytest.mark.parametrize("field", ["old_logprobs", "advantages", "trajectory"])
def test_a_batch_whose_vectors_differ_in_length_is_refused(field: str) -> None:
    batch = one_trajectory([0.1, 0.2], [1.0, 1.0])
    with pytest.raises(LearnerError, match=field):
        dataclasses.replace(batch, **{field: getattr(batch, field)[:1]})


@pytest.mark.parametrize("advantage", [1.3, -0.7])
def test_gmpo_in_token_form_is_the_papers_objective_in_value_and_gradient(advantage: float) -> None:
    log_ratio = [0.1, -0.9, 0.6, 0.0, -0.2]
    batch = one_trajectory(log_ratio, [advantage] * 5)
    loss = gmpo(batch).per_token.mean()
    (slope,) = torch.autograd.grad(loss, batch.logprobs)
    plain = reference.gmpo_plain(log_ratio, [0.0] * 5, advantage, 0.4, 0.4)
    assert loss.item() == pytest.approx(plain, abs=EXACT)
    for t in range(5):
        up, down = list(log_ratio), list(log_ratio)
        up[t], down[t] = up[t] + 1e-6, down[t] - 1e-6
        ends = [reference.gmpo_plain(x, [0.0] * 5, advantage, 0.4, 0.4) for x in (up, down)]
        assert slope[t].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=SLOPE_TOLERANCE)


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        (cispo, {"clip_low": 1.5}, "cispo: clip_low, clip_high are 1.5, 0.28"),
        (cispo, {"clip_high": 0.0}, "cispo: clip_low"),
        (gmpo, {"clip_low": 0.0}, "gmpo: clip_low, clip_high are 0.0, 0.4; wanted > 0"),
    ],
)
def test_bounds_of_the_two_further_losses_are_checked(
    loss: PolicyLoss, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        loss(one_trajectory([0.1], [1.0]), **settings)  # type: ignore[call-arg]
