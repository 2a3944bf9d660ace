"""A run and an evaluation whose search dies: nothing false is said, and nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked_runs import tapo_train
from loopback import Answering, served_by, url_of

from tapo_train.learner import checkpoint
from tapo_train.tools.text_search import CorpusIndex

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
DOWN = "the index is being rebuilt"


@contextmanager
def searching(corpus: Path, *, is_down: Callable[[], bool]) -> Iterator[str]:
    """Address of a text search over a corpus; it answers 503 while it is down."""
    index = CorpusIndex.load(corpus)

    class Handler(Answering):
        def do_POST(self) -> None:
            asked = json.loads(self.body())
            found = index.search(asked["query"], top_k=3)
            results = [{"title": p.title, "text": p.text, "url": "http://a/b"} for p in found]
            is_up = not is_down()
            self.say({"results": results} if is_up else DOWN.encode(), 200 if is_up else 503)

    with served_by(Handler) as server:
        yield f"{url_of(server)}/search"


def test_a_search_that_dies_before_the_validation_ends_the_run_without_a_best(
    small_world: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    first_step = out / "tokens" / "step_000000.jsonl"  # written just before the validation
    with searching(small_world / "corpus.jsonl", is_down=first_step.exists) as endpoint:
        done = tapo_train(
            "train",
            "recipes/demo_cpu.yaml",
            f"run.dir={out}",
            "run.wandb=disabled",
            "rollout/engine=hf",
            "run.steps=2",
            "run.eval_every=1",
            "run.save_every=1",
            "run.keep_best=1",
            "run.eval_questions=32",
            "data.questions_per_step=2",
            "rollout.rollouts_per_question=2",
            "rollout.max_failed_fraction=0.01",
            f"data.train=[{small_world}/train.jsonl]",
            f"data.validation=[{small_world}/train.jsonl]",
            f"tools.image_index={small_world}/image_index.jsonl",
            f"tools.text_endpoint={endpoint}",
        )
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    (error,) = [line for line in done.stderr.splitlines() if "error: rollout" in line]
    assert "rollout.max_failed_fraction: " in error, done.stderr[-2000:]
    assert " of the last 32 trajectories failed outside the policy" in error
    assert "text_search_tool said" in error and "503" in error
    (row,) = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    failed = round(row["eval/failed"] * 32)
    assert failed > 0 and row["rollout/failed_outside_policy"] == 0
    assert row["eval/questions"] == 32
    assert ("eval/accuracy" in row) == (failed < 32)
    assert "of the validation failed" in done.stdout
    saved = out / "checkpoints" / "step-000001"
    assert checkpoint.check(saved).score is None, "no best, but the step is kept"


def test_an_evaluation_without_its_search_prints_no_accuracy(
    small_world: Path, tmp_path: Path
) -> None:
    with searching(small_world / "corpus.jsonl", is_down=lambda: True) as endpoint:
        done = tapo_train(
            "eval",
            *("--model", "assets/warm_start", "--recipe", "recipes/demo_cpu.yaml"),
            *("--tasks", f"{small_world}/test.jsonl", "--out", f"{tmp_path}/played.jsonl"),
            "rollout/engine=hf",
            "rollout.max_failed_fraction=0.01",
            f"tools.text_endpoint={endpoint}",
        )
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    assert "accuracy" not in done.stdout
    assert "of 10 attempts failed outside the policy, most often: text_search" in done.stderr
    assert len((tmp_path / "played.jsonl").read_text().splitlines()) == 10, "what was played stays"
