"""The chat template, taken apart once.

A conversation grows by appending: prompt, sampled turn, observation, sampled turn, …
That is only right if the template is prefix-stable, i.e. rendering the longer
conversation starts with the rendering of the shorter one. Here marked conversations
are rendered, the text between the marks is cut out, and a template that does not put
the same text around the same things every time is refused with the difference.

    …assistant\\n  REPLY  <|im_end|>…<tool_response>\\n  TOOL  \\n</tool_response>…assistant\\n
    prompt               end and before               after

Templates that know no tools or no tool messages (Qwen2.5-VL's) get the same text as
Qwen2.5's language models: the tools section is appended to the system prompt, and tool
answers become a user message of `<tool_response>` blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tapo_train.errors import RolloutError

Message = dict[str, Any]
Schema = dict[str, Any]
Render = Callable[[list[Message], Sequence[Schema]], str]
"""Messages and tool schemas → text that ends where the assistant starts to write."""

SYSTEM, QUESTION, REPLY, TOOL = (f"⟦{name}⟧" for name in ("SYSTEM", "QUESTION", "REPLY", "TOOL"))
OPEN, CLOSE = "<tool_response>", "</tool_response>"
_EXAMPLE = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)

HERMES_TOOLS = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{schemas}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplatePieces:
    """Text around what is appended after a sampled turn."""

    end: str
    """What closes a message; the policy samples it as its last token."""
    before: str
    """After `end`, up to the first tool text."""
    between: str
    """From the end of one tool text (or its pictures) to the next tool text."""
    after: str
    """After the last tool text or picture, up to where the next turn starts."""
    picture: str
    """One picture, with a single placeholder; "" where there are none."""


class ChatTemplate:
    """Renders prompts and knows the pieces around observations.

    Args:
        render: the tokenizer's template with the generation prompt.
        ends: texts of the tokens that may close a message.
        placeholder: text of the picture placeholder; None: a template of texts alone.

    Raises:
        RolloutError: the template is not prefix-stable, or drops tool texts or pictures.
    """

    def __init__(self, render: Render, *, ends: Sequence[str], placeholder: str | None) -> None:
        self._render = render if placeholder is not None else _of_texts(render)
        render = self._render
        parameters = {"type": "object", "properties": {}}
        function = {"name": TOOL, "description": TOOL, "parameters": parameters}
        probe = {"type": "function", "function": function}
        head = [_system(SYSTEM), _user(QUESTION, 0)]
        shown = render(head, [probe])
        self._renders_tools = TOOL in shown
        self.dialect = _dialect_of(shown)
        """Name of the form that calls are asked for in; None: a form that is not known."""
        self.opening = _thought_opened(render(head, []))
        """What the template writes of each turn itself, such as `<think>`."""
        tool_role = render([*head, _reply(), _tool_message(TOOL, 0)], [])
        self._tool_role = OPEN in tool_role.partition(REPLY)[2]
        self.pieces = self._cut_pieces(ends, placeholder)
        self._check_second_round()

    def prompt(
        self, system_prompt: str, schemas: Sequence[Schema], num_images: int
    ) -> tuple[str, str]:
        """The prompt's text before and after the question."""
        if schemas and not self._renders_tools:
            listed = "\n".join(json.dumps(schema, ensure_ascii=False) for schema in schemas)
            tools = HERMES_TOOLS.format(schemas=listed)
            system_prompt = f"{system_prompt}\n\n{tools}" if system_prompt else tools
            schemas = ()
        text = self._render([_system(system_prompt), _user(QUESTION, num_images)], schemas)
        return _split_once(text, QUESTION, "the prompt")

    def _appended(self, *rounds: Sequence[tuple[str, int]]) -> str:
        """What rounds of (tool text, number of pictures) add after the first reply."""
        messages = [_system(SYSTEM), _user(QUESTION, 0)]
        prefix = self._render(messages, []).removesuffix(self.opening)
        for answers in rounds:
            messages += [_reply(), *self._tool_messages(answers)]
        text = self._render(messages, [])
        # Where the template opens a thought, it writes earlier turns in another way. What was
        # sampled is kept as it is, so only what comes after the reply counts.
        _require_prefix(prefix if self.opening else prefix + REPLY, text)
        return text[text.index(REPLY) + len(REPLY) :]

    def _tool_messages(self, answers: Sequence[tuple[str, int]]) -> list[Message]:
        if self._tool_role:
            return [_tool_message(text, num_images) for text, num_images in answers]
        content: list[Message] = []
        for index, (text, num_images) in enumerate(answers):
            opening = f"\n{CLOSE}\n{OPEN}\n" if index else f"{OPEN}\n"
            content += [_text(opening + text), *_pictures(num_images)]
        return [{"role": "user", "content": [*content, _text(f"\n{CLOSE}")]}]

    def _cut_pieces(self, ends: Sequence[str], placeholder: str | None) -> TemplatePieces:
        before, after = _split_once(self._appended([(TOOL, 0)]), TOOL, "one tool answer")
        end = max((end for end in ends if before.startswith(end)), key=len, default=None)
        if end is None:
            wanted = " or ".join(map(repr, ends))
            found = before[:40]
            raise RolloutError(f"chat template: a reply is closed by {found!r}; wanted {wanted}")
        picture = "" if placeholder is None else self._picture(before, after, placeholder)
        double = self._appended([(TOOL, 0), (TOOL, 0)])
        _require_around(before + TOOL, double, TOOL + after, "two tool answers")
        between = double[len(before + TOOL) : len(double) - len(TOOL + after)]
        return TemplatePieces(
            end=end, before=before[len(end) :], between=between, after=after, picture=picture
        )

    def _picture(self, before: str, after: str, placeholder: str) -> str:
        """What a picture of a tool answer is rendered as."""
        pictured = self._appended([(TOOL, 1)])
        _require_around(before + TOOL, pictured, after, "a tool answer with a picture")
        picture = pictured[len(before + TOOL) : len(pictured) - len(after)]
        if picture.count(placeholder) != 1:
            raise RolloutError(
                f"chat template: a picture of a tool answer is rendered as {picture!r}; "
                f"wanted one {placeholder}"
            )
        return picture

    def _check_second_round(self) -> None:
        """The text around the second observation must be that around the first."""
        pieces = self.pieces
        observation = pieces.end + pieces.before + TOOL + pieces.after
        first, _, second = self._appended([(TOOL, 0)], [(TOOL, 0)]).partition(REPLY)
        if self.opening:
            _require_prefix(observation.removesuffix(self.opening), first)
        else:
            _require_prefix(observation, first)
            _require_prefix(first, observation)
        _require_prefix(observation, second)
        _require_prefix(second, observation)


