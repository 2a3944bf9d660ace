"""Advantages against golden numbers, loops and their edge cases."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import reference_losses as reference

from tapo_train.algos.advantages import batch_renorm, group_advantages, informative_rows
from tapo_train.errors import ConfigError, CreditError

TOLERANCE = 1e-12
"""Rounding of float64."""
GOLDEN = 1e-4
"""Golden numbers are given to four decimals, cut rather than rounded."""

KINDS = ("grpo", "mean_only", "leave_one_out", "reinforce_pp", "reinforce_pp_baseline")
GROUP_KINDS = ("grpo", "mean_only", "leave_one_out")
REWARDS = [1.0, 0.0, 1.0, 0.5, 0.0, 1.5, 0.25, -0.5]
GROUP = [3, 0, 3, 0, 3, 0, 7, 3]


@pytest.mark.parametrize("std", ["unbiased", "population"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_agrees_with_the_loops(kind: str, std: str) -> None:
    found = group_advantages(REWARDS, GROUP, kind=kind, std=std)  # type: ignore[arg-type]
    expected = reference.advantages(REWARDS, GROUP, kind=kind, std=std)
    assert found.tolist() == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("successes", "population", "unbiased"),
    [
        (1, (2.6457, -0.3780), (2.4749, -0.3536)),
        (2, (1.7320, -0.5773), (1.6202, -0.5401)),
        (3, (1.2910, -0.7746), (1.2076, -0.7246)),
        (4, (1.0000, -1.0000), (0.9354, -0.9354)),
        (7, (0.3780, -2.6457), (0.3536, -2.4749)),
    ],
)
def test_zero_one_rewards_of_a_group_of_eight_have_their_golden_advantages(
    successes: int, population: tuple[float, float], unbiased: tuple[float, float]
) -> None:
    rewards = [1.0] * successes + [0.0] * (8 - successes)
    for std, expected in (("population", population), ("unbiased", unbiased)):
        found = group_advantages(rewards, [0] * 8, std=std)  # type: ignore[arg-type]
        assert (found[0], found[-1]) == pytest.approx(expected, abs=GOLDEN)


def test_unbiased_is_the_default_deviation() -> None:
    graded = [1.5, 1.5, 1.0, 0.5, 0.5, 0.5, 0.0, 0.0]
    expected = [1.3681, 1.3681, 0.5262, -0.3157, -0.3157, -0.3157, -1.1577, -1.1577]
    assert group_advantages(graded, [0] * 8).tolist() == pytest.approx(expected, abs=GOLDEN)


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_a_group_of_one_gets_zero(kind: str) -> None:
    found = group_advantages([0.7, 1.0, 0.0], [5, 1, 1], kind=kind)  # type: ignore[arg-type]
    assert found[0] == 0.0
    assert found[1] > 0 > found[2]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_give_exactly_zero(kind: str) -> None:
    # 0.1 summed three times and divided by three is not 0.1.
    assert np.mean([0.1] * 3) != 0.1
    found = group_advantages([0.1, 0.1, 0.1], [0, 0, 0], kind=kind, eps=1e-16)  # type: ignore[arg-type]
    assert found.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_left_out_change_no_baseline_and_get_zero(kind: str) -> None:
    rewards = [1.0, float("nan"), 0.0, 0.5, float("inf"), 0.25]
    leave_out = [False, True, False, False, True, False]
    found = group_advantages(rewards, [0, 0, 0, 1, 1, 1], kind=kind, leave_out=leave_out)  # type: ignore[arg-type]
    kept = group_advantages([1.0, 0.0, 0.5, 0.25], [0, 0, 1, 1], kind=kind)  # type: ignore[arg-type]
    assert found[[1, 4]].tolist() == [0.0, 0.0]
    assert found[[0, 2, 3, 5]].tolist() == pytest.approx(kept.tolist(), abs=TOLERANCE)
    assert (kept != 0).all()


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_a_group_with_one_row_left_gets_zero(kind: str) -> None:
    found = group_advantages(
        [1.0, 0.0, 1.0],
        [0, 0, 0],
        kind=kind,  # type: ignore[arg-type]
        leave_out=[True, True, False],
    )
    assert found.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_come_in_any_order_and_groups_may_have_any_name(kind: str) -> None:
    order = [5, 2, 7, 0, 6, 1, 3, 4]
    straight = group_advantages(REWARDS, GROUP, kind=kind)  # type: ignore[arg-type]
    shuffled = group_advantages(
        [REWARDS[i] for i in order],
        [f"question {GROUP[i]}" for i in order],
        kind=kind,  # type: ignore[arg-type]
    )
    assert shuffled.tolist() == pytest.approx(straight[order].tolist(), abs=TOLERANCE)


def test_leave_one_out_compares_with_the_others() -> None:
    found = group_advantages([1.0, 0.0, 0.5], [0, 0, 0], kind="leave_one_out")
    assert found.tolist() == pytest.approx([0.75, -0.75, 0.0])


def test_reinforce_pp_with_token_counts_is_the_normalisation_over_tokens() -> None:
    rewards, lengths = [1.0, 0.0, 0.25], [2, 3, 1]
    tokens = np.repeat(rewards, lengths)
    by_token = group_advantages(tokens, [0] * 6, kind="reinforce_pp")
    by_row = group_advantages(rewards, [0, 1, 2], kind="reinforce_pp", weights=lengths)
    assert by_row.tolist() == pytest.approx(by_token[[0, 2, 5]].tolist(), abs=TOLERANCE)
    assert np.average(by_row, weights=lengths) == pytest.approx(0.0, abs=TOLERANCE)


def test_batch_renorm_is_the_population_z_score_of_the_rows_kept() -> None:
    found = batch_renorm([2.0, -1.0, float("nan"), 0.5], leave_out=[False, False, True, False])
    kept = np.array([2.0, -1.0, 0.5])
    assert found[[0, 1, 3]].tolist() == pytest.approx(((kept - 0.5) / kept.std()).tolist())
    assert found[2] == 0.0
    assert batch_renorm([0.3, 0.3]).tolist() == [0.0, 0.0]
    # A small mean is still a mean: 1e-6 of a deviation of 1.
    for sign in (1.0, -1.0):
        found = batch_renorm([1.0, -1.0, 0.0, sign * 4e-6])[2]
        assert found == pytest.approx(-sign * 2**0.5 * 1e-6, rel=1e-5)


@pytest.mark.parametrize("successes", [1, 2, 3, 5, 6, 7])
def test_rounding_gives_no_sign_to_the_zeros_of_a_group_where_all_failed(successes: int) -> None:
    rewards = [1.0] * successes + [0.0] * (8 - successes) + [0.0] * 8
    group = [0] * 8 + [1] * 8
    renormed = batch_renorm(group_advantages(rewards, group))
    baseline = group_advantages(rewards, group, kind="reinforce_pp_baseline")
    assert renormed[8:].tolist() == baseline[8:].tolist() == [0.0] * 8
    # The group's rows have the unbiased deviation 1, hence 7/16 of a square each on average.
    up = ((8 - successes) / successes * 7 / 8) ** 0.5
    assert renormed[0] == pytest.approx(up / (7 / 16) ** 0.5, rel=1e-5)


def test_dynamic_sampling_keeps_groups_whose_scores_differ() -> None:
    scores = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.5, 1.0, 0.0, 1.0]
    group = [0, 0, 1, 1, 2, 2, 3, 4, 4, 4]
    leave_out = [False] * 8 + [True, False]
    found = informative_rows(scores, group, leave_out=leave_out)
    assert found.tolist() == [True, True] + [False] * 8
    assert informative_rows(scores, group)[7:].tolist() == [True, True, True]
    assert informative_rows([1.0, 0.0, 0.5], [0] * 3, leave_out=[False, False, True]).tolist() == [
        True,
        True,
        False,
    ]


def test_an_empty_batch_gives_no_advantages() -> None:
    for kind in KINDS:
        assert group_advantages([], [], kind=kind).shape == (0,)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_rewards_that_are_not_finite_are_refused_with_their_row(wrong: float) -> None:
    with pytest.raises(CreditError, match="row 1 holds"):
        group_advantages([0.0, wrong, 1.0], [0, 0, 0])
    with pytest.raises(CreditError, match="row 0 holds"):
        batch_renorm([wrong, 1.0])
    with pytest.raises(CreditError, match="row 1 holds"):
        informative_rows([0.0, wrong], [0, 0])


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(CreditError, match=r"group has shape \(2,\)"):
        group_advantages([1.0, 0.0, 0.5], [0, 0])
    with pytest.raises(CreditError, match="leave_out"):
        group_advantages([1.0, 0.0], [0, 0], leave_out=[True])
    with pytest.raises(CreditError, match="weights"):
        group_advantages([1.0, 0.0], [0, 0], kind="reinforce_pp", weights=[1.0, 0.0])
    with pytest.raises(ConfigError, match="'best'"):
        group_advantages([1.0, 0.0], [0, 0], kind="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'sample'"):
        group_advantages([1.0, 0.0], [0, 0], std="sample")  # type: ignore[arg-type]


def test_advantages_are_computed_without_loading_torch() -> None:
    code = "import sys, tapo_train.algos.advantages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
