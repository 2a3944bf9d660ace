"""What docs/tools.md shows works as it stands there."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image as PilImage
from rollout_world import SYSTEM_PROMPT
from scripted_engine import ScriptedEngine, turn_of

from tapo_train.recipe.compose import load_recipe
from tapo_train.rollout.agent import Limits
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import Sampling
from tapo_train.tools.images import encode_png, image_from_bytes
from tapo_train.tools.registry import load_tool
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Image, Outcome, Task, Trajectory

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^python -m tapo_train train ((?:.*\\\n)*.*)", PAGE, flags=re.MULTILINE)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The example as a module somebody may import."""
    (tmp_path / "my_tools.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield "my_tools"
    sys.modules.pop("my_tools", None)


def halves() -> Image:
    """Red to the left, blue to the right."""
    pixels = PilImage.new("RGB", (100, 60), "red")
    pixels.paste("blue", (50, 0, 100, 60))
    return image_from_bytes(encode_png(pixels), width=100, height=60)


def play(chat: ChatFormat, path: str, arguments: str) -> Trajectory:
    call = f'<tool_call>{{"name": "colour_at", "arguments": {arguments}}}</tool_call>'
    (group,) = collect(
        [Task(id="t", question="Which colour?", images=(halves(),), answers=("blue",))],
        engine=ScriptedEngine(chat, lambda r: "<answer>x</answer>" if turn_of(r) else call),
        chat=chat,
        toolbox=Toolbox([load_tool(path)], deadline_s=30.0),
        system_prompt=SYSTEM_PROMPT,
        rollouts_per_task=1,
        limits=Limits(max_turns=3, max_turn_tokens=200, max_tokens=2000),
        sampling=Sampling(),
    )
    return group.trajectories[0]


@pytest.mark.parametrize(
    ("arguments", "outcome", "said"),
    [
        ('{"x": 499, "y": 999}', Outcome.OK, "The colour there is red."),
        ('{"x": 500, "y": 0, "img_idx": 0}', Outcome.OK, "The colour there is blue."),
        ('{"x": 1000, "y": 0}', Outcome.MODEL_ERROR, "Error: colour_at: x and y must be 0 to 999"),
        ('{"x": "1", "y": 0}', Outcome.MODEL_ERROR, "found '1'"),
        ('{"x": 1, "y": 1, "img_idx": 7}', Outcome.MODEL_ERROR, "img_idx must be 0 to 0, found 7"),
    ],
)
def test_the_tool_in_thirty_lines_is_one(
    tiny_qwen3_vl: Path, module: str, arguments: str, outcome: Outcome, said: str
) -> None:
    assert len(EXAMPLE.splitlines()) <= 30
    trajectory = play(ChatFormat(tiny_qwen3_vl), f"{module}:colour_at", arguments)
    (call,) = trajectory.turns[0].calls
    assert call.outcome is outcome
    assert call.observation is not None and said in call.observation.text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_is_a_valid_recipe(command: str) -> None:
    recipe, *overrides = shlex.split(command.replace("\\\n", " "))
    assert overrides and load_recipe(ROOT / recipe, overrides)


def test_the_page_shows_commands() -> None:
    assert len(COMMANDS) == 10
