"""Every recipe of a published system trains two steps on data the project generates."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from loopback import Answering, served_by, url_of

from tapo_train.demo.world.build import WorldSize, write_world
from tapo_train.demo.world.chains import Chains
from tapo_train.recipe.compose import load_recipe
from tapo_train.report.catalogue import require_known
from tapo_train.runs import train
from tapo_train.systems.invented_databases import write_databases
from tapo_train.systems.invented_videos import write_videos

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "run.steps=2",
    "run.eval_every=0",
    "run.save_every=0",
    "run.wandb=disabled",
    "rollout/engine=hf",
    "rollout.rollouts_per_question=2",
    "rollout.max_turns=2",
    "rollout.max_turn_tokens=40",
    "data.questions_per_step=2",
    "data.validation=[]",
)


def chains(folder: Path) -> list[str]:
    """A world of chains without pictures, for the policy of 0.3 M parameters."""
    houses = WorldSize(
        train_houses=12,
        validation_houses=12,
        test_houses=12,
        train_questions=4,
        validation_questions=1,
        test_questions=1,
    )
    chosen = Chains(hops=(2, 2), text_only=True, syllables=1)
    write_world(folder, 1, houses, chains=chosen)
    return [f"data.train=[{folder}/train.jsonl]", f"tools.corpus={folder}/corpus.jsonl"]


def databases(folder: Path) -> list[str]:
    write_databases(folder, 1, train=1, validation=1)
    arguments = f"{{databases: {folder}/databases}}"
    tool, match = ("tapo_train.systems.mtir_sql:" + name for name in ("SqlTool", "ExecutionMatch"))
    return [
        f"data.train=[{folder}/train.jsonl]",
        f"tools.extra=[{{path: '{tool}', arguments: {arguments}}}]",
        f"reward.parts.accuracy={{name: custom, path: '{match}', arguments: {arguments}}}",
    ]


def pictures(folder: Path) -> list[str]:
    """A world with pictures, for the policy of 1.6 M parameters."""
    houses = WorldSize(
        train_houses=6,
        validation_houses=4,
        test_houses=4,
        train_questions=4,
        validation_questions=1,
        test_questions=1,
    )
    write_world(folder, 1, houses)
    places = ("corpus.jsonl", "image_index.jsonl")
    corpus, index = (f"{folder}/{name}" for name in places)
    train = f"data.train=[{folder}/train.jsonl]"
    return [train, f"tools.corpus={corpus}", f"tools.image_index={index}"]


class SaysYes(Answering):
    """A judge."""

    def do_POST(self) -> None:
        self.body()
        message = {"message": {"role": "assistant", "content": "<judge>Yes</judge>"}}
        self.say({"choices": [message]})


def videos(folder: Path) -> list[str]:
    write_videos(folder, 1, count=2)
    tool = "tapo_train.systems.vital:FrameSamplingTool"
    arguments = f"{{videos: {folder}, longest_px: 64}}"
    return [
        f"data.train=[{folder}/train.jsonl]",
        f"tools.extra=[{{path: '{tool}', arguments: {arguments}}}]",
        # What the tiny policy says is no interval; by this, attempts differ.
        "reward.parts.mixed={name: custom, path: 'rewarding:mixed_for_some'}",
        "reward.parts.mixed.arguments={one_of: 1}",
    ]


def two_searches(folder: Path) -> list[str]:
    """The chains, with two tools that know half of the corpus each."""
    made = chains(folder)
    halves = {"first_half_tool": "(?i)^[a-l]", "second_half_tool": "(?i)^[m-z]"}
    corpus = f"description: Find., corpus: '{folder}/corpus.jsonl'"
    tools = [
        f"{{path: 'tapo_train.systems.playground:SearchTool', arguments: "
        f"{{name: {name}, {corpus}, titles: '{titles}'}}}}"
        for name, titles in halves.items()
    ]
    return [*made, f"tools.extra=[{', '.join(tools)}]"]


DATA: Mapping[str, Callable[[Path], list[str]]] = {
    "vsrm": chains,
    "igpo": chains,
    "mtir_sql": databases,
    "rl_factory": chains,
    "imagent": pictures,
    "vital": videos,
    "playground": two_searches,
}
"""What makes a recipe's data in a folder and says where it is."""

LOGS = {
    "vsrm": "process/steps",
    "igpo": "process/earned",
    "mtir_sql": "process/left_out/no_query",
    "rl_factory": "reward/part/judged",
    "imagent": "process/left_out",
    "vital": "policy/regression",
    "playground": "rollout/calls/text_search_tool",
}
"""A metric that only this system logs, and which is not 0."""


@pytest.mark.parametrize("name", DATA)
def test_a_system_trains_two_steps_from_its_recipe(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    overrides = [*SMALL, *DATA[name](tmp_path / "data"), f"run.dir={tmp_path}/run"]
    with served_by(SaysYes) as judge:
        if name == "rl_factory":
            overrides.append(f"reward.parts.judged.endpoint='{url_of(judge)}/v1'")
        train(load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides))
    rows = [
        json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 2
    for row in rows:
        require_known(metric for metric in row if metric not in {"step", "time"})
    assert any(row[LOGS[name]] for row in rows)
