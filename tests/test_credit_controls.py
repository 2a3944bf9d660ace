"""Placebo and shrink spend TAPO's sum, and spend it without looking."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from credit_rows import population, row, text
from hypothesis import given
from test_credit_properties import bits, flat, groups, options, quick

from tapo_train.credit import CreditResult, CreditRow, NoTransfer, Tapo, TapoOptions
from tapo_train.credit.controls import Placebo, PlaceboOptions, Shrink, ShrinkOptions, deal
from tapo_train.errors import ConfigError

DOWN = population([1, 0, 0, 0])[1]
FIELDS = tuple(TapoOptions.__dataclass_fields__)


def stages(o: TapoOptions) -> tuple[Tapo, Placebo, Shrink]:
    """The stage and its two controls with the same options."""
    wanted = {name: getattr(o, name) for name in FIELDS} | {"span": "turn"}
    if wanted["turn_reduce"] == "span":
        wanted["turn_reduce"] = "mean"
    return (
        Tapo(TapoOptions(**wanted)),
        Placebo(PlaceboOptions(**wanted)),
        Shrink(ShrinkOptions(**wanted)),
    )


def spread_rows() -> list[CreditRow]:
    """One success; three failing attempts of two steps each, one of the six right."""
    up = population([1, 0, 0, 0])[0]
    return [
        row("a", up, text("tower height")),
        row("b", DOWN, text("tower height"), text("rain")),
        row("c", DOWN, text("snow"), text("wind")),
        row("d", DOWN, text("frost"), text("hail")),
    ]


def placebo(seed: int, rows: list[CreditRow]) -> CreditResult:
    return Placebo(PlaceboOptions(seed=seed))(rows)


@quick
@given(groups("q"), groups("p"), options())
def test_both_controls_have_the_sum_of_tapo(
    first: list[CreditRow], second: list[CreditRow], o: TapoOptions
) -> None:
    rows = first + second
    wanted, *controls = (stage(rows) for stage in stages(o))
    for control in controls:
        assert flat(control).sum() == pytest.approx(flat(wanted).sum(), abs=1e-9)
        assert {k: v for k, v in control.metrics.items() if k in wanted.metrics} == pytest.approx(
            wanted.metrics | {"tapo/time_s": control.metrics["tapo/time_s"]}
        )


@quick
@given(groups("q"), groups("p"), options())
def test_placebo_changes_only_tool_steps_of_failing_rows_and_none_beyond_zero(
    first: list[CreditRow], second: list[CreditRow], o: TapoOptions
) -> None:
    rows = first + second
    result = stages(o)[1](rows)
    for given_row, turns, records in zip(rows, result.step_advantages, result.steps, strict=True):
        eligible = {record.turn for record in records if record.eligible}
        for turn, value in enumerate(turns.tolist()):
            if turn in eligible and given_row.advantage < 0:
                assert given_row.advantage <= value <= 0.0
            else:
                assert value == given_row.advantage
        assert [record.advantage for record in records] == [turns[r.turn] for r in records]


@quick
@given(groups("q"), groups("p"), options())
def test_shrink_keeps_positive_advantages_and_scales_all_others_alike(
    first: list[CreditRow], second: list[CreditRow], o: TapoOptions
) -> None:
    rows = first + second
    tapo, _, shrink = stages(o)
    base, wanted, found = (flat(stage(rows)) for stage in (NoTransfer(), tapo, shrink))
    negative = base < 0.0
    factor = wanted[negative].sum() / base[negative].sum()
    np.testing.assert_allclose(found[negative], factor * base[negative], rtol=1e-12)
    assert (found[~negative] == base[~negative]).all()


def test_shrink_of_one_correctable_step_of_nine_blamed_turns() -> None:
    rows = spread_rows()
    result = Shrink(ShrinkOptions())(rows)
    # TAPO takes one of nine blamed turns to zero.
    assert result.metrics["shrink/factor"] == pytest.approx(8 / 9)
    assert result.step_advantages[3] == pytest.approx([DOWN * 8 / 9] * 3)
    assert [record.advantage for record in result.steps[3]] == pytest.approx([DOWN * 8 / 9] * 2)


def test_shrink_leaves_out_what_leaves_the_loss() -> None:
    rows = [*spread_rows(), row("e", -9.0, text("sleet"), discarded=True)]
    result = Shrink(ShrinkOptions())(rows)
    assert result.metrics["shrink/factor"] == pytest.approx(8 / 9)
    assert result.step_advantages[4].tolist() == [-9.0, -9.0]


def test_placebo_deals_anew_with_another_seed_and_equally_with_the_same() -> None:
    rows = spread_rows()
    assert bits(placebo(3, rows)) == bits(placebo(3, rows))
    draws = [placebo(seed, rows) for seed in range(200)]
    places = [(flat(draw) == 0.0).nonzero()[0].tolist() for draw in draws]
    # Steps are entries 2, 3, 5, 6, 8, 9 of the flat advantages; the rest are answers.
    assert {place for found in places for place in found} == {2, 3, 5, 6, 8, 9}
    assert all(len(found) == 1 for found in places)
    hits = sum(draw.metrics.get("placebo/hit_frac", 0.0) for draw in draws)
    assert 15 <= hits <= 55  # one in six of 200 is 33, give or take 5


def test_placebo_deals_other_rows_of_the_same_seed_elsewhere() -> None:
    draws = set()
    for number in range(20):
        rows = [replace(r, id=f"{r.id}{number}") for r in spread_rows()]
        draws.add(tuple(flat(placebo(0, rows)).tolist()))
    assert len(draws) > 3


def test_dealing_pours_over_only_what_does_not_fit() -> None:
    changes, room = np.array([0.9, 0.0, 0.4, 0.0]), np.array([0.9, 0.5, 0.4, 0.3])
    for seed in range(30):
        given = deal(changes, room, random.Random(seed))
        assert given.sum() == pytest.approx(1.3) and (given <= room + 1e-12).all()
    # Two changes that fit anywhere are on two different steps.
    for seed in range(30):
        given = deal(np.array([0.2, 0.1, 0.0]), np.ones(3), random.Random(seed))
        assert sorted(given.tolist()) == [0.0, 0.1, 0.2]
    # With no room to spare every step is filled, some by parts of several changes.
    for seed in range(30):
        given = deal(np.array([0.9, 0.4, 0.8]), np.array([0.9, 0.5, 0.4, 0.3]), random.Random(seed))
        assert given.tolist() == pytest.approx([0.9, 0.5, 0.4, 0.3])
    full = deal(np.ones(3), np.ones(3), random.Random(0))
    assert full.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", [PlaceboOptions, ShrinkOptions])
@pytest.mark.parametrize(
    ("field", "value"),
    [("span", "call"), ("turn_reduce", "span"), ("use_clip", False), ("beta", -1.0)],
)
def test_controls_refuse_what_they_cannot_spend(
    kind: type[TapoOptions], field: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=rf"credit\.{field} is {value!r}; want"):
        kind(**{field: value})


def test_turns_with_advantages_of_their_own_are_relieved_of_their_own_blame() -> None:
    rows = spread_rows()
    rows[2] = replace(rows[2], turn_advantages=(0.2, -0.1, -0.3))
    wanted = flat(Tapo(TapoOptions())(rows)).sum()
    before = flat(NoTransfer()(rows))
    for seed in range(20):
        found = flat(placebo(seed, rows))
        assert found.sum() == pytest.approx(wanted)
        assert (found[before >= 0.0] == before[before >= 0.0]).all()
        assert (found[before < 0.0] <= 0.0).all() and (found >= before).all()
    shrunk = flat(Shrink(ShrinkOptions())(rows))
    assert shrunk.sum() == pytest.approx(wanted)
    assert (shrunk[before >= 0.0] == before[before >= 0.0]).all()
    ratio = shrunk[before < 0.0] / before[before < 0.0]
    assert ratio == pytest.approx([ratio[0]] * len(ratio))
