"""The study's own arithmetic, and that its tables are those of its records."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from tapo_train.recipe.compose import load_recipe

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts" / "evidence"


@pytest.fixture(scope="module")
def tables() -> Any:
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("tables")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def arms(tables: Any) -> Any:
    return sys.modules["arms"]


def record(*accuracy: float, final: float = 0.5) -> dict[str, Any]:
    last = [None] * (len(accuracy) - 1) + [final]
    return {"steps": {"reward/accuracy": list(accuracy), "eval/accuracy": last}}


def test_measures_of_a_run(tables: Any) -> None:
    run = record(0.2, 0.6, 0.8, 0.9, 1.0, final=0.7)
    assert tables.area(run) == pytest.approx(0.7)
    # Means of three: 0.533, 0.767, 0.9; the last is reached at step 5.
    assert tables.steps_to_target(run) == 5
    assert tables.steps_to_target(record(0.2, 0.2, 0.2, 0.2)) == 5
    assert tables.final(run) == 0.7


def test_an_interval_is_students(tables: Any) -> None:
    mean, half = tables.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # t(0.975, 4) = 2.776, standard deviation 1.5811.
    assert (mean, half) == pytest.approx((3.0, 2.7764 * 1.58114 / 5**0.5), rel=1e-4)


def test_a_comparison_is_paired_by_seed_and_needs_five(tables: Any) -> None:
    plain = {seed: record(0.1 * seed, final=0.0) for seed in range(5)}
    gains = (0.01, 0.02, 0.03, 0.04, 0.05)
    better = {seed: record(0.1 * seed + gains[seed], final=0.0) for seed in range(5)}
    found = tables.compare(better, plain, tables.MEASURES[0])
    # t = 0.03 / (0.015811 / sqrt 5) = 4.243 with 4 degrees of freedom: p = 0.0132.
    assert (found.difference, found.p, found.seeds) == pytest.approx((0.03, 0.0132, 5), rel=1e-2)
    assert tables.compare(better, plain, tables.MEASURES[2]).p == 1.0
    del plain[3]
    assert tables.compare(better, plain, tables.MEASURES[0]) is None


def test_holm_multiplies_the_smallest_most_and_keeps_the_order(tables: Any) -> None:
    assert tables.holm([0.03, 0.01, 0.5]) == pytest.approx([0.06, 0.03, 0.5])
    assert tables.holm([0.01, 0.02, 0.04]) == pytest.approx([0.03, 0.04, 0.04])
    assert tables.holm([0.9, 0.8]) == [1.0, 1.0]
    assert tables.holm([]) == []


def test_every_arm_has_one_meaning_and_every_baseline_is_an_arm(arms: Any) -> None:
    meaning: dict[str, Any] = {}
    for table in arms.TABLES.values():
        names = [arm.name for arm in table.arms]
        assert {name for pair in table.compared for name in pair} <= set(names)
        for arm in table.arms:
            assert meaning.setdefault(arm.name, arm) == arm


def test_every_arm_is_a_legal_recipe(arms: Any) -> None:
    found = {arm.name: arm for table in arms.TABLES.values() for arm in table.arms}
    for arm in found.values():
        recipe = load_recipe(arms.RECIPE, arm.overrides)
        assert recipe.credit.name == arm.overrides[0].removeprefix("credit=")
    assert load_recipe(arms.RECIPE).learner.lr == arms.RATE


def test_committed_tables_are_those_of_the_committed_records(
    tables: Any, arms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = (arms.PAGES / "tables.md").read_text()
    monkeypatch.setattr(tables, "PAGES", tmp_path)
    monkeypatch.setattr(
        tables, "plot_curves", lambda name, table, records, out: _has_two(table, records)
    )
    tables.main()
    assert (tmp_path / "tables.md").read_text() == committed


def _has_two(table: Any, records: Any) -> bool:
    return any(len(records.get(arm.name, {})) >= 2 for arm in table.arms)
