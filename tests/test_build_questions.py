"""Questions are checked against the model and the recipe before anything is played."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from process_environment import ROOT
from rollout_world import SYSTEM_PROMPT, draw_image, draw_toolbox

from tapo_train.build.questions import playable_tasks, read_tasks, require_enough
from tapo_train.errors import ConfigError, DataError
from tapo_train.recipe.compose import Recipe, load_recipe
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.playable import Playable
from tapo_train.types import Task

DEMO = ROOT / "recipes" / "demo_cpu.yaml"


@pytest.fixture(scope="module")
def chat(tiny_qwen3_vl: Path) -> ChatFormat:
    return ChatFormat(tiny_qwen3_vl)


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe(DEMO, ["data.system_prompt=Look", *overrides])


def task(id: str, question: str, *sizes: tuple[int, int]) -> Task:
    images = tuple(draw_image(*size) for size in sizes)
    return Task(id=id, question=question, images=images, answers=("a",))


def test_the_length_of_a_prompt_is_counted_as_it_is_put_together(chat: ChatFormat) -> None:
    toolbox = draw_toolbox()
    tasks = [
        task("a", "Who?", (100, 80)),
        task("b", "Who is this? é <|im_end|>", (300, 200)),
        task("c", "Which of the two?", (64, 64), (200, 90)),
        task("d", "And now without?"),
        task("e", ""),
    ]
    for one in tasks:
        prompt = chat.prompt(one, system_prompt=SYSTEM_PROMPT, tool_schemas=toolbox.schemas())

        def found(max_tokens: int, one: Task = one) -> str | None:
            judge = Playable(
                chat,
                system_prompt=SYSTEM_PROMPT,
                tool_schemas=toolbox.schemas(),
                max_tokens=max_tokens,
            )
            return judge.problems([*tasks, one])[-1]

        assert found(len(prompt) + 1) is None
        said = found(len(prompt))
        assert said is not None
        assert f"task {one.id}: its prompt has {len(prompt)} tokens; wanted fewer than " in said
        assert f"rollout.max_tokens = {len(prompt)} " in said


def test_all_questions_that_cannot_be_played_are_named_or_left_out(
    chat: ChatFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = [
        task("good", "Who?", (64, 64)),
        task("long", "the house is old. " * 400),
        task("thin", "Who?", (1, 400)),
        task("last", "Where?"),
    ]
    with pytest.raises(DataError) as caught:
        playable_tasks(recipe_of("rollout.max_tokens=1024"), tasks, chat, draw_toolbox())
    first, *problems = str(caught.value).splitlines()
    assert first == "2 rows cannot be used (data.bad_rows=drop leaves them out):"
    assert [line.split()[1] for line in problems] == ["long:", "thin:"]
    assert capsys.readouterr().out == ""
    dropping = recipe_of("rollout.max_tokens=1024", "data.bad_rows=drop")
    kept = playable_tasks(dropping, tasks, chat, draw_toolbox())
    assert [one.id for one in kept] == ["good", "last"]
    assert capsys.readouterr().out.startswith("2 rows left out (data.bad_rows=drop):\n  task long")


def test_a_step_that_asks_for_more_questions_than_there_are_is_refused_by_its_field() -> None:
    tasks = [task(str(number), "Who?") for number in range(8)]
    require_enough(recipe_of("data.questions_per_step=8"), tasks)
    message = r"data\.questions_per_step: found 9, wanted at most the 8 tasks that data\.train"
    with pytest.raises(ConfigError, match=message):
        require_enough(recipe_of("data.questions_per_step=9"), tasks)


def test_the_recipe_says_where_pictures_lie_and_what_becomes_of_bad_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "set").mkdir()
    (tmp_path / "disk" / "1.png").write_bytes(draw_image(64, 64).data)
    rows = [
        {"id": name, "prompt": "Who?", "image": name, "reward_model": {"ground_truth": "a"}}
        for name in ("1.png", "2.png")
    ]
    path = tmp_path / "set" / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    recipe = recipe_of(f"data.image_roots=[{tmp_path / 'disk'}]")
    with pytest.raises(DataError, match=r"t\.jsonl:2: picture '2\.png' is not a file"):
        read_tasks([str(path)], recipe)
    dropping = replace(recipe, data=replace(recipe.data, bad_rows="drop"))
    assert [one.id for one in read_tasks([str(path)], dropping)] == ["1.png"]
    assert "1 rows left out (data.bad_rows=drop):\n" in capsys.readouterr().out
