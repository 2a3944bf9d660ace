"""Right attempts as demonstrations: which are kept, and that they come back as they were played."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_rewards import TASK, call, trajectory

from tapo_train.collecting import collect_demonstrations, successes
from tapo_train.errors import DataError
from tapo_train.imitating import collected_demonstrations
from tapo_train.recipe.compose import load_recipe
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.demonstrations import read_demonstrations
from tapo_train.types import Group, Reward, StopReason, Trajectory


def tried(name: str, answer: str = "Eiffel", *, right: bool = True, **changes: Any) -> Trajectory:
    held = trajectory(f"<answer>{answer}</answer>", calls=(call(),))
    scored = replace(held, id=name, reward=Reward(total=1.0, accuracy=float(right)))
    return replace(scored, **changes)


def test_kept_are_right_attempts_of_good_form_one_of_each_course_the_shortest_first() -> None:
    long = tried("long", tokens=np.zeros(90, dtype=np.int32))
    twin = tried("twin", "the EIFFEL.")
    other = tried("other", "Gustave Eiffel", tokens=np.zeros(20, dtype=np.int32))
    wrong = tried("wrong", "Ed", right=False)
    formless = replace(tried("formless"), turns=(replace(tried("x").turns[0], calls=()),))
    failed = tried("failed", stop=StopReason.INFRA, reward=None)
    group = Group(task=TASK, trajectories=(long, twin, other, wrong, formless, failed))
    assert [held.id for held in successes(group, most=5)] == ["twin", "other"]
    assert [held.id for held in successes(group, most=1)] == ["twin"]


@pytest.mark.slow
def test_what_is_collected_is_read_back_token_by_token_as_it_was_played(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(
        "recipes/demo_cpu.yaml",
        [
            "model.path=assets/warm_start",
            "rollout/engine=hf",
            f"data.train=[{small_world}/train.jsonl]",
            f"tools.image_index={small_world}/image_index.jsonl",
            f"tools.corpus={small_world}/corpus.jsonl",
            "rollout.temperature=0.7",
            f"sft.demonstrations=[{tmp_path}/right.jsonl]",
            "sft.trajectories_per_update=2",
        ],
    )
    played: list[Trajectory] = []
    real = successes

    def watched(group: Group, *, most: int) -> list[Trajectory]:
        kept = real(group, most=most)
        played.extend(kept)
        return kept

    monkeypatch.setattr("tapo_train.collecting.successes", watched)
    out = tmp_path / "right.jsonl"
    found = collect_demonstrations(recipe, out=out, rollouts=3, per_question=2, num_questions=8)
    assert found.kept == len(played) > 1 and found.attempts == 24
    chat = ChatFormat(Path("assets/warm_start"))
    for row, held in zip(read_demonstrations(out, chat), played, strict=True):
        assert row.tokens.tolist() == held.tokens.tolist()
        assert row.spans == tuple(turn.span for turn in held.turns)
        assert [image.sha256 for image in row.images] == [image.sha256 for image in held.images]
    assert len(collected_demonstrations(recipe, chat)) == found.kept
    few = replace(recipe, sft=replace(recipe.sft, trajectories_per_update=500))
    with pytest.raises(DataError, match=f"found {found.kept}, wanted at least sft.traj"):
        collected_demonstrations(few, chat)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "system, user, then assistant and tool in turn"),
        ({"messages": [{"role": "user", "content": "q"}]}, "system, user, then"),
        ({"tools": None}, "a list of schemas"),
        ({"messages": "hello"}, "a list of messages"),
        ({"picture": "../../secret.png"}, "leads out of the data folder"),
        ({"picture": "gone.png"}, "pictures that are there"),
    ],
)
def test_what_is_no_demonstration_is_refused_with_its_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    pictures = [change.pop("picture")] if "picture" in change else []
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q", "images": pictures},
        {"role": "assistant", "content": "<answer>a</answer>"},
    ]
    line = {"task": "t", "tools": [], "messages": messages, **change}
    (tmp_path / "d.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match=rf"d\.jsonl:1.*{message}"):
        list(read_demonstrations(tmp_path / "d.jsonl", ChatFormat(Path("assets/warm_start"))))
