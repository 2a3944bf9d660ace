"""Benchmarks: estimates against numbers worked out by hand, and an evaluation that is killed."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_rewards import call, trajectory

from tapo_train.__main__ import main
from tapo_train.benchmarks import Benchmark, evaluate_benchmarks
from tapo_train.data.tasks import load_tasks
from tapo_train.errors import ConfigError, OutageError
from tapo_train.evaluation.attempt import EMPTY, Attempt, attempt_of
from tapo_train.evaluation.attempts_file import AttemptsFile, read_attempts
from tapo_train.evaluation.compare import compared, mcnemar
from tapo_train.evaluation.estimates import average, pass_at
from tapo_train.evaluation.tables import markdown, summary
from tapo_train.recipe.compose import Recipe, load_recipe
from tapo_train.tools.base import ToolContext
from tapo_train.tools.text_search import CorpusIndex, TextSearchArguments, TextSearchTool
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


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.slow
def test_an_evaluation_that_was_killed_or_is_replayed_comes_to_the_same_to_the_digit(
    recipe: Recipe, small_world: Path, tmp_path: Path
) -> None:
    test = [Benchmark("world", small_world / "test.jsonl")]
    recording = replace(recipe.tools, replay="record", recording=str(tmp_path / "recording"))
    recorded = replace(recipe, tools=recording)
    asked = {"repeats": 2, "num_questions": 5, "chunk": 4}

    def kill(number: int) -> None:
        if number >= 4:
            raise Killed

    with pytest.raises(Killed):
        evaluate_benchmarks(recorded, test, out=tmp_path / "killed", on_written=kill, **asked)
    held = tmp_path / "killed" / "attempts.jsonl"
    assert len(held.read_text().splitlines()) == 4
    with held.open("a") as file:
        file.write('{"benchmark": "world", "ta')
    numbers: list[int] = []
    evaluate_benchmarks(recorded, test, out=tmp_path / "killed", on_written=numbers.append, **asked)
    assert numbers == [8, 10], "what was there is not asked again"
    replayed = replace(recipe, tools=replace(recording, replay="replay"))
    shown = evaluate_benchmarks(replayed, test, out=tmp_path / "whole", **asked)
    killed, whole = results(tmp_path / "killed"), results(tmp_path / "whole")
    assert json.dumps(killed["tables"]) == json.dumps(whole["tables"])
    assert killed["tables"]["world"]["attempts"] == 10
    assert whole["subset ids"]["world"] == [
        task.id for task in load_tasks(small_world / "test.jsonl")[:5]
    ]
    assert set(whole["manifest"]) >= {"search", "fetch success", "empty results", "judges", "n"}
    assert "pass@2" in shown and (tmp_path / "whole" / "results.png").stat().st_size > 1000
    assert shown == (tmp_path / "whole" / "results.md").read_text()
    with pytest.raises(ConfigError, match=r"asked for otherwise \(repeats: 2, now 3\)"):
        evaluate_benchmarks(replayed, test, out=tmp_path / "whole", **{**asked, "repeats": 3})


def test_two_evaluations_are_compared_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(3)
    for name, chance in (("a", 0.3), ("b", 0.7)):
        file = AttemptsFile(tmp_path / name, asked={})
        file.append(attempt(str(n), float(rng.random() < chance)) for n in range(40))
    first, second = (read_attempts(tmp_path / name) for name in "ab")
    assert main(["eval", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out == f"b: {compared(first, second)}\n"
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
