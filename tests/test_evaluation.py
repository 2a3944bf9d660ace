"""Benchmarks: estimates against numbers worked out by hand, and an evaluation that is killed."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from process_environment import ROOT, environment
from test_rewards import call, trajectory

from tapo_train.__main__ import main
from tapo_train.benchmarks import Benchmark, evaluate_benchmarks
from tapo_train.data.tasks import load_tasks
from tapo_train.errors import OutageError
from tapo_train.evaluation.attempt import EMPTY, Attempt, attempt_of, require_enough
from tapo_train.evaluation.attempts_file import AttemptsFile, read_attempts
from tapo_train.evaluation.compare import compared, mcnemar
from tapo_train.evaluation.estimates import average, pass_at
from tapo_train.evaluation.manifest import describe_searches
from tapo_train.evaluation.tables import accuracies, markdown, summary
from tapo_train.recipe.compose import Recipe, load_recipe
from tapo_train.tools.base import ToolContext
from tapo_train.tools.text_search import CorpusIndex, TextSearchArguments, TextSearchTool
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Observation, Outcome, Reward, StopReason, Task


def attempt(task: str, accuracy: float, repeat: int = 0, **more: Any) -> Attempt:
    return Attempt(benchmark="b", task=task, repeat=repeat, accuracy=accuracy, **more)


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_attempt() -> None:
    for tried, right, k in ((5, 2, 3), (4, 4, 1), (6, 0, 2), (3, 1, 3)):
        verdicts = [True] * right + [False] * (tried - right)
        draws = list(itertools.combinations(verdicts, k))
        assert pass_at(k, right, tried) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_at(4, 1, 3) is None


def test_an_interval_draws_questions_and_is_the_same_each_time() -> None:
    values = [1.0] * 30 + [0.0] * 70
    found = average(values)
    assert found is not None and found == average(values)
    assert found.value == pytest.approx(0.3)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 100)
    assert found.low == pytest.approx(0.3 - half, abs=0.02)
    assert found.high == pytest.approx(0.3 + half, abs=0.02)
    assert average([]) is None


def test_mcnemars_p_is_that_of_all_coin_tosses_counted_one_by_one() -> None:
    for gained, lost in ((6, 1), (0, 5), (3, 3), (0, 0), (9, 2)):
        changed = gained + lost
        uneven = sum(
            min(sum(toss), changed - sum(toss)) <= min(gained, lost)
            for toss in itertools.product((0, 1), repeat=changed)
        )
        assert mcnemar(gained, lost) == pytest.approx(min(1.0, uneven / 2**changed))
    assert mcnemar(6, 1) == pytest.approx(0.125)  # 2 (1 + 7) / 128


def test_two_runs_are_compared_on_the_questions_both_answered_for() -> None:
    before = [attempt(str(n), float(n < 4)) for n in range(12)] + [attempt("x", 1.0)]
    after = [attempt(str(n), float(n < 3 or n > 5)) for n in range(12)]
    after.append(Attempt(benchmark="b", task="x", repeat=0, failed="search was down"))
    found = compared(before, after)
    assert (found.questions, found.left_out) == (12, 1)
    assert (found.gained, found.lost) == (6, 1)
    assert found.p == pytest.approx(0.125)
    assert found.difference == pytest.approx(9 / 12 - 4 / 12)
    # By hand: the standard error of the mean of six 1, one -1 and five 0.
    differences = np.array([1] * 6 + [-1] + [0] * 5)
    half = 1.96 * differences.std() / math.sqrt(12)
    assert found.low == pytest.approx(found.difference - half, abs=0.06)
    assert found.high == pytest.approx(found.difference + half, abs=0.06)
    assert "6 gained, 1 lost, McNemar p = 0.1250; 1 questions left out" in str(found)
    several = compared([*before, attempt("0", 0.0, 1)], after)
    assert several.p is None and several.first == pytest.approx(3.5 / 12)


def test_a_table_holds_what_a_hand_counts() -> None:
    rows = [
        attempt("q", 1.0, 0, official=0.5, metric="token_f1", supported=True, hops="2", turns=2),
        attempt("q", 0.0, 1, official=0.0, metric="token_f1", hops="2", turns=4),
        attempt(
            "r",
            1.0,
            0,
            official=1.0,
            metric="token_f1",
            hops="1",
            turns=2,
            searches=3,
            answered=2,
            empty=1,
        ),
        attempt("r", 1.0, 1, official=1.0, metric="token_f1", hops="1", turns=2, cost=0.5),
        Attempt(benchmark="b", task="s", repeat=0, failed="text_search_tool: 503"),
        Attempt(benchmark="b", task="s", repeat=1, failed="text_search_tool: 503"),
    ]
    table = summary(rows, repeats=2, judged_by="exact_match")["b"]
    assert (table["questions"], table["answered_for"], table["failed"]) == (3, 2, 2)
    assert table["failures"] == {"text_search_tool: 503": 2}
    assert table["pass@1"]["value"] == pytest.approx((0.5 + 1) / 2)
    assert table["pass@2"]["value"] == 1.0 and table["avg@2"]["value"] == pytest.approx(0.75)
    assert table["official"]["score"]["value"] == pytest.approx((0.25 + 1) / 2)
    assert table["official"]["by"] == "rule"
    assert table["grounds"]["right and supported"]["value"] == pytest.approx(0.25)
    assert table["by hops"]["2"] == {"attempts": 2, "accuracy": 0.5}
    assert table["by turns"]["2"] == {"attempts": 3, "accuracy": 1.0}
    assert table["searches"] == {"asked": 3, "answered": pytest.approx(2 / 3), "empty": 0.5}
    assert table["cost"]["price"] == pytest.approx(0.125)
    shown = markdown({"b|ad\nname": table}, {"judge": "none"})
    assert "| b\\|ad name | 2 of 3 | 2 | 0.750 [" in shown and "0.625 (token_f1)" in shown
    judged = summary(
        [attempt("q", 1.0, metric="judge", attempted=True)], repeats=1, judged_by="judge"
    )
    assert judged["b"]["official"]["by"] == "judge" and judged["b"]["official"]["CGA"] == 1.0


def test_the_accuracy_of_a_file_is_said_by_data_set_without_what_failed() -> None:
    rows = [
        attempt("1", 1.0, source="livevqa/level1"),
        attempt("2", 0.5, source="livevqa/level1"),
        attempt("3", 1.0, source="FVQA"),
        Attempt(benchmark="b", task="4", repeat=0, source="FVQA", failed="search: 503"),
    ]
    failed, whole, *sources = accuracies(rows).splitlines()
    assert failed == (
        "failed: 1 of 4 questions failed outside the policy and are not counted; most often: "
        "search: 503"
    )
    assert whole.startswith("accuracy: 0.667 (95 % interval 0.") and whole.endswith("n=3)")
    assert [line[: line.index("(")] for line in sources] == [
        "  livevqa_level1: 0.500 ",
        "  FVQA: 1.000 ",
    ]
    assert accuracies(rows[2:3]) == "accuracy: 1.000 (95 % interval 0.207 to 1.000, n=1)"


@pytest.mark.parametrize(
    ("right", "failed", "unscored", "share", "said"),
    [
        (0, 3, 0, 0.5, "3 of 3 attempts failed .* most often: 503; at most rollout.max_failed"),
        (1, 2, 0, 0.5, "2 of 3"),
        (0, 2, 0, 1.0, "2 of 2"),
        (3, 1, 1, 0.5, "1 of 4 attempts that ended got no reward, most often: .*min_scored = 0.8"),
        (0, 0, 0, 1.0, "0 of 0 attempts failed"),
    ],
)
def test_attempts_that_an_outage_broke_are_refused_however_few(
    right: int, failed: int, unscored: int, share: float, said: str
) -> None:
    rows = [attempt(str(n), 1.0) for n in range(right)]
    rows += [Attempt(benchmark="b", task=f"f{n}", repeat=0, failed="503") for n in range(failed)]
    lost = {"benchmark": "b", "repeat": 0, "failed": "the reward: 503", "unscored": True}
    rows += [Attempt(task=f"u{n}", **lost) for n in range(unscored)]
    with pytest.raises(OutageError, match=said):
        require_enough(rows, max_failed_fraction=share, min_scored=0.8)
    enough = [*rows, *(attempt(f"more{n}", 0.0) for n in range(9))]
    require_enough(enough, max_failed_fraction=share, min_scored=0.8)


def test_an_attempt_says_what_its_answer_rests_on() -> None:
    task = Task(id="q", question="Who built it?", images=(), answers=("Gustave Eiffel", "Eiffel"))
    found = Observation(text="Built by Gustave Eiffel in 1889")
    calls = (
        replace(call(), observation=found, executed=True),
        replace(call(), observation=Observation(text=EMPTY[0]), executed=True),
    )
    held = replace(
        trajectory("<answer>Gustave Koechlin</answer>", calls=calls),
        task=task,
        reward=Reward(total=0.0, accuracy=0.0),
    )
    seen = attempt_of(held, benchmark="b", repeat=3, prices={"text_search_tool": 0.25})
    assert (seen.completeness, seen.faithfulness, seen.supported) == (0.5, 0.5, False)
    assert (seen.searches, seen.answered, seen.empty, seen.cost) == (2, 2, 1, 0.5)
    assert (seen.repeat, seen.official, seen.attempted) == (3, 0.0, True)
    right = replace(held, answer="Gustave Eiffel", reward=Reward(total=1.0, accuracy=1.0))
    assert attempt_of(right, benchmark="b", repeat=0, prices={}).supported
    down = replace(
        held,
        stop=StopReason.INFRA,
        turns=(
            replace(
                held.turns[0],
                calls=(
                    replace(
                        calls[0], observation=Observation(text="503", outcome=Outcome.INFRA_ERROR)
                    ),
                ),
            ),
        ),
    )
    assert attempt_of(down, benchmark="b", repeat=0, prices={}).failed == "text_search_tool: 503"


def test_a_search_that_finds_nothing_says_so_in_the_words_that_are_counted(
    small_world: Path,
) -> None:
    tool = TextSearchTool(CorpusIndex.load(small_world / "corpus.jsonl"))
    context = ToolContext(images=(), task=None)
    seen = asyncio.run(tool.run(TextSearchArguments(query="zzzzqqqq"), context))
    assert seen.text == EMPTY[0]


@pytest.fixture(scope="module")
def recipe(small_world: Path) -> Recipe:
    return load_recipe(
        "recipes/demo_cpu.yaml",
        [
            "model.path=assets/warm_start",
            "rollout/engine=hf",
            f"data.train=[{small_world}/train.jsonl]",
            f"tools.image_index={small_world}/image_index.jsonl",
            f"tools.corpus={small_world}/corpus.jsonl",
        ],
    )


def test_a_manifest_names_what_was_searched_and_not_its_key(recipe: Recipe) -> None:
    address = "http://search.test/find?key=s3cr3t-of-the-search"
    asked = replace(recipe, tools=replace(recipe.tools, text_endpoint=address))
    told = describe_searches(asked, Toolbox([], deadline_s=1.0), [])
    assert told["search"]["text"].startswith("http://search.test/find?key=")
    assert told["search"]["pictures"] == recipe.tools.image_index
    assert "s3cr3t" not in json.dumps(told) and told["fetch success"] is None


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.slow
def test_an_evaluation_killed_half_way_or_replayed_gives_the_same_table_to_the_digit(
    small_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = f"seen={small_world}/test.jsonl,new={small_world}/validation.jsonl"
    words = ["--model", "assets/warm_start", "--recipe", "recipes/demo_cpu.yaml"]
    words += ["--benchmarks", files, "--questions", "2", "rollout/engine=hf"]
    words += [f"tools.recording={tmp_path}/recording"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    asked = ["eval", *words, "tools.replay=record", "--out", str(killed), "--repeats"]
    held = killed / "attempts.jsonl"
    command = [sys.executable, "-m", "tapo_train", *asked, "2"]
    with subprocess.Popen(command, cwd=ROOT, env=environment()) as process:
        while process.poll() is None and not (held.exists() and held.stat().st_size):
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "results.json").exists()
    lines = held.read_text().splitlines(keepends=True)
    assert [json.loads(line)["benchmark"] for line in lines] == ["seen"] * 4, "half of them"
    kept = "".join(lines[:-1])
    held.write_text(kept + lines[-1][:30])  # as if it had been killed while it wrote
    assert main([*asked, "2"]) == 0
    written = held.read_text()
    assert written.startswith(kept), "what was there stays"
    added = [json.loads(line) for line in written.removeprefix(kept).splitlines()]
    assert {one["task"] for one in added if one["benchmark"] == "seen"} == {
        json.loads(lines[-1])["task"]
    }, "and is not asked again"
    capsys.readouterr()
    assert main(["eval", *words, "tools.replay=replay", "--out", str(whole), "--repeats", "2"]) == 0
    shown = capsys.readouterr().out
    first, second = results(killed), results(whole)
    assert json.dumps(first["tables"]) == json.dumps(second["tables"])
    assert [table["attempts"] for table in first["tables"].values()] == [4, 4]
    assert second["subset ids"]["seen"] == [
        task.id for task in load_tasks(small_world / "test.jsonl")[:2]
    ]
    assert set(second["manifest"]) >= {"search", "fetch success", "empty results", "judges", "n"}
    assert "pass@2" in shown and (whole / "results.png").stat().st_size > 1000
    assert shown == (whole / "results.md").read_text() + "\n"
    assert main([*asked, "3"]) == 2
    assert "asked for otherwise (repeats: 2, now 3)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_files_accuracy_is_printed_and_is_that_of_the_dump(
    small_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump = tmp_path / "played.jsonl"
    words = ["--model", "assets/warm_start", "--recipe", "recipes/demo_cpu.yaml"]
    words += ["--tasks", f"{small_world}/test.jsonl", "--questions", "3", "--out", str(dump)]
    assert main(["eval", *words, "rollout/engine=hf"]) == 0
    played = [json.loads(line) for line in dump.read_text().splitlines()]
    assert len(played) == 3
    right = sum(attempt["reward"]["parts"]["accuracy"] for attempt in played)
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith(f"accuracy: {right / 3:.3f} (95 % in")]


def test_two_evaluations_are_compared_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, right in (("a", range(10)), ("b", range(2, 17))):
        file = AttemptsFile(tmp_path / name, asked={})
        file.append(attempt(str(n), float(n in right)) for n in range(40))
    assert main(["eval", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("b: 0.250 -> 0.375: +0.125 [")
    # By hand: of 9 fair coins 0, 1 or 2 on one side: 2 (1 + 9 + 36) / 2^9.
    assert shown.endswith("n=40; 7 gained, 2 lost, McNemar p = 0.1797\n")
    assert main(["eval", "--compare", str(tmp_path / "a"), str(tmp_path)]) == 2
    assert "hold no benchmark in common" in capsys.readouterr().err


def test_a_benchmark_whose_search_is_down_has_no_table_and_is_asked_again(
    recipe: Recipe, small_world: Path, tmp_path: Path
) -> None:
    down = replace(recipe.tools, text_endpoint="http://127.0.0.1:9/search", deadline_s=0.5)
    broken = replace(recipe, tools=down, rollout=replace(recipe.rollout, max_failed_fraction=0.0))
    test = [Benchmark("world", small_world / "test.jsonl")]
    with pytest.raises(OutageError, match="attempts failed outside the policy, most often: text"):
        evaluate_benchmarks(broken, test, out=tmp_path, num_questions=4)
    held = read_attempts(tmp_path)
    assert len(held) == 4 and any(one.failed for one in held)
    assert not (tmp_path / "results.json").exists()
