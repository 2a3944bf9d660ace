"""Model folders and chat templates that are not known are refused in one message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tapo_train.errors import ConfigError, RolloutError
from tapo_train.rollout.chat import ChatFormat

SAY = """{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.content is string -%}{{- m.content -}}{%- else -%}{%- for p in m.content -%}
{%- if p.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}
{%- if loop.first and tools -%}{{- tools | tojson -}}{{- '<tool_call>EXAMPLE</tool_call>' -}}
{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


@pytest.fixture
def folder(tiny_qwen3_vl: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(tiny_qwen3_vl, copy)
    return copy


@pytest.mark.parametrize("kind", ["qwen4_exp", "mamba2", "idefics3", "qwen2_vl"])
def test_a_model_of_another_family_is_refused_by_name(folder: Path, kind: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    wanted = (
        f"found a model of type '{kind}' in .*; wanted one of qwen2_5_vl .Qwen2.5-VL.; qwen3_vl"
    )
    with pytest.raises(ConfigError, match=wanted):
        ChatFormat(folder)


@pytest.mark.parametrize("config", ["{}", "[]", "no json"])
def test_a_configuration_without_a_model_type_is_refused(folder: Path, config: str) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=r"config\.json names no model type"):
        ChatFormat(folder)


def test_a_template_that_asks_for_a_form_of_calls_that_is_not_known_is_refused(
    folder: Path,
) -> None:
    text = SAY.replace("EXAMPLE", "name<arg_key>k</arg_key>")
    (folder / "chat_template.jinja").write_text(text)
    with pytest.raises(RolloutError, match=r"a form that is not known; wanted one of hermes, xml"):
        ChatFormat(folder)
    ChatFormat(folder, read_call=lambda body: (body, {}))


def test_a_template_that_asks_for_functions_and_parameters_is_read_so(folder: Path) -> None:
    text = SAY.replace("EXAMPLE", "\\n<function=name>\\n</function>")
    (folder / "chat_template.jinja").write_text(text)
    written = "<function=look>\n<parameter=at>\n[1]\n</parameter>\n</function>"
    (call,) = ChatFormat(folder).read(f"<tool_call>\n{written}\n</tool_call>").calls
    assert (call.name, call.arguments) == ("look", {"at": "[1]"})


def test_a_template_that_opens_the_thought_keeps_what_was_sampled(folder: Path) -> None:
    opened = SAY.replace("assistant\\n' -}}", "assistant\\n<think>\\n' -}}")
    (folder / "chat_template.jinja").write_text(opened.replace("EXAMPLE", ""))
    chat = ChatFormat(folder)
    assert chat.template.pieces.after.endswith("<|im_start|>assistant\n<think>\n")
    text = "a <answer>draft</answer> is</think>\n<answer>x</answer>"
    assert chat.read(text).answer == "x"
    assert len(chat.read(text).said) == len(text) and "draft" not in chat.read(text).said


@pytest.mark.parametrize("example", ["", '\n{"name": <function-name>, "arguments": {}}\n'])
def test_one_that_asks_for_json_is_taken(folder: Path, example: str) -> None:
    text = SAY.replace("EXAMPLE", example.replace("\n", "\\n"))
    (folder / "chat_template.jinja").write_text(text)
    ChatFormat(folder)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("{{- raise_exception('Only user and assistant roles') -}}", "Only user and assistant"),
        ("{{- nobody.knows -}}", "'nobody' is undefined"),
        ("{{- 1 + m.role -}}", "TypeError"),
    ],
)
def test_a_template_that_fails_for_a_role_is_refused_with_its_words(
    folder: Path, failure: str, words: str
) -> None:
    own = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(
        "{%- for m in messages -%}{%- if m.role == 'tool' -%}"
        + failure
        + "{%- endif -%}{%- endfor -%}"
        + own
    )
    with pytest.raises(RolloutError, match=f"chat template fails on .*tool: .*{words}"):
        ChatFormat(folder)
