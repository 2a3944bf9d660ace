"""Every number of docs/tapo.md is what the credit stage computes."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from credit_rows import golden_rows, population, row, search

from tapo_train.credit import Tapo, TapoOptions
from tapo_train.credit.text import jaccard, token_set

PAGE = (Path(__file__).parents[1] / "docs" / "tapo.md").read_text(encoding="utf-8")
SHOWN = 5e-5
"""Half a unit in the fourth decimal, in which the page gives its numbers."""


def table(heading: str) -> list[list[str]]:
    """Rows of the table whose first line begins so."""
    lines = PAGE[PAGE.index(f"| {heading} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def numbers(text: str) -> list[float]:
    return [float(found.replace("−", "-")) for found in re.findall(r"[−+]?\d+\.\d+", text)]


def corrected(**options: float) -> list[list[float]]:
    """Advantages of the tool turns of the worked batch."""
    result = Tapo(TapoOptions(**options))(golden_rows())
    return [list(turns[:-1]) for turns in result.step_advantages]


def test_the_worked_batch() -> None:
    found = corrected()
    for attempt, shown in table("attempt | advantage of each turn with a call"):
        assert found[int(attempt)] == pytest.approx(numbers(shown), abs=SHOWN)
    metrics = Tapo(TapoOptions())(golden_rows()).metrics
    assert metrics["tapo/n_fail_traj"] == 5 and metrics["tapo/n_fail_steps"] == 8
    assert metrics["tapo/n_fail_steps_corrected"] == 6
    assert metrics["tapo/n_fail_traj_corrected"] == 4


def test_the_switches() -> None:
    places = [(3, 0), (3, 1), (4, 0), (5, 1), (5, 2)]
    for switch, changed, parallel in table("switch | corrected turns | attempt 7"):
        name, value = switch.strip("`").split("=")
        found = corrected(**{name: False if value == "false" else float(value)})
        for attempt, turn in places:
            assert found[attempt][turn] == pytest.approx(numbers(changed)[0], abs=SHOWN)
        assert found[7] == pytest.approx(numbers(parallel), abs=SHOWN)


def test_the_closed_form() -> None:
    rows = table("k | A⁺ | A⁻ | corrected | without the cut")
    assert [int(shown[0]) for shown in rows] == list(range(1, 8))
    for k, up, down, cut, free in rows:
        advantages = population([1.0] * int(k) + [0.0] * (8 - int(k)))
        held = [row(str(i), a, search()) for i, a in enumerate(advantages)]
        with_cut = Tapo(TapoOptions())(held).step_advantages[-1][0]
        without = Tapo(TapoOptions(use_clip=False))(held).step_advantages[-1][0]
        wanted = [advantages[0], advantages[-1], with_cut, without]
        assert [numbers(text)[0] for text in (up, down, cut, free)] == pytest.approx(
            wanted, abs=2 * SHOWN
        )


def test_the_steps_in_between() -> None:
    deviation = math.sqrt(3 / 8 * 5 / 8)
    up, down = (1 - 0.375) / deviation, -0.375 / deviation
    transfer = 2 / 3 * up
    for shown, value in {
        "0.4841": deviation,
        "1.2910": up,
        "−0.7746": down,
        "0.8607": transfer,
        "−0.0861": down + 0.8 * transfer,
        "0.4303": transfer / 2,
        "−0.4303": down + 0.8 * transfer / 2,
        "0.9512": 390 / 410,
    }.items():
        assert shown in PAGE
        assert numbers(shown)[0] == pytest.approx(value, abs=SHOWN)
    similarity = jaccard(token_set("Eiffel Tower height"), token_set("the height of Eiffel Tower"))
    assert similarity == 3 / 4
    assert np.std([1, 1, 1, 0, 0, 0, 0, 0]) == pytest.approx(deviation)
