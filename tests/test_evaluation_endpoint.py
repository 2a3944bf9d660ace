"""A model that somebody serves, evaluated with the recipe's tools; its server is scripted."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loopback import Answering, served_by, url_of
from PIL import Image as Pillow

from tapo_train.__main__ import main
from tapo_train.benchmarks import Benchmark, evaluate_benchmarks, outside_player
from tapo_train.build import Endpoint
from tapo_train.errors import OutageError
from tapo_train.evaluation.attempts_file import read_attempts
from tapo_train.recipe.compose import Recipe, load_recipe

ANSWERS = {"tower": "Gustave Eiffel", "bridge": "Ed"}


def searching(native: bool) -> dict[str, Any]:
    """A message that calls the search."""
    call = {"name": "text_search_tool", "arguments": json.dumps({"query": "tower"})}
    if native:
        called = {"id": "c1", "type": "function", "function": call}
        return {"role": "assistant", "content": None, "tool_calls": [called]}
    written = {"name": "text_search_tool", "arguments": {"query": "tower"}}
    text = f"<think>look</think><tool_call>{json.dumps(written)}</tool_call>"
    return {"role": "assistant", "content": text}


class _Model(Answering):
    """Searches once, by the API's calls or in words, then answers what it read."""

    def do_POST(self) -> None:
        asked = json.loads(self.body())
        self.server.asked.append((self.headers.get("Authorization"), asked))
        question = asked["messages"][1]["content"][-1]["text"]
        if len(asked["messages"]) == 2 and "odd" not in question:
            message = searching(native="bridge" in question)
        else:
            name = "Gustave Eiffel" if "Eiffel" in json.dumps(asked["messages"][2:]) else "nobody"
            message = {"role": "assistant", "content": f"<answer>{name}</answer>"}
        body: Any = {"choices": [{"message": message}], "usage": {"completion_tokens": 7}}
        if self.server.is_broken or "odd" in question:
            body = {"choices": [{"message": {"content": ["<|im_end|>"]}}]}
        self.say(body)


@pytest.fixture
def serving() -> Iterator[Any]:
    with served_by(_Model, asked=[], is_broken=False) as server:
        yield server


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Two questions, one with a picture, and a corpus."""
    stream = io.BytesIO()
    Pillow.new("RGB", (12, 8), "red").save(stream, "PNG")
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    rows = [
        {"id": name, "prompt": f"Who built the {name}?", "reward_model": {"ground_truth": answer}}
        for name, answer in ANSWERS.items()
    ]
    rows[0]["image"] = "a.png"
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    passage = {"id": "1", "title": "Tower", "text": "The tower was built by Gustave Eiffel."}
    (tmp_path / "corpus.jsonl").write_text(json.dumps(passage))
    return tmp_path


def recipe_of(world: Path) -> Recipe:
    overrides = [f"tools.corpus={world}/corpus.jsonl", "tools.names=[text_search_tool]"]
    return load_recipe("recipes/demo_cpu.yaml", [*overrides, "tools.image_index=null"])


def endpoint_of(serving: Any) -> Endpoint:
    return Endpoint(url=f"{url_of(serving)}/v1", model="m", key_variable="OUTSIDE_KEY")


def test_an_outside_model_is_evaluated_with_the_same_tools_and_replayed_to_the_digit(
    serving: Any, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTSIDE_KEY", "sesame")
    recipe = recipe_of(world)
    tools = replace(recipe.tools, replay="record", recording=str(tmp_path / "recording"))
    benchmark, player = [Benchmark("b", world / "t.jsonl")], outside_player(endpoint_of(serving))
    asking = {"repeats": 2, "make_player": player}
    evaluate_benchmarks(replace(recipe, tools=tools), benchmark, out=tmp_path / "first", **asking)
    attempts = read_attempts(tmp_path / "first")
    assert [one.accuracy for one in attempts] == [0.0, 0.0, 1.0, 1.0]
    assert all(one.calls == {"text_search_tool": 1} and one.turns == 2 for one in attempts)
    assert all(one.tokens == 14 and one.supported for one in attempts)
    assert len(serving.asked) == 8
    assert {key for key, _ in serving.asked} == {"Bearer sesame"}
    firsts = [asked for _, asked in serving.asked if len(asked["messages"]) == 2]
    assert {asked["seed"] for asked in firsts} == {0, 1}
    pictured = [asked["messages"][1]["content"] for asked in firsts]
    urls = [part["image_url"]["url"] for parts in pictured for part in parts if "image_url" in part]
    assert len(urls) == 2 and all(url.startswith("data:image/png;base64,iVBOR") for url in urls)
    assert [tool["function"]["name"] for tool in firsts[0]["tools"]] == ["text_search_tool"]
    assert firsts[0]["messages"][0]["content"] == recipe.data.system_prompt
    ends = [asked["messages"][2:] for _, asked in serving.asked if len(asked["messages"]) > 2]
    roles = sorted([message["role"] for message in rest] for rest in ends)
    assert roles == [["assistant", "tool"]] * 2 + [["assistant", "user"]] * 2
    serving.is_broken = True
    replayed = replace(recipe, tools=replace(tools, replay="replay"))
    evaluate_benchmarks(replayed, benchmark, out=tmp_path / "second", **asking)
    one, two = (
        json.loads((tmp_path / n / "results.json").read_text()) for n in ("first", "second")
    )
    assert one["tables"] == two["tables"] and one["manifest"]["policy"]["model"] == "m"


def test_an_endpoint_that_answers_nonsense_is_an_outage_and_no_wrong_answer(
    serving: Any, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTSIDE_KEY", "sesame")
    serving.is_broken = True
    with pytest.raises(
        OutageError, match=r"2 of 2 attempts failed .* outside_model: .* no chat comp"
    ):
        evaluate_benchmarks(
            recipe_of(world),
            [Benchmark("b", world / "t.jsonl")],
            out=tmp_path / "out",
            make_player=outside_player(endpoint_of(serving)),
        )


def test_the_command_wants_a_model_name_and_a_recipe_beside_an_endpoint(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--endpoint", "http://127.0.0.1:9/v1", "--out", str(tmp_path / "o")]
    assert main(["eval", *words, "--benchmarks", f"b={world}/t.jsonl"]) == 2
    assert "--endpoint wants --endpoint-model NAME and --recipe" in capsys.readouterr().err
