"""Whole runs in processes of their own, with the warm-started policy and a small world."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chromium import chromium, needs_chromium
from closing_tool import FAULTY, IDLE_TOOL, NOTES, notes
from dump_and_page import compare
from process_environment import ROOT, environment
from safetensors import safe_open

from tapo_train.build.limits import PROBE_TOLERANCE
from tapo_train.inspector.run_pages import write_pages
from tapo_train.report.catalogue import require_known

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RECIPE = "recipes/demo_cpu.yaml"
TIMEOUT_S = 240
SMALL = (
    "run.wandb=disabled",
    "run.eval_every=0",
    "data.questions_per_step=4",
    "rollout.rollouts_per_question=4",
)
LOSS_TOLERANCE = 1e-5
REAL_ROWS = ROOT.parent / "shared" / "data"
"""A few rows of FVQA and LiveVQA; they are not part of the repository."""
NOT_REPRODUCIBLE = (
    "time",
    "throughput/",
    "memory/",
    "wait/",
    "time/",
    "rollout/tool_latency_s",
    "tapo/time_",
)
"""Metrics that depend on the clock or the machine."""


def mixed_for(one_of: int) -> tuple[str, ...]:
    """A reward by which one of so many questions teaches: by its id, not by what is sampled."""
    path = "tests.rewarding:mixed_for_some"
    return (
        "reward.parts.accuracy.weight=0",
        "reward.parts.format.weight=0",
        f"reward.parts.mixed={{name: custom, path: '{path}', arguments: {{one_of: {one_of}}}}}",
    )


def command(world: Path, out: Path, *overrides: str, ranks: int = 1) -> list[str]:
    """The command line of a run over `world` into `out`."""
    train = ["-m", "tapo_train", "train", RECIPE, f"run.dir={out}", *SMALL]
    data = [
        f"data.train=[{world}/train.jsonl]",
        f"data.validation=[{world}/validation.jsonl]",
        f"tools.corpus={world}/corpus.jsonl",
        f"tools.image_index={world}/image_index.jsonl",
    ]
    if ranks == 1:
        return [sys.executable, *train, *data, *overrides]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={ranks}", *train, *data, *overrides]


def train(world: Path, out: Path, *overrides: str, ranks: int = 1) -> list[dict[str, Any]]:
    """Run to the end; the rows of metrics.jsonl."""
    done = subprocess.run(
        command(world, out, *overrides, ranks=ranks),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"policy: {out}/export"
    return read_rows(out)


def read_rows(out: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds, without what depends on the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if not name.startswith(NOT_REPRODUCIBLE)}
        for row in rows
    ]


def without_probe(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics without how far engine and learner are apart."""
    return {name: value for name, value in row.items() if not name.startswith("probe/")}


def digest_of_weights(folder: Path) -> str:
    """sha256 of an exported policy's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


WIDE = ("credit.scope=batch", "credit.theta=0.1", "credit.alpha_min=0")
"""What is like a call of any question's success: what 32 attempts call depends on the machine."""


