"""Tools of a real MCP server process: schemas, answers, death and the end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mcp import types as mcp_types
from process_environment import ROOT, environment
from pydantic import ValidationError

from tapo_train.errors import ConfigError
from tapo_train.tools import mcp as mcp_door
from tapo_train.tools.base import Tool, ToolContext
from tapo_train.tools.json_schema import arguments_model_of
from tapo_train.tools.mcp import RESTARTS, McpServer, McpTool
from tapo_train.tools.mcp_answer import read_answer
from tapo_train.tools.sandbox import Sandbox
from tapo_train.tools.schema import function_schema
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Observation, Outcome, Task

SERVER = Path(__file__).with_name("mcp_server.py")
COMMAND = (sys.executable, str(SERVER))
ENV = {"LITTLE_KEY": "x"}
CONTEXT = ToolContext(images=(), task=Task(id="t", question="?", images=(), answers=("a",)))


@pytest.fixture(scope="module")
def server() -> Iterator[McpServer]:
    started = McpServer(COMMAND, env=ENV)
    yield started
    started.close()


def run(server: McpServer, name: str, arguments: dict[str, Any], **limits: Any) -> Observation:
    tools: list[Tool] = list(server.tools)
    box = Toolbox(tools, deadline_s=limits.get("deadline_s", 60.0))
    return asyncio.run(box.execute(box.read(name, arguments), CONTEXT))


def test_the_listed_tools_have_the_servers_schema(server: McpServer) -> None:
    assert [tool.name for tool in server.tools] == [
        *("add", "draw", "refuse", "sleep", "hang", "hits", "die")
    ]
    schemas = Toolbox(list[Tool](server.tools), deadline_s=1).schemas()
    assert schemas[0]["function"] == {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 1}},
            "required": ["a"],
        },
    }
    versions = [tool.version for tool in server.tools]
    assert len(set(versions)) == 7 and all(v.startswith("mcp little 3 ") for v in versions)


def test_text_and_pictures_become_an_observation(server: McpServer) -> None:
    seen = run(server, "add", {"a": 2, "b": 40})
    assert (seen.outcome, seen.text) == (Outcome.OK, "2 + 40 = 42, with ['LITTLE_KEY']")
    seen = run(server, "draw", {"width": 64})
    assert seen.text == "here:\n<|im_end|>"
    assert [(image.width, image.height) for image in seen.images] == [(64, 40)]
    (image,) = run(server, "draw", {"width": 2048}).images
    assert image.width == 1024


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "'a' is a required property"),
        ({"a": "2"}, "a: '2' is not of type 'integer'"),
        ({"a": 1.5}, "a: 1.5 is not of type 'integer'"),
    ],
)
def test_arguments_outside_the_schema_never_reach_the_server(
    server: McpServer, arguments: dict[str, Any], complaint: str
) -> None:
    seen = run(server, "add", arguments)
    assert seen.outcome is Outcome.MODEL_ERROR and complaint in seen.text


def test_an_answer_marked_as_an_error_is_the_tools(server: McpServer) -> None:
    seen = run(server, "refuse", {})
    assert seen.outcome is Outcome.TOOL_ERROR and "not today" in seen.text


def test_a_call_that_is_too_slow_is_given_up_and_the_session_goes_on(server: McpServer) -> None:
    started, session = time.perf_counter(), server._session
    assert run(server, "sleep", {"seconds": 1.5}, deadline_s=0.2).outcome is Outcome.TIMEOUT
    assert time.perf_counter() - started < 1.4
    assert run(server, "add", {"a": 1}).outcome is Outcome.OK
    assert server._session is session


@pytest.mark.slow
def test_a_server_that_hangs_is_killed_and_started_again_so_many_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mcp_door, "ALIVE_S", 0.4)
    monkeypatch.setattr(mcp_door, "RESTARTS", 1)
    hanging = McpServer(COMMAND, env=ENV, only=("hang", "add"))
    assert hang(hanging)
    assert run(hanging, "add", {"a": 1}).outcome is Outcome.OK, "an answer in between forgives"
    assert hang(hanging) and hang(hanging)
    seen = run(hanging, "add", {"a": 1})
    assert seen.outcome is Outcome.INFRA_ERROR
    assert "died 2 times in a row, at last because it left a call without an answer" in seen.text
    hanging.close()


def hang(server: McpServer) -> bool:
    """Have the server hang, started anew if it must be; whether its process is gone then."""
    session = server._living()
    assert run(server, "hang", {}, deadline_s=0.2).outcome is Outcome.TIMEOUT
    session._thread.join(20)
    return not session._thread.is_alive()


def test_a_server_that_never_says_a_word_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp_door, "START_S", 1.0)
    program = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    with pytest.raises(ConfigError, match=r"did not start \(TimeoutError"):
        McpServer([sys.executable, "-c", f"{program}; time.sleep(60)"])
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.slow
def test_a_server_that_dies_is_an_infra_failure_and_is_started_again(server: McpServer) -> None:
    seen = run(server, "die", {})
    assert seen.outcome is Outcome.INFRA_ERROR and "die failed: the MCP server" in seen.text
    assert run(server, "add", {"a": 1}).outcome is Outcome.OK
    for _ in range(RESTARTS):
        assert run(server, "die", {}).outcome is Outcome.INFRA_ERROR
    assert run(server, "add", {"a": 1}).outcome is Outcome.OK, "an answer in between forgives"


@pytest.mark.slow
def test_a_server_that_does_not_come_back_is_given_up(tmp_path: Path) -> None:
    once = McpServer([*COMMAND, str(tmp_path / "marker")], env=ENV, only=("add", "die"))
    assert [tool.name for tool in once.tools] == ["add", "die"]
    assert run(once, "die", {}).outcome is Outcome.INFRA_ERROR
    for _ in range(RESTARTS):
        assert "does not start again" in run(once, "add", {"a": 1}).text
    seen = run(once, "add", {"a": 1})
    assert seen.outcome is Outcome.INFRA_ERROR and "died 4 times in a row" in seen.text
    once.close()


def test_what_is_no_server_or_lacks_a_tool_is_said() -> None:
    with pytest.raises(ConfigError, match=r"tools\.mcp: /nowhere/x did not start"):
        McpServer(["/nowhere/x"])
    with pytest.raises(ConfigError, match=r"tools\.mcp: .* did not start"):
        McpServer([sys.executable, "-c", "pass"])
    with pytest.raises(ConfigError, match="has no tool subtract; it has add, draw"):
        McpServer(COMMAND, env=ENV, only=("subtract",))


def test_the_process_ends_with_the_run() -> None:
    program = (
        "import os\n"
        "from test_tools_mcp import *\n"
        "server = McpServer(COMMAND, env=ENV)\n"
        "children = os.popen(f'pgrep -P {os.getpid()}').read().split()\n"
        "print(children[0])\n"
    )
    variables = environment()
    variables["PYTHONPATH"] += f":{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ({"type": "array"}, "takes 'array', wanted an object"),
        ({"type": 3}, "SchemaError"),
        ({"properties": {"a": {"$ref": "https://example.invalid/a"}}}, "Unresolvable"),
        ({"properties": {"a": {"$ref": "#/$defs/missing"}}}, "PointerToNowhere"),
        ({"$ref": "#"}, "RecursionError"),
    ],
)
def test_a_schema_that_cannot_be_trusted_is_refused(schema: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        arguments_model_of("t", schema)
    assert complaint in str(caught.value)


def test_references_within_a_schema_are_followed() -> None:
    schema = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/point"}},
        "$defs": {"point": {"type": "array", "items": {"type": "number"}, "minItems": 2}},
    }
    model = arguments_model_of("t", schema)
    assert model.model_validate({"at": [1, 2.5]}).model_dump() == {"at": [1, 2.5]}
    with pytest.raises(ValueError, match=r"at: \[1\] is too short"):
        model.model_validate({"at": [1]})


@pytest.mark.parametrize("number", [float("inf"), 10**400])
def test_a_number_that_the_schema_cannot_judge_is_the_policys_mistake(number: float) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "number", "multipleOf": 0.01}}}
    with pytest.raises(ValidationError, match="cannot be checked"):
        arguments_model_of("t", schema).model_validate({"n": number})


def test_how_a_server_is_started_is_part_of_the_version_but_no_value_is(
    server: McpServer,
) -> None:
    listed = SimpleNamespace(name="t", description="d", input_schema={"type": "object"})

    def version(command: tuple[str, ...], env: dict[str, str]) -> str:
        setup = McpServer.setup_of(command, env)
        started = SimpleNamespace(setup=setup)
        return McpTool(
            started,  # type: ignore[arg-type]
            listed,
            about="a",
            sandbox=Sandbox(),
            max_chars=9,
        ).version

    same = {version(("run",), {"KEY": value}) for value in ("secret", "other")}
    others = {version(("run", "--fast"), {"KEY": ""}), version(("run",), {}), version(("go",), {})}
    assert len(same) == 1 and len(same | others) == 4


def test_answers_that_are_cut_elsewhere_are_other_answers(server: McpServer) -> None:
    listed = SimpleNamespace(name="t", description="d", input_schema={"type": "object"})
    versions = {
        McpTool(server, listed, about="a", sandbox=Sandbox(), max_chars=chars).version
        for chars in (10, 20)
    }
    assert len(versions) == 2


def test_an_answer_whose_content_is_structured_alone_is_read(server: McpServer) -> None:
    seen = run(server, "hits", {})
    assert (seen.outcome, seen.text) == (Outcome.OK, '{"hits": [{"built": 1931}]}')


HITS = {"hits": [{"built": 1931}]}
WRITTEN = '{"hits": [{"built": 1931}]}'


def said(text: str) -> mcp_types.TextContent:
    return mcp_types.TextContent(type="text", text=text)


@pytest.mark.parametrize(
    ("content", "structured", "text"),
    [
        ([], HITS, WRITTEN),
        ([said("1 hit")], HITS, f"1 hit\n{WRITTEN}"),
        ([said('{ "hits":[{"built":1931}] }')], HITS, '{ "hits":[{"built":1931}] }'),
        ([said("3")], {"result": 3}, "3"),
        ([said("three")], {"result": "three"}, "three"),
        ([said("1"), said("2")], {"result": [1, 2]}, "1\n2"),
        ([], {"result": None}, ""),
        ([], {}, ""),
        ([said("é")], {"é": "ü"}, 'é\n{"é": "ü"}'),
        (
            [
                mcp_types.EmbeddedResource(
                    type="resource",
                    resource=mcp_types.TextResourceContents(uri="doc://x", text="Built in 1931."),
                )
            ],
            None,
            "Built in 1931.",
        ),
        (
            [
                mcp_types.ResourceLink(
                    type="resource_link", name="tower", title="Tower", uri="https://example.org/t"
                )
            ],
            None,
            "Tower (https://example.org/t)",
        ),
        (
            [said("x"), mcp_types.AudioContent(type="audio", data="AA", mime_type="audio/wav")],
            None,
            "x\n[1 parts that are neither text nor picture are left out]",
        ),
    ],
)
def test_all_parts_of_an_answer_are_shown_and_none_twice(
    content: list[Any], structured: Any, text: str
) -> None:
    assert read_answer(content, structured).text == text


def test_a_picture_may_be_an_embedded_resource() -> None:
    blob = mcp_types.BlobResourceContents(uri="pic://x", mime_type="image/png", blob="AAAA")
    other = mcp_types.BlobResourceContents(uri="zip://x", mime_type="application/zip", blob="AAAA")
    parts = [mcp_types.EmbeddedResource(type="resource", resource=each) for each in (blob, other)]
    answer = read_answer(parts, None)
    assert (answer.pictures, answer.left_out) == (["AAAA"], 1)


def shown(schema: dict[str, Any]) -> dict[str, Any]:
    model = arguments_model_of("t", schema)
    parameters: dict[str, Any] = function_schema("t", "d", model)["function"]["parameters"]
    return parameters


def test_the_policy_is_shown_all_that_a_foreign_schema_judges_by() -> None:
    inner = {
        "kind": {"oneOf": [{"const": "a"}, {"type": "string", "pattern": "^b+$"}]},
        "tags": {"type": "array", "minItems": 1, "maxItems": 3, "uniqueItems": True,
                 "items": {"type": "string", "minLength": 2}},
        "pair": {"type": "array", "prefixItems": [{"type": "integer"}, {"multipleOf": 5}]},
        "title": {"type": "string", "format": "date"},
        "map": {"type": "object", "patternProperties": {"^x": {"exclusiveMinimum": 0}},
                "additionalProperties": False, "minProperties": 1},
        "not": {"not": {"enum": [1]}, "allOf": [{"minimum": 0}]},
    }  # fmt: skip
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Arguments",
        "type": "object",
        "properties": inner,
        "required": ["kind"],
        "dependentRequired": {"tags": ["kind"]},
        "anyOf": [{"required": ["tags"]}, {"required": ["pair"]}],
        "additionalProperties": False,
    }
    parameters = shown(schema)
    assert parameters["properties"] == inner
    assert parameters["anyOf"] == schema["anyOf"]
    assert parameters["dependentRequired"] == {"tags": ["kind"]}
    assert not {"$schema", "title"} & set(parameters)


def test_titles_are_left_out_and_an_argument_called_title_is_not() -> None:
    parameters = shown(
        {"type": "object", "properties": {"title": {"title": "Title", "type": "string"}}}
    )
    assert parameters == {"type": "object", "properties": {"title": {"type": "string"}}}


def test_references_are_shown_in_place_where_that_comes_to_an_end() -> None:
    size = {"type": "integer", "minimum": 1, "description": "in px"}
    schema = {
        "type": "object",
        "properties": {
            "width": {"$ref": "#/$defs/size", "description": "of the picture"},
            "height": {"$ref": "#/$defs/size", "minimum": 5},
            "depth": {"$ref": "#/properties/width"},
        },
        "$defs": {"size": size},
    }
    wide = {"type": "integer", "minimum": 1, "description": "of the picture"}
    assert shown(schema)["properties"] == {
        "width": wide,
        "height": {"allOf": [size], "minimum": 5},
        "depth": wide,
    }
    tree = {"type": "array", "items": {"$ref": "#/$defs/tree"}}
    endless = {
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/tree"}},
        "$defs": {"tree": tree},
    }
    assert shown(endless) == endless, "whole, as it can only be read with its definitions"


def test_references_that_multiply_stay_references() -> None:
    levels = {
        f"l{n}": {"anyOf": [{"$ref": f"#/$defs/l{n + 1}"}, {"$ref": f"#/$defs/l{n + 1}"}]}
        for n in range(30)
    }
    schema = {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/l0"}},
        "$defs": {**levels, "l30": {"type": "string"}},
    }
    assert shown(schema) == schema
