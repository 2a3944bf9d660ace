"""Tools from functions, and tools by import path."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from tapo_train.errors import ConfigError, ToolError
from tapo_train.tools.base import ToolContext
from tapo_train.tools.function_tool import tool
from tapo_train.tools.registry import load_tool
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Observation, Outcome, Task

CONTEXT = ToolContext(images=(), task=Task(id="t-1", question="?", images=(), answers=("a",)))


class Place(BaseModel):
    """A nested argument."""

    city: str
    zip: int | None = None


@tool
async def weather(
    place: Place, context: ToolContext, days: int = 1, unit: Literal["C", "F"] = "C"
) -> str:
    """Say what the weather will be.

    More about it that the policy does not read.

    Args:
        place: where,
            in words
        days (int): how many days ahead
        unit: of the temperature

    Returns:
        nonsense: this is no argument
    """
    return f"{type(place).__name__} {place.city} {days} {unit} {context.task.id}"


@tool
def thread_name(upper: bool) -> Observation:
    """Name the thread.

    Args:
        upper: in capitals
    """
    if threading.current_thread() is threading.main_thread():
        raise ToolError("not in the loop's thread")
    return Observation(text="TOOL" if upper else threading.current_thread().name)


def run(chosen: Any, arguments: dict[str, Any]) -> Observation:
    box = Toolbox([chosen], deadline_s=5)
    return asyncio.run(box.execute(box.read(chosen.name, arguments), CONTEXT))


def test_the_schema_says_types_defaults_and_descriptions_and_nothing_else() -> None:
    (schema,) = Toolbox([weather], deadline_s=1).schemas()
    assert schema["function"] == {
        "name": "weather",
        "description": "Say what the weather will be.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {
                    "type": "object",
                    "description": "where, in words",
                    "properties": {
                        "city": {"type": "string"},
                        "zip": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
                    },
                    "required": ["city"],
                },
                "days": {"type": "integer", "default": 1, "description": "how many days ahead"},
                "unit": {
                    "type": "string",
                    "enum": ["C", "F"],
                    "default": "C",
                    "description": "of the temperature",
                },
            },
            "required": ["place"],
        },
    }


def test_a_function_gets_what_its_types_promise_and_the_conversation() -> None:
    seen = run(weather, {"place": {"city": "Velor"}, "days": 3})
    assert (seen.outcome, seen.text) == (Outcome.OK, "Place Velor 3 C t-1")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "argument place is missing"),
        ({"place": {"city": "x"}, "days": "3"}, "days: Input should be a valid integer, found '3'"),
        ({"place": {"city": "x"}, "days": True}, "days"),
        ({"place": {"city": "x"}, "unit": "K"}, "unit: Input should be 'C' or 'F'"),
        ({"place": {"city": "x"}, "dayz": 3}, "dayz"),
        ({"place": {}}, "argument place.city is missing"),
        ({"place": {"city": "x"}, "context": 1}, "context"),
    ],
)
def test_arguments_that_do_not_fit_are_the_policys_error(
    arguments: dict[str, Any], complaint: str
) -> None:
    seen = run(weather, arguments)
    assert seen.outcome is Outcome.MODEL_ERROR
    assert seen.text.startswith("Error: weather: ") and complaint in seen.text


def test_a_blocking_function_runs_in_a_thread() -> None:
    assert run(thread_name, {"upper": False}).text == "tool"
    assert run(thread_name, {"upper": True}).text == "TOOL"


def test_the_version_is_the_source_unless_it_is_said() -> None:
    assert weather.version != thread_name.version and len(weather.version) == 16
    assert tool(version="7")(thread_name.function).version == "7"
    assert tool(name="other")(thread_name.function).version == thread_name.version
    assert tool(name="other")(thread_name.function).name == "other"


def untyped(a) -> str:  # type: ignore[no-untyped-def]
    """Do it.

    Args:
        a: something
    """
    return str(a)


def undescribed(a: int) -> str:
    """Do it."""
    return str(a)


def unanswered(a: int) -> int:
    """Do it.

    Args:
        a: something
    """
    return a


def any_number(*a: int) -> str:
    """Do it.

    Args:
        a: something
    """
    return str(a)


def misspelt(a: int) -> str:
    """Do it.

    Args:
        a: something
        b: nothing
    """
    return str(a)


def wordless(a: int) -> str:
    return str(a)


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (untyped, "tool untyped: argument a has no type"),
        (undescribed, "tool undescribed: argument a is not described"),
        (unanswered, "tool unanswered: returns <class 'int'>"),
        (any_number, "tool any_number: argument a cannot be given by name"),
        (misspelt, "tool misspelt: its docstring describes b"),
        (wordless, "tool wordless: has no docstring"),
    ],
)
def test_a_function_the_policy_could_not_use_is_refused(function: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint.replace("(", r"\(")):
        tool(function)


class Bounded(BaseModel):
    """Arguments with a range."""

    n: int = Field(ge=1, le=9, description="how many")


class CountTool:
    """A tool as a class."""

    name = "count"
    version = "1"
    description = "Count."
    arguments_model: type[BaseModel] = Bounded

    async def run(self, arguments: Bounded, context: ToolContext) -> Observation:
        return Observation(text=str(arguments.n))


class NoTool(CountTool):
    """Has no version."""

    version = None  # type: ignore[assignment]


def make_count() -> CountTool:
    return CountTool()


COUNT = CountTool()


@pytest.mark.parametrize("name", ["CountTool", "make_count", "COUNT", "weather"])
def test_a_tool_is_loaded_by_its_import_path(name: str) -> None:
    loaded = load_tool(f"{__name__}:{name}")
    assert loaded.name == ("weather" if name == "weather" else "count")
    assert not isinstance(loaded, type)


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("tapo_train", "found 'tapo_train', wanted package.module:name"),
        ("no_such_module:Tool", "no_such_module:Tool cannot be imported (ModuleNotFoundError"),
        (f"{__name__}:Missing", "cannot be imported (AttributeError"),
        (f"{__name__}:NoTool", "its version is not a string"),
        (f"{__name__}:CONTEXT", "is no tool: found ToolContext, its name is not a string"),
    ],
)
def test_what_cannot_be_imported_or_is_no_tool_is_said(path: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_tool(path)
    assert str(caught.value).startswith("tools.extra: ") and complaint in str(caught.value)


def test_a_module_with_a_syntax_error_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_tools.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"broken_tools:f cannot be imported \(SyntaxError"):
        load_tool("broken_tools:f")


def test_a_list_of_the_policys_json_becomes_the_tuple_the_function_wants() -> None:
    @tool(version="1")
    def area(box: tuple[float, float, float, float]) -> str:
        """Measure.

        Args:
            box: corners
        """
        return f"{type(box).__name__} {(box[2] - box[0]) * (box[3] - box[1])}"

    toolbox = Toolbox([area], deadline_s=5)
    seen = asyncio.run(toolbox.execute(toolbox.read("area", {"box": [1, 2, 4, 6]}), CONTEXT))
    assert (seen.outcome, seen.text) == (Outcome.OK, "tuple 12.0")
    assert toolbox.read("area", {"box": [1, 2, "4", 6]}).error is not None
