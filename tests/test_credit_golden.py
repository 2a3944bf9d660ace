"""The published numbers: closed form, similarities, and a worked batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from credit_rows import golden_rows, population, row, search, unbiased, zoom

from tapo_train.credit import CreditRow, NoTransfer, Tapo, TapoOptions
from tapo_train.credit.regions import iou
from tapo_train.credit.text import jaccard, token_set

TOLERANCE = 5e-5
"""Half a unit in the fourth decimal, in which the values are given."""


def steps_of(rows: list[CreditRow], **options: Any) -> list[list[float]]:
    """Advantages of the tool turns, row by row; the answer turn must keep its own."""
    result = Tapo(TapoOptions(**options))(rows)
    for given, turns in zip(rows, result.step_advantages, strict=True):
        assert turns[-1] == given.advantage
    return [list(turns[:-1]) for turns in result.step_advantages]


CLOSED_FORM = [
    # k, population A+, A-, corrected, without cut, unbiased A+, A-, corrected, without cut
    (1, 2.6457, -0.3780, 0, 1.7386, 2.4749, -0.3536, 0, 1.6263),
    (2, 1.7320, -0.5773, 0, 0.8083, 1.6202, -0.5401, 0, 0.7561),
    (3, 1.2910, -0.7746, 0, 0.2582, 1.2076, -0.7246, 0, 0.2415),
    (4, 1.0000, -1.0000, -0.2000, -0.2000, 0.9354, -0.9354, -0.1871, -0.1871),
    (5, 0.7746, -1.2910, -0.6713, -0.6713, 0.7246, -1.2076, -0.6280, -0.6280),
    (6, 0.5773, -1.7320, -1.2702, -1.2702, 0.5401, -1.6202, -1.1881, -1.1881),
    (7, 0.3780, -2.6457, -2.3434, -2.3434, 0.3536, -2.4749, -2.1920, -2.1920),
]


@pytest.mark.parametrize(("k", "up", "down", "cut", "free", "u_up", "u_down", "u_cut", "u_free"),
                         CLOSED_FORM)  # fmt: skip
def test_k_successes_of_eight_give_the_closed_form(
    k: int, up: float, down: float, cut: float, free: float,
    u_up: float, u_down: float, u_cut: float, u_free: float,
) -> None:  # fmt: skip
    rewards = [1.0] * k + [0.0] * (8 - k)
    cases = [(population(rewards), up, down, cut, free)]
    cases.append((unbiased(rewards), u_up, u_down, u_cut, u_free))
    for advantages, plus, minus, with_cut, without_cut in cases:
        rows = [row(str(i), a, search()) for i, a in enumerate(advantages)]
        clipped, unclipped = steps_of(rows), steps_of(rows, use_clip=False)
        # The table was computed with epsilon 1e-6 in both halves.
        assert advantages[0] == pytest.approx(plus, abs=2 * TOLERANCE)
        assert advantages[-1] == pytest.approx(minus, abs=2 * TOLERANCE)
        assert clipped[0] == [advantages[0]]
        assert clipped[-1] == pytest.approx([with_cut], abs=2 * TOLERANCE)
        assert unclipped[-1] == pytest.approx([without_cut], abs=2 * TOLERANCE)


@pytest.mark.parametrize(
    ("left", "right", "value"),
    [
        ("Eiffel Tower height", "eiffel tower height?", 1.0),
        ("Eiffel Tower height", "The height of Eiffel Tower", 0.75),
        ("Golden Gate Bridge opening year", "what year did the Golden Gate Bridge open", 0.5),
        ("埃菲尔铁塔高度", "埃菲尔铁塔的高度", 0.875),
    ],
)
def test_token_jaccard_has_the_published_values(left: str, right: str, value: float) -> None:
    assert jaccard(token_set(left), token_set(right)) == value


def test_iou_has_the_published_value() -> None:
    assert iou([100, 100, 500, 500], [150, 100, 550, 500]) == pytest.approx(7 / 9)


C, K = -0.0861, -0.7746
UP = 1.2910
GOLDEN = [[UP] * 3, [UP] * 2, [UP] * 2, [C, C, K], [C, K], [K, C, C], []]


@pytest.mark.parametrize(("reduce", "parallel"), [("mean", -0.4303), ("max", C), ("min", K)])
def test_the_worked_batch_is_corrected_as_published(reduce: str, parallel: float) -> None:
    values = steps_of(golden_rows(), turn_reduce=reduce)
    for found, wanted in zip(values, [*GOLDEN, [parallel]], strict=True):
        assert found == pytest.approx(wanted, abs=TOLERANCE)


def test_the_worked_batch_has_the_published_metrics() -> None:
    metrics = Tapo(TapoOptions())(golden_rows()).metrics
    assert metrics["tapo/n_fail_traj"] == metrics["tapo/n_fail_traj_mixed"] == 5
    assert metrics["tapo/n_fail_steps"] == 8
    assert metrics["tapo/n_fail_steps_corrected"] == 6
    assert metrics["tapo/n_fail_traj_corrected"] == 4
    assert metrics["tapo/frac_fail_traj_corrected"] == 4 / 5
    assert metrics["tapo/frac_fail_steps_corrected"] == 6 / 8
    assert metrics["tapo/n_clusters"] == 3
    assert metrics["tapo/cluster_size_mean"] == pytest.approx(7 / 3)
    # Five steps move by 0.8 * 0.860663, the one with a parallel stranger by half of that.
    assert metrics["tapo/F_mean"] == pytest.approx(0.860663 * 5.5 / 6, abs=1e-6)
    assert metrics["tapo/delta_adv_mean"] == pytest.approx(0.8 * 0.860663 * 5.5 / 6, abs=1e-6)
    assert metrics["tapo/sup_mean"] == pytest.approx(2 / 3)
    assert metrics["tapo/by_tool/text_search_tool/total"] == 3
    assert metrics["tapo/by_tool/text_search_tool/corrected"] == 1


def test_the_worked_batch_is_counted_by_tool_and_by_turn() -> None:
    # alpha_min 0.7 is above every support of 2/3: six steps stay similar, none is corrected.
    closed, opened = (Tapo(TapoOptions(alpha_min=a))(golden_rows()).metrics for a in (0.7, 0.25))
    parts = {
        "by_tool/image_search_tool": (4, 4),
        "by_tool/text_search_tool": (3, 1),
        "by_tool/image_zoom_in_tool": (2, 1),
        "by_turn/0": (3, 3),
        "by_turn/1": (3, 2),
        "by_turn/2": (2, 1),
        "calls": (9, 6),
    }
    for part, (total, similar) in parts.items():
        for metrics, corrected in ((closed, 0), (opened, similar)):
            found = [metrics[f"tapo/{part}/{kind}"] for kind in ("total", "matched", "corrected")]
            assert found == [total, similar, corrected]
    assert closed["tapo/frac_fail_steps_corrected_theta"] == 6 / 8
    assert closed["tapo/frac_fail_traj_corrected_theta"] == 4 / 5
    assert closed["tapo/frac_fail_steps_corrected"] == 0.0
    assert opened["tapo/sim_mean"] == 1.0


def test_records_hold_similarity_support_and_reference_advantage() -> None:
    record = Tapo(TapoOptions())(golden_rows()).steps[3][1]
    assert record.similarity == 1.0
    assert record.support == pytest.approx(2 / 3)
    assert record.reference_advantage == pytest.approx(1.290994, abs=1e-6)
    assert record.transfer == pytest.approx(0.860663, abs=1e-6)
    assert (record.theta, record.alpha, record.matched, record.clipped) == (True, True, True, False)


def test_without_support_every_matched_step_is_cut_to_zero() -> None:
    values = steps_of(golden_rows(), use_support=False)
    assert values[3] == [0.0, 0.0, pytest.approx(K, abs=TOLERANCE)]
    assert values[7] == pytest.approx([-0.2582], abs=TOLERANCE)


def test_half_the_beta_gives_half_the_correction() -> None:
    values = steps_of(golden_rows(), beta=0.4)
    assert values[3][:2] == pytest.approx([-0.4303, -0.4303], abs=TOLERANCE)
    assert values[7] == pytest.approx([-0.6025], abs=TOLERANCE)


@pytest.mark.parametrize("options", [{"alpha_min": 0.7}, {"beta": 0.0}])
def test_a_closed_gate_or_beta_zero_is_the_base_algorithm_bit_for_bit(options: Any) -> None:
    rows = golden_rows()
    base, same = NoTransfer()(rows), Tapo(TapoOptions(**options))(rows)
    for left, right in zip(base.step_advantages, same.step_advantages, strict=True):
        assert left.tobytes() == right.tobytes()
    assert base.call_advantages == same.call_advantages


def test_graded_rewards_use_the_mean_advantage_of_the_successes() -> None:
    rewards = [1.5, 1.5, 1.0, 0.5, 0.5, 0.5, 0, 0]
    advantages = unbiased(rewards)
    rows = [row(str(i), a, search(), correct=float(i < 3)) for i, a in enumerate(advantages)]
    result = Tapo(TapoOptions())(rows)
    assert advantages == pytest.approx(
        [1.3681] * 2 + [0.5262] + [-0.3157] * 3 + [-1.1577] * 2, abs=TOLERANCE
    )
    assert result.steps[3][0].reference_advantage == pytest.approx(1.0875, abs=TOLERANCE)
    found = [turns[0] for turns in result.step_advantages]
    assert found[3:] == pytest.approx([0, 0, 0, -0.2877, -0.2877], abs=TOLERANCE)
    assert result.metrics["tapo/clip_frac"] == 3 / 5


@pytest.mark.parametrize(
    ("rewards", "correct"), [([0.5, 0.5, 0, 0, 0, 0, 0, 0], 0.0), ([1.5] * 7 + [1.0], 1.0)]
)
def test_format_differences_alone_move_no_credit(rewards: list[float], correct: float) -> None:
    advantages = unbiased(rewards)
    rows = [row(str(i), a, search(), correct=correct) for i, a in enumerate(advantages)]
    assert [turns[0] for turns in steps_of(rows)] == advantages
    if correct:
        assert advantages[-1] == pytest.approx(-2.4749, abs=TOLERANCE)


def test_a_chain_of_overlapping_zooms_is_one_cluster() -> None:
    boxes = [(0, 0, 400, 400), (60, 0, 460, 400), (120, 0, 520, 400), (150, 0, 550, 400)]
    rows = [
        row(str(i), a, zoom(*box))
        for i, (a, box) in enumerate(zip(population([1, 1, 1, 0]), boxes, strict=True))
    ]
    result = Tapo(TapoOptions())(rows)
    record = result.steps[3][0]
    assert iou(boxes[0], boxes[1]) == pytest.approx(0.739, abs=5e-4)
    assert iou(boxes[0], boxes[2]) == pytest.approx(0.538, abs=5e-4)
    assert record.support == 1.0
    assert record.similarity == pytest.approx(0.8605, abs=TOLERANCE)
    assert rows[3].advantage == pytest.approx(-1.7321, abs=TOLERANCE)
    assert record.advantage == pytest.approx(-1.3346, abs=TOLERANCE)
    assert np.array_equal(result.step_advantages[3], [record.advantage, rows[3].advantage])
