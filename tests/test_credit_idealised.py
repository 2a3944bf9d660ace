"""The idealised agent: its credit stages are the real ones, and its diagram says what it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from credit_rows import row, text

from tapo_train.credit import NoTransfer, Tapo, TapoOptions
from tapo_train.credit.idealised import (
    Batch,
    Placebo,
    Setting,
    group_advantage,
    learning_curves,
    mean_success,
    no_transfer,
    shrink,
    tapo,
)
from tapo_train.credit.place import place, setting_of

WORDS = ("red", "green", "blue")


def drawn(seed: int) -> Batch:
    """Two agents, three groups of six attempts at a chain of four choices."""
    rng = np.random.default_rng(seed)
    success = rng.random((2, 3, 6)) < 0.4
    chosen = rng.integers(0, 3, size=(2, 3, 6, 4))
    return Batch(group_advantage(success), chosen, success, 3)


@pytest.mark.parametrize("seed", range(4))
def test_its_transfer_is_that_of_the_stage_on_rows(seed: int) -> None:
    batch = drawn(seed)
    found = tapo(batch)
    for agent in range(2):
        for group in range(3):
            rows = [
                row(
                    str(i),
                    float(batch.advantage[agent, group, i]),
                    *(
                        text(f"place{t} {WORDS[choice]}")
                        for t, choice in enumerate(batch.chosen[agent, group, i])
                    ),
                    correct=float(batch.success[agent, group, i]),
                )
                for i in range(6)
            ]
            stage = Tapo(TapoOptions(theta_by_tool={}, theta=1.0))(rows)
            wanted = [turns[:-1] for turns in stage.step_advantages]
            np.testing.assert_allclose(found[agent, group], wanted, atol=1e-12)
            plain = [turns[:-1] for turns in NoTransfer()(rows).step_advantages]
            np.testing.assert_array_equal(no_transfer(batch)[agent, group], plain)


@pytest.mark.parametrize("seed", range(4))
def test_its_controls_have_the_sum_of_tapo_agent_by_agent(seed: int) -> None:
    batch = drawn(seed)
    wanted = tapo(batch).sum(axis=(1, 2, 3))
    assert (wanted > no_transfer(batch).sum(axis=(1, 2, 3))).all()
    for control in (Placebo(seed), shrink):
        found = control(batch)
        np.testing.assert_allclose(found.sum(axis=(1, 2, 3)), wanted, atol=1e-9)
        above = batch.steps() >= 0.0
        np.testing.assert_array_equal(found[above], batch.steps()[above])
        assert (found[~above] <= 1e-12).all()


def test_a_curve_begins_at_the_exact_probability_of_the_setting() -> None:
    setting = Setting(length=3, start=0.5, late_failure=0.2, luck=0.1, updates=2)
    curves = learning_curves(setting, no_transfer, agents=4)
    # 0.5 ** 3 * 0.8 + (1 - 0.5 ** 3) * 0.1
    assert curves.shape == (4, 2) and curves[:, 0] == pytest.approx([0.1875] * 4)
    assert len(set(curves[:, 1].tolist())) == 4


def test_groups_of_one_teach_nothing_and_a_rate_of_zero_neither() -> None:
    for setting in (Setting(rollouts=1, updates=5), Setting(learning_rate=0.0, updates=5)):
        curves = learning_curves(setting, tapo, agents=2)
        assert (curves == curves[:, :1]).all()


def test_more_luck_and_fewer_late_failures_start_higher() -> None:
    base = Setting(updates=1)
    starts = [
        float(learning_curves(s, no_transfer, agents=1)[0, 0])
        for s in (base, replace(base, luck=0.2), replace(base, late_failure=0.0))
    ]
    assert starts[0] < starts[2] < starts[1]


@pytest.mark.parametrize("length", [3, 5])
def test_in_the_model_transfer_helps_and_neither_control_does(length: int) -> None:
    setting = Setting(length=length, choices=2, start=0.5, updates=60)
    means = {
        name: mean_success(setting, credit, agents=16).mean()
        for name, credit in (
            ("none", no_transfer),
            ("tapo", tapo),
            ("placebo", Placebo()),
            ("shrink", shrink),
        )
    }
    # Measured: 0.02 to 0.08 above, 0.02 to 0.04 below; standard errors are 0.004 or less.
    assert means["tapo"] > means["none"] + 0.01
    assert means["placebo"] < means["none"] - 0.005 and means["shrink"] < means["none"] - 0.005


def test_rollouts_are_placed_by_what_their_attempts_share() -> None:
    chain = [text("a one"), text("b two")]
    rows = [
        row("0", 1.0, *chain),
        row("1", 1.0, *chain),
        row("2", -1.0, *chain),  # complete, failed late
        row("3", -1.0, text("a one")),  # too short
        row("4", -1.0, text("a one"), text("z nine")),  # strayed
        row("5", -1.0),  # guessed
        row("6", -1.0, text("c"), group="p"),  # of a question without a success
        row("7", -1.0, text("c"), group="p"),
        row("8", 1.0, *chain, text("e three")),  # longer than it had to be
    ]
    found = setting_of(rows, Tapo(TapoOptions())(rows))
    assert found is not None
    assert (found.length, found.rollouts) == (2, 4)
    assert found.late_failure == pytest.approx(1 / 4)
    # 3 of 9 attempts are right: 1 / 3 = start ** 2 * 3 / 4.
    assert found.start == pytest.approx((4 / 9) ** 0.5)


def test_rollouts_without_a_success_by_tools_have_no_place() -> None:
    for rows in (
        [row("0", -1.0, text("a")), row("1", -1.0, text("b"))],
        [row("0", 1.0), row("1", -1.0, text("b"))],
        [row("0", 1.0, text("a")), row("1", 1.0, text("a"))],
    ):
        assert place(rows, Tapo(TapoOptions())(rows)) is None


def test_a_place_is_simulated_with_and_without_transfer() -> None:
    rows = [row("0", 1.0, text("a b"), text("c d")), row("1", -1.0, text("a b"), text("c d"))]
    found = place(rows, Tapo(TapoOptions())(rows))
    assert found is not None and found.setting.late_failure == 0.5
    assert 0.3 < found.plain < found.transfer < 0.5
