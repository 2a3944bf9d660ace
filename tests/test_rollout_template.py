"""Taking chat templates apart, and refusing those that cannot be grown by appending."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tapo_train.demo.tiny.chat_template import CHAT_TEMPLATE
from tapo_train.errors import RolloutError
from tapo_train.rollout.template import ChatTemplate, Message, Render, Schema

QWEN2_5_VL = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""As published with Qwen2.5-VL (default system prompt left out): no tools, no tool role."""

SCHEMA = {"type": "function", "function": {"name": "zoom", "parameters": {}}}
AFTER = "\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def render(tiny_qwen3_vl: Path) -> object:
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3_vl)

    def with_template(template: str) -> Render:
        def render(messages: list[Message], schemas: Sequence[Schema]) -> str:
            return tokenizer.apply_chat_template(
                messages,
                tools=list(schemas) or None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
            )

        return render

    return with_template


def take_apart(render: object, template: str) -> ChatTemplate:
    return ChatTemplate(render(template), ends=("<|im_end|>",), placeholder="<|image_pad|>")


@pytest.mark.parametrize(
    ("template", "before"),
    [
        (CHAT_TEMPLATE, "\n<|im_start|>user\n<tool_response>\n"),
        (QWEN2_5_VL, "\n<|im_start|>user\n<tool_response>\n"),
    ],
)
def test_pieces_around_an_observation(render: object, template: str, before: str) -> None:
    pieces = take_apart(render, template).pieces
    assert pieces.end == "<|im_end|>"
    assert pieces.before == before
    assert pieces.between == "\n</tool_response>\n<tool_response>\n"
    assert pieces.after == AFTER
    assert pieces.picture == "<|vision_start|><|image_pad|><|vision_end|>"


def test_a_template_without_tools_gets_them_in_the_system_prompt(render: object) -> None:
    template = take_apart(render, QWEN2_5_VL)
    head, tail = template.prompt("Look.", [SCHEMA], 2)
    assert head.startswith("<|im_start|>system\nLook.\n\n# Tools\n")
    assert '"name": "zoom"' in head
    assert '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' in head
    assert head.count("<|image_pad|>") == 2
    assert tail == "<|im_end|>\n<|im_start|>assistant\n"
    assert "# Tools" not in template.prompt("Look.", [], 0)[0]
    assert template.prompt("", [SCHEMA], 0)[0].startswith("<|im_start|>system\n# Tools")


def test_a_template_with_tools_renders_them_itself(render: object) -> None:
    head, _ = take_apart(render, CHAT_TEMPLATE).prompt("Look.", [SCHEMA], 0)
    assert "zoom" in head and "# Tools" not in head


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        # An earlier assistant turn is shortened once another one follows (as Qwen3 does).
        (
            "render(message.content) + '<|im_end|>\\n' -}}",
            "(render(message.content) if loop.index0 > 2 else '…') + '<|im_end|>\\n' -}}",
            "not prefix-stable",
        ),
        (
            "+ '\\n</tool_response>'",
            "+ loop.index0|string + '</tool_response>'",
            "two tool answers",
        ),
        # Only the second round of tools is rendered differently.
        ("'\\n</tool_response>'", "'\\n</tool_response>' + '!' * (loop.index0 // 5)", "'!"),
        ("'\\n<tool_response>\\n' + render(message.content)", "'<tool_response>'", "0 times"),
        ("'<|vision_start|><|image_pad|><|vision_end|>'", "'<image>'", "wanted one <|image_pad|>"),
        ("'<|im_end|>\\n' -}}\n{%- endif", "'</s>\\n' -}}\n{%- endif", "closed by '</s>"),
        ("{{- render(messages[0].content) -}}", "{{- messages|length -}}", "prefix-stable"),
    ],
)
def test_a_template_that_cannot_be_grown_is_refused(
    render: object, old: str, new: str, said: str
) -> None:
    assert old in CHAT_TEMPLATE
    with pytest.raises(RolloutError) as caught:
        take_apart(render, CHAT_TEMPLATE.replace(old, new))
    assert said in str(caught.value)


def test_the_refusal_shows_where_the_renderings_differ(render: object) -> None:
    counting = CHAT_TEMPLATE.replace(
        "{{- render(messages[0].content) -}}", "{{- messages|length -}}"
    )
    with pytest.raises(RolloutError) as caught:
        take_apart(render, counting)
    lines = str(caught.value).splitlines()
    assert lines[1] == "  after    '<|im_start|>system\\n'"
    assert lines[2].startswith("  shorter  '2<|im_end|>")
    assert lines[3].startswith("  longer   '4<|im_end|>")


def test_a_question_that_the_template_repeats_is_refused(render: object) -> None:
    doubled = CHAT_TEMPLATE.replace("{{- part.text -}}", "{{- part.text + part.text -}}")
    template = QWEN2_5_VL.replace("{{- part.text -}}", "{{- part.text + part.text -}}")
    for bad in (doubled, template):
        with pytest.raises(RolloutError, match="2 times; wanted once"):
            take_apart(render, bad)
