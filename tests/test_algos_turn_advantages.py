"""Advantages by turn against loops written from the definitions."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from tapo_train.algos.advantages import group_advantages
from tapo_train.algos.turn_advantages import (
    RewardRow,
    advantages_of,
    outcome_advantages,
    renormalised,
    returns_to_go,
    turn_advantages,
)
from tapo_train.credit.assigners import NoTransfer, Tapo
from tapo_train.credit.gigpo import step_return
from tapo_train.credit.options import TapoOptions
from tapo_train.credit.steps import CreditCall, CreditRow, CreditStep
from tapo_train.errors import CreditError

ROWS = [
    RewardRow(group="a", total=1.0, tokens=(3, 5), turn_rewards=(-0.25, 0.0)),
    RewardRow(group="a", total=0.0, tokens=(2, 2, 4)),
    RewardRow(group="a", total=0.5, tokens=(6,)),
    RewardRow(group="b", total=2.0, tokens=(1, 1)),
    RewardRow(group="b", total=9.0, tokens=(9, 9), left_out=True),
    RewardRow(group="b", total=1.0, tokens=(4, 7), turn_rewards=(0.5, 0.25)),
]
GAMMA = 0.5


def returns(row: RewardRow) -> list[float]:
    own = list(row.turn_rewards) or [0.0] * len(row.tokens)
    own[-1] += row.total - sum(own)
    return [sum(GAMMA ** (k - t) * own[k] for k in range(t, len(own))) for t in range(len(own))]


def test_returns_add_what_is_earned_later_and_the_last_turn_earns_the_outcome() -> None:
    assert returns_to_go(ROWS[0], gamma=1.0).tolist() == [1.0, 1.25]
    assert returns_to_go(ROWS[0], gamma=0.5).tolist() == [0.375, 1.25]
    assert returns_to_go(ROWS[1], gamma=0.5).tolist() == [0.0, 0.0, 0.0]
    assert returns_to_go(ROWS[5], gamma=0.0).tolist() == [0.5, 0.5]


def test_returns_to_go_are_compared_over_all_turns_of_the_group() -> None:
    found = turn_advantages(ROWS, kind="returns_to_go", gamma=GAMMA)
    assert found.turns is not None
    for row, own in zip(ROWS, found.turns, strict=True):
        members = [v for r in ROWS if r.group == row.group and not r.left_out for v in returns(r)]
        mean, deviation = statistics.fmean(members), statistics.stdev(members)
        wanted = [0.0] * len(row.tokens)
        if not row.left_out:
            wanted = [(v - mean) / (deviation + 1e-6) for v in returns(row)]
        assert own.tolist() == pytest.approx(wanted, abs=1e-12)
    assert found.rows.tolist() == [own[0] for own in found.turns]


def test_turns_are_compared_with_those_of_the_same_number() -> None:
    found = turn_advantages(ROWS, kind="per_turn", gamma=GAMMA)
    assert found.turns is not None
    for row, own in zip(ROWS, found.turns, strict=True):
        for t, value in enumerate(own.tolist()):
            members = [
                returns(r)[t]
                for r in ROWS
                if r.group == row.group and not r.left_out and t < len(r.tokens)
            ]
            if row.left_out or len(set(members)) < 2:
                assert value == 0.0
            else:
                spread = statistics.stdev(members) + 1e-6
                wanted = (returns(row)[t] - statistics.fmean(members)) / spread
                assert value == pytest.approx(wanted, abs=1e-12)


def test_reinforce_pp_over_tokens_weighs_each_turn_by_its_tokens() -> None:
    found = turn_advantages(ROWS, kind="reinforce_pp_tokens", gamma=GAMMA)
    assert found.turns is not None
    tokens = [
        value
        for row in ROWS
        if not row.left_out
        for count, value in zip(row.tokens, returns(row), strict=True)
        for _ in range(count)
    ]
    mean, deviation = statistics.fmean(tokens), statistics.stdev(tokens)
    for row, own in zip(ROWS, found.turns, strict=True):
        wanted = [0.0 if row.left_out else (v - mean) / (deviation + 1e-6) for v in returns(row)]
        assert own.tolist() == pytest.approx(wanted, abs=1e-12)


def test_without_turn_rewards_and_discount_it_is_reinforce_pp_weighed_by_tokens() -> None:
    rows = [RewardRow(group=r.group, total=r.total, tokens=r.tokens) for r in ROWS[:4]]
    found = turn_advantages(rows, kind="reinforce_pp_tokens")
    plain = group_advantages(
        [r.total for r in rows],
        [r.group for r in rows],
        kind="reinforce_pp",
        weights=[sum(r.tokens) for r in rows],
    )
    assert found.turns is None
    np.testing.assert_allclose(found.rows, plain, rtol=1e-12)


def test_the_outcome_alone_is_what_it_was_whatever_turns_claim() -> None:
    found = outcome_advantages(ROWS, kind="grpo")
    left_out = [row.left_out for row in ROWS]
    plain = group_advantages([r.total for r in ROWS], [r.group for r in ROWS], leave_out=left_out)
    assert found.turns is None and found.rows.tolist() == plain.tolist()


def test_renormalising_turns_makes_their_mean_0_and_their_deviation_1() -> None:
    found = renormalised(ROWS, turn_advantages(ROWS, kind="returns_to_go", gamma=GAMMA))
    assert found.turns is not None
    kept = [v for r, own in zip(ROWS, found.turns, strict=True) if not r.left_out for v in own]
    assert statistics.fmean(kept) == pytest.approx(0.0, abs=1e-9)
    assert statistics.pstdev(kept) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("found", [[1.0], [0.0] * 5 + [[1.0]], [0.0] * 5 + [float("nan")]])
def test_advantages_of_ones_own_must_be_one_per_row_or_turn_and_numbers(found: list[float]) -> None:
    with pytest.raises(CreditError, match="wanted"):
        advantages_of(ROWS, found)


def test_turn_rewards_of_another_number_of_turns_are_refused() -> None:
    with pytest.raises(CreditError, match="1 turn rewards; wanted one for each of its 2"):
        RewardRow(group="a", total=1.0, tokens=(1, 2), turn_rewards=(0.5,))


def search(turn: int) -> CreditStep:
    return CreditStep(
        turn=turn, calls=(CreditCall(name="text_search_tool", arguments={"query": "x"}),)
    )


def credit_row(id: str, advantages: tuple[float, ...], *, correct: float) -> CreditRow:
    return CreditRow(
        id=id,
        group="g",
        correct=correct,
        reward=correct,
        advantage=advantages[0],
        turn_advantages=advantages,
        num_turns=3,
        steps=(search(0), search(1)),
    )


def test_credit_goes_from_the_advantages_of_turns_and_leaves_alone_what_is_not_blamed() -> None:
    rows = [
        credit_row("up", (1.0, 1.0, 1.0), correct=1.0),
        credit_row("down", (-1.0, 0.5, -2.0), correct=0.0),
    ]
    assert NoTransfer()(rows).step_advantages[1].tolist() == [-1.0, 0.5, -2.0]
    found = Tapo(TapoOptions(beta=0.5))(rows)
    # Both searches equal the success's: only the blamed one gets half of its advantage back.
    assert found.step_advantages[1].tolist() == pytest.approx([-0.5, 0.5, -2.0])
    assert found.step_advantages[0].tolist() == [1.0, 1.0, 1.0]


def test_gigpo_discounts_what_turns_earn_as_well() -> None:
    row = CreditRow(
        id="r", group="g", correct=1.0, reward=1.0, advantage=0.0, num_turns=3,
        turn_rewards=(0.5, 0.0, -0.25),
    )  # fmt: skip
    # The outcome is what no turn claims: 1 - 0.25.
    assert step_return(row, 0, gamma=0.5) == pytest.approx(0.5 - 0.25 * 0.25 + 0.75 * 0.25)
    assert step_return(row, 2, gamma=0.5) == pytest.approx(-0.25 + 0.75)
