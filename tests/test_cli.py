"""The command line: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import process_environment
import pytest

from tapo_train.__main__ import COMMANDS, Command, main
from tapo_train.commands.evaluate import eval_overrides
from tapo_train.recipe.compose import load_recipe

ROOT = Path(__file__).resolve().parent.parent
DEMO = str(ROOT / "recipes" / "demo_cpu.yaml")
HELP_SECONDS = 0.5


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tapo_train", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=process_environment.environment() | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_names_every_command_and_starts_fast() -> None:
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        done = run("--help")
        seconds.append(time.monotonic() - start)
        assert done.returncode == 0
        assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert min(seconds) < HELP_SECONDS


def test_a_dry_run_prints_a_recipe_and_the_batch_arithmetic(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--dry-run", DEMO, "credit=none", "run.steps=3"]) == 0
    printed = capsys.readouterr().out
    assert "128 trajectories →" in printed.splitlines()[-1]
    (tmp_path / "r.yaml").write_text(printed)
    assert load_recipe(tmp_path / "r.yaml") == load_recipe(DEMO, ["credit=none", "run.steps=3"])


def test_overrides_may_stand_before_and_after_an_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["sft", DEMO, "run.seed=5", "--dry-run", "run.steps=6"]) == 0
    printed = capsys.readouterr().out
    assert "  seed: 5\n" in printed
    assert "  steps: 6\n" in printed


PAPER = str(ROOT / "recipes" / "paper.yaml")
EIGHT = ("--dry-run", "--device-gb", "80", "--devices", "8")


def test_the_papers_recipe_fits_eight_devices_of_80_gb_phase_by_phase(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", PAPER, *EIGHT]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "r.yaml").write_text(printed)
    assert load_recipe(tmp_path / "r.yaml") == load_recipe(PAPER)
    rows = {line[2:22].strip(): line[22:].split() for line in printed.splitlines() if "#" in line}
    assert rows["[GB] per device"] == ["rollout", "sync", "scoring", "update"]
    # 8.77e9 weights of 2 bytes; 12 bytes of each of the 8.19e9 that are trained over 8 devices.
    assert rows["engine's weights"] == ["17.5", "17.5", "-", "-"]
    assert rows["optimizer"] == ["12.3"] * 4
    assert all(float(left) > 0 for left in rows["left"])
    assert "× 8 ranks ×" in printed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "rollout.engine.sleep_in_update=false",
            "engine.sleep_in_update: found false, wanted true",
        ),
        (
            "learner.zero_stage=2",
            "learner.zero_stage: found 2, wanted 3: the phase 'rollout' takes",
        ),
        ("rollout.max_tokens=131072", "learner.sequence_parallel: found 1, wanted "),
        ("rollout.engine.gpu_memory_utilization=0.25", "fewer than a trajectory's rollout.max_tok"),
    ],
)
def test_a_recipe_that_cannot_fit_is_refused_with_the_field_to_change(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", PAPER, *EIGHT, override]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_counts_the_ranks_of_torchrun() -> None:
    done = run("train", DEMO, "--dry-run", WORLD_SIZE="2", RANK="0")
    assert "× 2 ranks ×" in done.stdout


WARM_UP = str(ROOT / "recipes" / "warm_start.yaml")  # 5700 updates of the warm start, 30 of a run


@pytest.mark.parametrize(
    ("command", "recipe", "warmup", "updates"),
    [("train", WARM_UP, 30, 30), ("train", DEMO, 61, 60), ("sft", WARM_UP, 5700, 5700)],
)
def test_a_cosine_without_updates_after_the_warm_up_is_refused_before_anything_starts(
    command: str, recipe: str, warmup: int, updates: int, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["learner.schedule=cosine", "run.steps=30"]
    if recipe == DEMO:
        overrides += ["learner.epochs=2"]

    def dry_run(warmup: int) -> int:
        warm_up = f"learner.warmup_updates={warmup}"
        return main([command, recipe, "--dry-run", *overrides, warm_up])

    assert dry_run(warmup) == 2
    message = f"learner.warmup_updates: found {warmup}, wanted fewer than the {updates} updates"
    assert message in capsys.readouterr().err
    assert dry_run(updates - 1) == 0
    overrides[0] = "learner.schedule=constant"
    assert dry_run(warmup) == 0


def test_a_wrong_recipe_ends_in_one_message_and_no_traceback() -> None:
    done = run("train", DEMO, "learner.lrr=3")
    assert done.returncode == 2
    assert done.stdout == ""
    message = f"error: {DEMO}: learner.lrr: unknown key; did you mean learner.lr?"
    assert done.stderr.strip() == message


def test_debug_shows_where_an_error_comes_from() -> None:
    done = run("--debug", "train", DEMO, "learner.lrr=3")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_only_the_first_rank_speaks_of_a_wrong_recipe() -> None:
    first = run("train", DEMO, "learner.lrr=3", RANK="0", WORLD_SIZE="2")
    second = run("train", DEMO, "learner.lrr=3", RANK="1", WORLD_SIZE="2")
    assert "learner.lrr" in first.stderr
    assert (second.returncode, second.stderr) == (2, "")


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "'trian'; wanted one of train" in capsys.readouterr().err


def test_no_command_prints_the_usage_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().out


def test_eval_without_a_recipe_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--model", str(tmp_path), "--tasks", str(tmp_path)]) == 2
    assert "wanted --recipe FILE" in capsys.readouterr().err


def test_eval_without_tasks_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--model", "m", "--tasks", "no.jsonl", "--recipe", DEMO]) == 2
    assert "--tasks no.jsonl does not exist" in capsys.readouterr().err


def test_eval_of_fewer_than_no_questions_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "m", "--tasks", DEMO, "--recipe", DEMO, "--questions", "-3"]
    assert main(["eval", *arguments]) == 2
    assert "--questions is -3; wanted 0 or more" in capsys.readouterr().err


def test_eval_into_a_folder_is_refused_before_the_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "m", "--tasks", DEMO, "--recipe", DEMO, "--out", str(tmp_path)]
    assert main(["eval", *arguments]) == 2
    assert f"--out {tmp_path} is a folder; wanted a file" in capsys.readouterr().err


def test_eval_into_a_folder_that_cannot_be_written_is_refused_before_the_evaluation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--model", "m", "--tasks", DEMO, "--recipe", DEMO, "--out", "/proc/x/out.jsonl"]
    assert main(["eval", *arguments]) == 2
    assert "eval: --out: found /proc/x, where nothing can be written" in capsys.readouterr().err


def test_a_full_disk_ends_in_one_message_that_names_the_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setitem(COMMANDS, "fill", Command(module="full_disk", summary=""))
    assert main(["fill"]) == 2
    message = "error: runs/demo/metrics.jsonl: No space left on device"
    assert capsys.readouterr().err.strip() == message
    with pytest.raises(OSError, match="No space left"):
        main(["fill", "--debug"])


def test_a_run_wants_a_name_for_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("", "' '"):
        assert main(["train", DEMO, "--dry-run", f"run.dir={name}"]) == 2
        assert "run.dir: found" in capsys.readouterr().err


def test_a_world_needs_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    assert main(["world", "--seed", "1", "--out", str(taken)]) == 2
    assert (
        f"world: cannot write below {taken}: File exists; wanted a folder"
        in capsys.readouterr().err
    )


def test_eval_takes_the_indexes_beside_the_task_file(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").touch()
    overrides = eval_overrides(Path("m"), tmp_path / "test.jsonl", ["tools.text_top_k=9"])
    recipe = load_recipe(DEMO, overrides)
    assert recipe.model.path == "m"
    assert recipe.tools.corpus == str(tmp_path / "corpus.jsonl")
    assert recipe.tools.image_index == load_recipe(DEMO).tools.image_index
    assert recipe.tools.text_top_k == 9


@pytest.mark.parametrize("name", ["o'neil's", "a b, c=d [e]", "${run.dir}", 'say "x"', "ü#~+"])
def test_eval_takes_a_folder_of_any_name(name: str) -> None:
    recipe = load_recipe(DEMO, eval_overrides(Path(name), Path("t.jsonl"), []))
    assert recipe.model.path == name


def test_eval_lets_the_user_choose_another_index(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").touch()
    overrides = eval_overrides(Path("m"), tmp_path, ["tools.corpus=mine.jsonl"])
    assert load_recipe(DEMO, overrides).tools.corpus == "mine.jsonl"
