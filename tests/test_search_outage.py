"""Whole runs whose search dies, or whose key expires, half-way."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
from forked_runs import tapo_train
from loopback import Answering, served_by, url_of
from whole_runs import arguments

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

GOOD_ANSWERS = 1
"""Of the search, before it dies: less than the different searches of the first step."""


@dataclass
class Search:
    """Answers so often, then hangs up or refuses the key."""

    status: int | None
    num: int = 0
    guard: Lock = field(default_factory=Lock)

    def is_well(self) -> bool:
        with self.guard:
            self.num += 1
            return self.num <= GOOD_ANSWERS


@contextmanager
def serving(search: Search) -> Iterator[str]:
    class Handler(Answering):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.body()
            if search.is_well():
                self.say({"results": [{"title": "Velor", "text": "It has a mill."}]})
            elif search.status is not None:
                self.say({"message": "this key has expired"}, search.status)
            else:
                self.close_connection = True

    with served_by(Handler) as server:
        yield f"{url_of(server)}/s"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Every trajectory of a dump folder, with the step of its file."""
    return [
        json.loads(line) | {"step": path.name.split(".")[0]}
        for path in sorted(folder.glob("step_*.jsonl"))
        for line in path.open()
    ]


def failed_calls(row: dict[str, Any]) -> list[dict[str, Any]]:
    calls = [call for turn in row["turns"] for call in turn["calls"] if call["executed"]]
    return [call for call in calls if call["outcome"] in ("infra_error", "timeout")]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (None, "the connection failed"),
        (401, "HTTP 401"),
    ],
    ids=["the search dies", "the key expires"],
)
def test_a_search_that_fails_half_way_teaches_nothing_and_ends_the_run_in_its_words(
    small_world: Path, tmp_path: Path, status: int | None, said: str
) -> None:
    run = tmp_path / "run"
    with serving(Search(status)) as endpoint:
        overrides = [
            "rollout/engine=hf",
            "run.steps=12",
            "rollout.max_failed_fraction=0.1",
            "data.questions_per_step=2",
            "rollout.rollouts_per_question=8",
            f"tools.text_endpoint={endpoint}",
        ]
        done = tapo_train(*arguments(small_world, run, *overrides))
    assert done.returncode == 2, done.stderr[-3000:]
    words = done.stderr[done.stderr.index("rollout.max_failed_fraction:") :]
    assert "text_search_tool" in words and "infra_error" in words and said in words
    if status:
        assert "this key has expired" in words and "its endpoint refuses the recipe" in words
    played = rows_of(run / "tokens")
    failed = [row for row in played if failed_calls(row)]
    assert failed, "the first of the steps that are judged together"
    analysed = {row["id"] for row in rows_of(run / "rollouts") if not row.get("discarded")}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in played:
        if row in failed:
            assert row["stop"] == "infra" and row["advantage"] == 0
            assert all(turn["advantage"] == 0 for turn in row["turns"])
            assert row["id"] not in analysed, "it may correct others"
        else:
            groups[row["step"], row["id"].rpartition(".")[0]].append(row)
    for held in groups.values():
        rewards = [row["reward"]["total"] for row in held]
        mean, std = statistics.fmean(rewards), statistics.stdev(rewards) if len(held) > 1 else 0.0
        for row, reward in zip(held, rewards, strict=True):
            by_hand = (reward - mean) / (std + 1e-6) if std > 1e-9 else 0.0
            assert row["advantage"] == pytest.approx(by_hand, abs=1e-6)