def _of_texts(render: Render) -> Render:
    """The template of a model without pictures, which takes contents as texts, not as parts."""

    def joined(message: Message) -> Message:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content)
        return {**message, "content": content}

    return lambda messages, schemas: render([joined(message) for message in messages], schemas)


def _dialect_of(shown: str) -> str | None:
    """The form of every example of a call in a rendered prompt; None if it is not known.

    A policy that obeys another form than the one that is read would never call a tool.
    """
    written = {example.strip() for example in _EXAMPLE.findall(shown)} - {""}
    if all(example.startswith("{") for example in written):
        return "hermes"
    return "xml" if all(example.startswith("<function=") for example in written) else None


def _thought_opened(prompt: str) -> str:
    """The `<think>` that a prompt ends with, and the white space around it."""
    found = re.search(r"<think>\s*\Z", prompt)
    return found.group() if found else ""


def _system(text: str) -> Message:
    return {"role": "system", "content": text}


def _user(text: str, num_images: int) -> Message:
    return {"role": "user", "content": [*_pictures(num_images), _text(text)]}


def _reply() -> Message:
    return {"role": "assistant", "content": REPLY}


def _tool_message(text: str, num_images: int) -> Message:
    return {"role": "tool", "content": [_text(text), *_pictures(num_images)]}


def _text(text: str) -> Message:
    return {"type": "text", "text": text}


def _pictures(num_images: int) -> list[Message]:
    return [{"type": "image"}] * num_images


def _split_once(text: str, mark: str, what: str) -> tuple[str, str]:
    pieces = text.split(mark)
    if len(pieces) != 2:
        found = len(pieces) - 1
        raise RolloutError(f"chat template: {what} holds its text {found} times; wanted once")
    return pieces[0], pieces[1]


def _require_around(start: str, text: str, end: str, what: str) -> None:
    _require_prefix(start, text)
    if len(text) < len(start + end) or not text.endswith(end):
        tail = text[-len(end) :]
        raise RolloutError(f"chat template: {what} ends in {tail!r}; wanted {end!r}")


def _require_prefix(prefix: str, text: str) -> None:
    """Raise with the first difference if `text` does not start with `prefix`."""
    if text.startswith(prefix):
        return
    pairs = enumerate(zip(prefix, text, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(prefix), len(text)))
    context = prefix[max(0, at - 40) : at]
    raise RolloutError(
        "chat template is not prefix-stable: a longer conversation changes what came before\n"
        f"  after    {context!r}\n"
        f"  shorter  {prefix[at : at + 60]!r}\n"
        f"  longer   {text[at : at + 60]!r}"
    )
