"""The fault run, short: one rank, two steps, servers that misbehave in every way we know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from process_environment import ROOT, environment, free_port

sys.path.insert(0, str(ROOT / "scripts"))
from chaos_table import Row, touched


def trajectory(id: str, total: float, advantage: float, *outcomes: str) -> Row:
    """A row of the token dump, as far as the table reads it."""
    calls = [{"outcome": outcome, "executed": True, "observation": ""} for outcome in outcomes]
    stop = "infra" if set(outcomes) & {"timeout", "infra_error"} else "answer"
    return {
        "id": id,
        "step": "step_000000",
        "stop": stop,
        "reward": {"total": total},
        "advantage": advantage,
        "turns": [{"calls": calls, "advantage": advantage}],
    }


HALF = 0.5**0.5 - 5e-7
"""(1 - 0.5) / (std + 1e-6) of the rewards 0 and 1, to 1e-12."""


def test_the_table_finds_a_failure_that_reached_the_baseline() -> None:
    good = [
        trajectory("q/0.0.0", 1.0, HALF, "ok"),
        trajectory("q/0.0.1", 0.0, -HALF, "refused"),
        trajectory("q/0.0.2", 0.0, 0.0, "ok", "timeout"),
    ]
    assert touched(good, good[:2]) == []
    # The mean of 1, 0 and the failed 0 is 1/3: its reward was in the baseline.
    in_baseline = [good[0] | {"advantage": 1.1547}, good[1] | {"advantage": -0.57735}, good[2]]
    assert [line.split(":")[0] for line in touched(in_baseline, good[:2])] == ["q/0.0.0", "q/0.0.1"]
    trained = trajectory("q/0.0.2", 0.0, -0.1, "infra_error")
    assert len(touched([*good[:2], trained], good[:2])) == 2
    assert len(touched(good, good)) == 1, "a credit row of a failed trajectory"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_whose_search_servers_misbehave_ends_and_trains_on_no_failure(
    small_world: Path, tmp_path: Path
) -> None:
    settings = {"PYTHON": sys.executable, "WORLD": str(small_world), "KINDS": "faults"}
    settings |= {"CHAOS_EVERY": "2", "CHAOS_DIES_AT": "40"}
    done = subprocess.run(
        ["scripts/chaos.sh", str(tmp_path / "chaos"), "2", "1"],
        cwd=ROOT,
        env=environment() | settings | {"PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=500,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "0 of them touched loss" in done.stdout
    assert "tried to leave the machine: 0" in done.stdout
    assert "| killed | 1 |" in done.stdout and "| ok |" in done.stdout
    assert "| infra_error: a connection that" in done.stdout
    assert "infra_error: more bytes than allowed |" in done.stdout