@pytest.fixture(scope="module")
def corrected_run(small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps in which TAPO acted."""
    out = tmp_path_factory.mktemp("corrected") / "acting"
    train(small_world, out, "rollout/engine=hf", "run.steps=2", "credit=tapo", *WIDE)
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
    engine = ("rollout/engine=hf", "run.steps=2")
    without = train(small_world, tmp_path / "none", *engine, "credit=none")
    idle = train(small_world, tmp_path / "idle", *engine, "credit=tapo", "credit.beta=0")
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
    small_world: Path, tmp_path: Path
) -> None:
    """Weights and every metric that plain steps have; tools are replayed."""
    small = ("data.questions_per_step=2", "rollout.rollouts_per_question=2")
    overrides = ("rollout/engine=hf", "run.steps=2", f"tools.recording={tmp_path}/calls", *small)
    streamed = train(small_world, tmp_path / "run", *overrides, "tools.replay=record")
    again = command(small_world, tmp_path / "plain", *overrides, "tools.replay=replay")
    worker = str(ROOT / "tests" / "plain_steps_worker.py")
    done = subprocess.run(
        [sys.executable, worker, *again[again.index(RECIPE) :]],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    plain = read_rows(tmp_path / "plain")
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
    alone = train(small_world, tmp_path / "one", *engine)
    together = train(small_world, tmp_path / "two", *engine, ranks=2)
    engine = (*engine, "learner.sequence_parallel=2")
    sharing = train(small_world, tmp_path / "sharing", *engine, ranks=2)
    for run in (together, sharing):
        for name in ("reward/mean", "rollout/tokens", "tapo/n_fail_steps_corrected"):
            assert alone[0][name] == run[0][name]
        for name in ("update/loss", "update/grad_norm"):
            assert alone[0][name] == pytest.approx(run[0][name], abs=LOSS_TOLERANCE)
    assert alone[0]["update/grad_norm"] > 0.01


def test_stopping_and_resuming_gives_the_run_that_was_never_stopped(
    small_world: Path, tmp_path: Path
) -> None:
    engine = ("rollout/engine=hf", "run.save_every=1", "learner.schedule=constant")
    # With windows of one step the warnings of every later step depend on the first one.
    engine = (*engine, "algo.kl.coef=0.05", "watch.early_steps=1", "watch.recent_steps=1")
    whole = train(small_world, tmp_path / "whole", *engine, "run.steps=3")
    # The reference is the recipe's model: one taken from a checkpoint would start at 0 again.
    assert whole[0]["policy/ref_kl"] == 0 < whole[1]["policy/ref_kl"] < whole[2]["policy/ref_kl"]
    train(small_world, tmp_path / "parts", *engine, "run.steps=1")
    parts = train(small_world, tmp_path / "parts", *engine, "run.steps=3")
    # A resumed run probes with a turn of its own, from its own first sync on.
    assert [without_probe(row) for row in parts] == [without_probe(row) for row in whole]
    assert "warning/kl_growing" in whole[1] and "warning/kl_growing" not in whole[0]
    ours, theirs = (digest_of_weights(tmp_path / name / "export") for name in ("parts", "whole"))
    assert ours == theirs


def test_a_run_refills_its_batches_and_counts_everything_that_was_played(
    small_world: Path, tmp_path: Path
) -> None:
    overrides = ("rollout/engine=hf", "rollout.refill_rounds=2", "run.steps=1", *mixed_for(3))
    (row,) = train(small_world, tmp_path / "run", *overrides)
    require_known(name for name in row if name != "step")
    played, uniform = row["rollout/groups_played"], row["advantage/uniform_groups"]
    assert row["rollout/rounds"] > 1, "nothing was refilled"
    assert row["rollout/trajectories"] == 4 * played > 4 * 4
    assert row["rollout/groups_informative"] == pytest.approx((1 - uniform) * played)
    dumped = (tmp_path / "run/tokens/step_000000.jsonl").read_text().splitlines()
    assert len(dumped) == 4 * 4, "what was replaced is not trained and not dumped"


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
    done = subprocess.run(
        command(small_world, tmp_path / "run", *overrides),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode != 0
    assert "error: watch.stop_on: groups_uniform has held for 2 steps in a row" in done.stderr
    assert "tool idle could not be closed: OSError" in done.stderr
    assert notes(tmp_path / "notes") == ["closed\n"]
    assert done.stdout.count("warning: groups teach nothing") == 1
    rows = read_rows(tmp_path / "run")
    assert [row.get("warning/groups_uniform") for row in rows] == [None, 1.0, 1.0]


def test_a_killed_run_resumes_and_logs_nothing_twice(small_world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    overrides = ("run.steps=4", "run.save_every=2")
    process = subprocess.Popen(
        command(small_world, out, *overrides),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + TIMEOUT_S
    while not (out / "metrics.jsonl").exists() or len(read_rows(out)) < 3:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = train(small_world, out, *overrides)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    dumps = sorted(path.name for path in (out / "rollouts").iterdir())
    assert dumps == [f"step_{step:06d}.jsonl" for step in range(4)]
    assert (out / "export" / "model.safetensors").exists()
    assert all(row["probe/max_abs_diff"] < 1e-3 for row in rows)
    assert all(row["mismatch/abs_logprob_diff"] < 1e-4 for row in rows)


def test_a_run_in_bfloat16_learns_and_its_engine_stays_within_the_tolerance_of_the_probe(
    small_world: Path, tmp_path: Path
) -> None:
    small = ("data.questions_per_step=2", "rollout.rollouts_per_question=2", "run.steps=2")
    rows = train(small_world, tmp_path, "model.dtype=bfloat16", *small, *mixed_for(1))
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert row["probe/mean_abs_diff"] < PROBE_TOLERANCE["bfloat16"]
        assert row["mismatch/abs_logprob_diff"] < PROBE_TOLERANCE["bfloat16"]
        assert row["update/grad_norm"] > 1e-3
    with safe_open(tmp_path / "export" / "model.safetensors", framework="pt") as exported:
        kinds = {exported.get_slice(name).get_dtype() for name in exported.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}


@pytest.mark.skipif(not REAL_ROWS.is_dir(), reason=f"no real rows at {REAL_ROWS}")
def test_two_steps_on_real_rows_and_photographs(tmp_path: Path) -> None:
    recipe = ["-m", "tapo_train", "train", "recipes/real_smoke.yaml", f"run.dir={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, *recipe],
        cwd=ROOT,
        env=environment() | {"TAPO_DATA": str(REAL_ROWS)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
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
    recipe = ["-m", "tapo_train", "sft", "recipes/warm_start.yaml", f"run.dir={out}"]
    done = subprocess.run(
        [sys.executable, *recipe, *overrides],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "update 6/6" in done.stdout
    assert done.stdout.splitlines()[-1] == f"policy: {out}/export"
    start = tiny_qwen3_vl / "model.safetensors"
    trained = out / "export" / "model.safetensors"
    assert trained.stat().st_size < 0.6 * start.stat().st_size, "not stored as bfloat16"
    assert (out / "export" / "recipe.yaml").exists()
