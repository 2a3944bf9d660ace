"""Whole runs that are stopped, killed or resumed, in bfloat16, on real rows, from a warm start."""

from __future__ import annotations

from pathlib import Path

import pytest
from closing_tool import FAULTY, IDLE_TOOL, NOTES, notes
from forked_runs import tapo_train, train_forked
from safetensors import safe_open
from whole_runs import (
    REAL_ROWS,
    arguments,
    digest_of_weights,
    mixed_for,
    read_rows,
    train_here,
    without_probe,
)

from tapo_train.build.limits import PROBE_TOLERANCE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_stopping_and_resuming_gives_the_run_that_was_never_stopped(
    small_world: Path, tmp_path: Path
) -> None:
    saved = ("run.save_every=1", "learner.schedule=constant", "algo.kl.coef=0.05")
    # With windows of one step the warnings of every later step depend on the first one.
    saved = (*saved, "watch.early_steps=1", "watch.recent_steps=1")
    whole = train_here(small_world, tmp_path / "whole", *saved, "run.steps=3")
    # The reference is the recipe's model: one taken from a checkpoint would start at 0 again.
    assert whole[0]["policy/ref_kl"] == 0 < whole[1]["policy/ref_kl"] < whole[2]["policy/ref_kl"]
    train_here(small_world, tmp_path / "parts", *saved, "run.steps=1")
    parts = train_here(small_world, tmp_path / "parts", *saved, "run.steps=3")
    # A resumed run probes with a turn of its own, from its own first sync on.
    assert [without_probe(row) for row in parts] == [without_probe(row) for row in whole]
    assert "warning/kl_growing" in whole[1] and "warning/kl_growing" not in whole[0]
    ours, theirs = (digest_of_weights(tmp_path / name / "export") for name in ("parts", "whole"))
    assert ours == theirs


def test_a_run_stops_at_the_sign_it_was_told_to_stop_at_and_closes_its_tools(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv(NOTES, str(tmp_path / "notes"))
    monkeypatch.setenv(FAULTY, "1")
    watch = ("watch.early_steps=1", "watch.recent_steps=1", "watch.stop_after=2")
    # A reward that is always 0 makes every group uniform.
    worthless = ("reward.parts.accuracy.weight=0", "reward.parts.format.weight=0", "run.steps=6")
    overrides = (
        *worthless,
        *watch,
        "watch.stop_on=[groups_uniform]",
        "rollout/engine=hf",
        IDLE_TOOL,
    )
    done = tapo_train(*arguments(small_world, tmp_path / "run", *overrides))
    assert done.returncode != 0
    assert "error: watch.stop_on: groups_uniform has held for 2 steps in a row" in done.stderr
    assert "tool idle could not be closed: OSError" in done.stderr
    assert notes(tmp_path / "notes") == ["closed\n"]
    assert done.stdout.count("warning: groups teach nothing") == 1
    rows = read_rows(tmp_path / "run")
    assert [row.get("warning/groups_uniform") for row in rows] == [None, 1.0, 1.0]


def test_a_run_in_bfloat16_learns_and_its_engine_stays_within_the_tolerance_of_the_probe(
    small_world: Path, tmp_path: Path
) -> None:
    small = ("data.questions_per_step=2", "rollout.rollouts_per_question=2", "run.steps=2")
    bf16 = ("model.dtype=bfloat16", *small, *mixed_for(1))
    rows = train_forked(small_world, tmp_path / "run", *bf16, ranks=1)
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert row["probe/mean_abs_diff"] < PROBE_TOLERANCE["bfloat16"]
        assert row["mismatch/abs_logprob_diff"] < PROBE_TOLERANCE["bfloat16"]
        assert row["update/grad_norm"] > 1e-3
    with safe_open(tmp_path / "run" / "export" / "model.safetensors", framework="pt") as exported:
        kinds = {exported.get_slice(name).get_dtype() for name in exported.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}


@pytest.mark.skipif(not REAL_ROWS.is_dir(), reason=f"no real rows at {REAL_ROWS}")
def test_two_steps_on_real_rows_and_photographs(tmp_path: Path) -> None:
    words = ("train", "recipes/real_smoke.yaml", f"run.dir={tmp_path}/run")
    done = tapo_train(*words, TAPO_DATA=str(REAL_ROWS))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"policy: {tmp_path}/run/export"
    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1]
    assert all(row["mismatch/abs_logprob_diff"] < 1e-4 for row in rows)


def test_a_warm_start_writes_a_policy_that_a_run_can_start_from(
    tiny_qwen3_vl: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sft"
    overrides = (
        f"model.path={tiny_qwen3_vl}",
        "sft.worlds=1",
        "sft.questions_per_world=6",
        "sft.drills=[[1,2]]",
        "sft.able_updates=2",
        "sft.habit_updates=2",
        "learner.warmup_updates=1",
    )
    done = tapo_train("sft", "recipes/warm_start.yaml", f"run.dir={out}", *overrides)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "update 6/6" in done.stdout
    assert done.stdout.splitlines()[-1] == f"policy: {out}/export"
    start = tiny_qwen3_vl / "model.safetensors"
    trained = out / "export" / "model.safetensors"
    assert trained.stat().st_size < 0.6 * start.stat().st_size, "not stored as bfloat16"
    assert trained.stat().st_mode == (trained.parent / "config.json").stat().st_mode
    assert (out / "export" / "recipe.yaml").exists()
