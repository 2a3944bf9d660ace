"""Whole runs: what must not change their numbers, and what is shown of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chromium import chromium, needs_chromium
from dump_and_page import compare
from forked_runs import train_forked
from plain_steps import plain_steps
from whole_runs import (
    LOSS_TOLERANCE,
    digest_of_weights,
    mixed_for,
    read_rows,
    train_here,
)

from tapo_train import build
from tapo_train.inspector.run_pages import write_pages
from tapo_train.report.catalogue import require_known

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WIDE = ("credit.scope=batch", "credit.theta=0.1", "credit.alpha_min=0")
"""What is like a call of any question's success: what 32 attempts call depends on the machine."""


@pytest.fixture(scope="module")
def corrected_run(small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps in which TAPO acted."""
    out = tmp_path_factory.mktemp("corrected") / "acting"
    train_here(small_world, out, "run.steps=2", "credit=tapo", *WIDE)
    return out


@needs_chromium
def test_the_pages_of_a_run_show_the_numbers_of_its_dump(
    corrected_run: Path, tmp_path: Path
) -> None:
    write_pages(corrected_run, tmp_path)
    with chromium() as browser:
        page = browser.new_page()
        found = [
            compare(page, tmp_path, corrected_run, step, number)
            for step in range(2)
            for number in range(4)
        ]
    assert sum(held["attempts"] for held in found) == 32
    assert sum(held["corrected"] for held in found) > 0
    assert sum(held["tokens"] for held in found) > 200


def test_no_credit_stage_and_tapo_with_beta_zero_are_the_same_run_bit_for_bit(
    small_world: Path, tmp_path: Path, corrected_run: Path
) -> None:
    steps = "run.steps=2"
    without = train_here(small_world, tmp_path / "none", steps, "credit=none")
    idle = train_here(small_world, tmp_path / "idle", steps, "credit=tapo", "credit.beta=0")
    acting = read_rows(corrected_run)
    require_known(name for row in acting for name in row if name != "step")
    for ours, theirs in zip(without, idle, strict=True):
        assert ours == {name: theirs[name] for name in ours}
    weights = {name: digest_of_weights(tmp_path / name / "export") for name in ("none", "idle")}
    assert weights["none"] == weights["idle"]
    assert sum(row["tapo/n_fail_steps_corrected"] for row in acting) > 0, "nothing to correct"
    with_clock = (corrected_run / "metrics.jsonl").read_text().splitlines()
    for row in map(json.loads, with_clock):
        assert row["tapo/time_s"] == row["time/credit_s"] > 0
        assert row["tapo/time_frac"] == pytest.approx(row["time/credit_s"] / row["time/step_s"])
    assert '"tapo/time_' not in (tmp_path / "none" / "metrics.jsonl").read_text()
    assert digest_of_weights(corrected_run / "export") != weights["none"]


def test_without_staleness_a_stream_is_the_run_of_plain_steps_bit_for_bit(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and every metric that plain steps have; tools are replayed."""
    small = ("data.questions_per_step=2", "rollout.rollouts_per_question=2")
    overrides = ("run.steps=2", f"tools.recording={tmp_path}/calls", *small)
    streamed = train_here(small_world, tmp_path / "run", *overrides, "tools.replay=record")
    monkeypatch.setattr(build, "build_rounds", plain_steps)
    plain = train_here(small_world, tmp_path / "plain", *overrides, "tools.replay=replay")
    assert len(plain) == len(streamed) == 2 and sum(row["rollout/calls"] for row in plain) > 0
    for ours, theirs in zip(streamed, plain, strict=True):
        assert {name: ours[name] for name in theirs if "/cached" not in name} == {
            name: value for name, value in theirs.items() if "/cached" not in name
        }
    weights = [digest_of_weights(tmp_path / name / "export") for name in ("run", "plain")]
    assert weights[0] == weights[1]


def test_two_ranks_compute_the_loss_of_one_on_the_same_batch_also_when_they_share_micro_batches(
    small_world: Path, tmp_path: Path
) -> None:
    engine = ("rollout/engine=hf", "run.steps=1")
    alone = train_here(small_world, tmp_path / "one", "run.steps=1")
    together = train_forked(small_world, tmp_path / "two", *engine, ranks=2)
    engine = (*engine, "learner.sequence_parallel=2")
    sharing = train_forked(small_world, tmp_path / "sharing", *engine, ranks=2)
    for run in (together, sharing):
        for name in ("reward/mean", "rollout/tokens", "tapo/n_fail_steps_corrected"):
            assert alone[0][name] == run[0][name]
        for name in ("update/loss", "update/grad_norm"):
            assert alone[0][name] == pytest.approx(run[0][name], abs=LOSS_TOLERANCE)
    assert alone[0]["update/grad_norm"] > 0.01


def test_a_run_refills_its_batches_and_counts_everything_that_was_played(
    small_world: Path, tmp_path: Path
) -> None:
    overrides = ("rollout.refill_rounds=2", "run.steps=1", *mixed_for(3))
    (row,) = train_here(small_world, tmp_path / "run", *overrides)
    require_known(name for name in row if name != "step")
    played, uniform = row["rollout/groups_played"], row["advantage/uniform_groups"]
    assert row["rollout/rounds"] > 1, "nothing was refilled"
    assert row["rollout/trajectories"] == 4 * played > 4 * 4
    assert row["rollout/groups_informative"] == pytest.approx((1 - uniform) * played)
    dumped = (tmp_path / "run/tokens/step_000000.jsonl").read_text().splitlines()
    assert len(dumped) == 4 * 4, "what was replaced is not trained and not dumped"
