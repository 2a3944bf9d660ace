"""Reading assistant turns, hostile ones included."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapo_train.rollout.parse import parse_turn

CALL = '<tool_call>{"name": "zoom", "arguments": {"img_idx": 0}}</tool_call>'
TAGS = (
    "<tool_call>", "</tool_call>", "<answer>", "</answer>", "<think>", "</think>",
    "<thinking>", "</thinking>", '{"name": "zoom", "arguments": {}}', '{"name": 3}', "{", "é",
)  # fmt: skip
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(st.lists(st.sampled_from(TAGS) | st.text(max_size=5), max_size=12).map("".join))
@settings(max_examples=300, deadline=None)
def test_any_text_gives_ordered_blocks_that_are_readable_or_explained(text: str) -> None:
    parsed = parse_turn(text)
    end = 0
    for call in parsed.calls:
        assert end <= call.start < call.end <= len(text)
        assert text[call.start :].startswith("<tool_call>")
        assert (call.arguments is None) == (call.error is not None)
        end = call.end


@given(st.text(), st.dictionaries(st.text(), JSON_VALUES, max_size=3), st.text(max_size=9))
@settings(max_examples=200, deadline=None)
def test_a_written_call_is_read_back_with_its_place(name: str, arguments: object, pad: str) -> None:
    body = json.dumps({"name": name, "arguments": arguments})
    before = pad.replace("<", "")
    call_text = "<tool_call>\n" + body.replace("</", "<\\/") + "\n</tool_call>"
    (call,) = parse_turn(before + call_text + "after").calls
    assert (call.name, call.arguments, call.error) == (name, arguments, None)
    assert (call.start, call.end) == (len(before), len(before + call_text))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("", "Expecting value"),
        ("{'name': 'zoom'}", "Expecting property name"),
        ('["zoom"]', "got a list"),
        ("3", "got a number"),
        ('{"arguments": {}}', '"name" must be a string'),
        ('{"name": 3, "arguments": {}}', '"name" must be a string'),
        ('{"name": "zoom", "arguments": []}', "got a list"),
        ('{"name": "zoom", "arguments": "img 0"}', "got a string"),
        ('{"name": "zoom", "arguments": "[0]"}', "got a list"),
        ('{"name": "zoom", "arguments": "NaN"}', "NaN is not a JSON number"),
        ('{"name": "zoom", "arguments": "{\\"x\\": \\"\\\\ud800\\"}"}', "surrogates not"),
        ('{"name": "zoom", "arguments": 0}', "got a number"),
        ('{"name": "zoom", "arguments": {}, "why": 1}', "'why'"),
        ('{"name": "zoom", "arguments": {"x": NaN}}', "NaN is not a JSON number"),
        ('{"name": "zoom", "arguments": {"x": -Infinity}}', "-Infinity is not a JSON number"),
        ('{"name": "zoom", "arguments": {"x": "\\ud800"}}', "surrogates not allowed"),
        ('{"name": "zoom", "arguments": {"x": ' + "[" * 100_000, "nested too deeply"),
        ('{"name": "zoom", "arguments": {"x": ' + "9" * 5_000 + "}}", "digits"),
        (CALL[len("<tool_call>") : -len("</tool_call>")] * 2, "Extra data"),
    ],
)
def test_an_unreadable_call_says_why(body: str, said: str) -> None:
    (call,) = parse_turn(f"<tool_call>{body}</tool_call>").calls
    assert call.arguments is None and call.name == ""
    assert call.error is not None and said in call.error
    assert call.error.startswith("the tool call is not valid JSON")


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('"{\\"img_idx\\": 0}"', {"img_idx": 0}),
        ('""', {}),
        ('"  "', {}),
        ("null", {}),
        ('"null"', {}),
        ('"{}"', {}),
    ],
)
def test_arguments_may_be_json_text_or_nothing(written: str, arguments: dict[str, int]) -> None:
    """As tool servers and other chat formats write them, and as the credit stage reads them."""
    body = f'{{"name": "zoom", "arguments": {written}}}'
    (call,) = parse_turn(f"<tool_call>{body}</tool_call>").calls
    assert (call.name, call.arguments, call.error) == ("zoom", arguments, None)


def test_missing_arguments_are_no_arguments() -> None:
    (call,) = parse_turn('<tool_call>{"name": "zoom"}</tool_call>').calls
    assert (call.arguments, call.error) == ({}, None)


def test_an_unclosed_call_is_a_call_only_when_nothing_else_was_said() -> None:
    (call,) = parse_turn('a<tool_call>{"name"').calls
    assert (call.start, call.end) == (1, len('a<tool_call>{"name"'))
    assert call.error is not None and "</tool_call> is missing" in call.error
    assert parse_turn("<tool_call> <answer>x</answer>").calls == ()
    assert [call.name for call in parse_turn(CALL + "<tool_call>").calls] == ["zoom"]


def test_every_block_is_listed_in_order() -> None:
    first, second = parse_turn(f"{CALL} and {CALL}").calls
    assert first.end < second.start
    assert first.name == second.name == "zoom"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> Velor \n</answer>", "Velor"),
        ("<answer>a</answer><answer>b</answer>", "b"),
        ("<answer>a</answer><answer>b", "a"),
        ("<answer>a<answer>b</answer>", "b"),
        ("<answer></answer>", ""),
        ("a</answer>", None),
        ("</answer><answer>", None),
        ("<answer>a", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_complete_block(text: str, answer: str | None) -> None:
    assert parse_turn(text).answer == answer


DRAFT = '<tool_call>{"name": "draft", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "calls", "answer"),
    [
        (f"<think>perhaps {DRAFT}, too vague</think>{CALL}", ["zoom"], None),
        (f"<thinking>perhaps {DRAFT}</thinking>{CALL}{CALL}", ["zoom", "zoom"], None),
        (f"<think>perhaps {DRAFT}? no</think><answer>Vega</answer>", [], "Vega"),
        (f"<think>a</think>{CALL}<think>and then {DRAFT}</think>", ["zoom"], None),
        ("<think>the form is <answer>x</answer></think>", [], None),
        ("<think>the form is <answer>x</answer></think><answer>Vega</answer>", [], "Vega"),
        ("<think>the form is <answer>x</answer>, but it may be Rigel, so", [], None),
        ("<answer>Vega</answer><think>or <answer>Rigel</answer>?</think>", [], "Vega"),
        ("<answer>the tag <think></answer>", [], "the tag <think>"),
        ("into <answer> <think>no: <answer>Rigel</answer></think>", [], None),
        ("<answer>a<think>b</think></answer>", [], "a<think>b</think>"),
        (CALL.replace("0", '"<think>"'), ["zoom"], None),
        (f"</think>{CALL}", ["zoom"], None),
    ],
)
def test_what_stands_in_a_thought_is_neither_call_nor_answer(
    text: str, calls: list[str], answer: str | None
) -> None:
    parsed = parse_turn(text)
    assert [call.name for call in parsed.calls] == calls
    assert parsed.answer == answer
    assert len(parsed.said) == len(text)


def test_a_call_in_a_thought_that_is_never_closed_is_said_to_be_there() -> None:
    (call,) = parse_turn(f"<think>I look it up {CALL}").calls
    assert call.error is not None and "inside a thought that is not closed" in call.error
    assert call.start == len("<think>I look it up ")


@pytest.mark.parametrize(
    "query", ["what is </tool_call> in Hermes", "<tool_call></tool_call>", "</tool_call>"]
)
def test_a_closing_tag_inside_a_string_does_not_close_the_call(query: str) -> None:
    body = json.dumps({"name": "search", "arguments": {"query": query}})
    first, second = parse_turn(f"<tool_call>\n{body}\n</tool_call>{CALL}").calls
    assert (first.arguments, first.error) == ({"query": query}, None)
    assert second.name == "zoom"


def test_a_call_that_is_not_json_ends_at_the_next_closing_tag() -> None:
    first, second = parse_turn(f"<tool_call>{{'q': '</tool_call>'}}{CALL}").calls
    assert first.error is not None and first.end == len("<tool_call>{'q': '</tool_call>")
    assert second.name == "zoom"


@pytest.mark.parametrize(
    "piece",
    [
        "<tool_call>", "<answer>", "</answer><answer>", "<think>", "<answer><think>",
        "<think></think>", '<tool_call>{"</tool_call>', '<tool_call>["</tool_call>",',
        '<tool_call>"</tool_call>', "<answer><think></answer>", '<tool_call>"\\',
    ],
)  # fmt: skip
@pytest.mark.parametrize("end", ["", "</tool_call>", "</answer>", "</think>"])
def test_reading_takes_time_linear_in_the_text(piece: str, end: str) -> None:
    started = time.process_time()
    parse_turn(piece * 40_000 + end)
    assert time.process_time() - started < 4
