"""The question of a row, out of the chat messages it is published in.

Pictures are always shown before the question, in order, so placeholders at either end are
dropped; one inside the text would change its meaning and is refused. No placeholder at all is
fine (FVQA has none). Beside one user message with a text, as most files have it, a row may have

* a plain text in place of the messages,
* the content as parts, [{"type": "image"}, {"type": "text", "text": "…"}],
* a system turn before the user's, as files made for one trainer's tools have it. It is not
  used, as the recipe has its own, and that is noted.
"""

from __future__ import annotations

from collections.abc import Mapping

from tapo_train.data.intake import Intake
from tapo_train.data.rows import Row

__all__ = ["IMAGE_PLACEHOLDER", "question_of"]

IMAGE_PLACEHOLDER = "<image>"
SYSTEM_TURN = "have a system turn of their own, which is not used: data.system_prompt is"

_WANTED = 'a text, or one message {"role": "user", "content": text} after at most a system turn'


def question_of(row: Row, *, num_images: int, intake: Intake | None = None) -> str:
    """The question in `row["prompt"]`, without its picture placeholders.

    Args:
        intake: is told of a system turn.
    """
    content, field = _content(row, intake), "content"
    if isinstance(row.fields.get("prompt"), str):
        message, field = row, "prompt"
    else:
        message = Row(f"{row.where}: prompt", {"content": content})
    num_placeholders = content.count(IMAGE_PLACEHOLDER)
    if num_placeholders not in (0, num_images):
        raise message.wrong(
            field, f"{num_images} {IMAGE_PLACEHOLDER} as there are pictures, or none"
        )
    question = _strip_placeholders(content)
    if not question or IMAGE_PLACEHOLDER in question:
        raise message.wrong(field, f"a question with {IMAGE_PLACEHOLDER} only before or after it")
    return question


def _content(row: Row, intake: Intake | None) -> str:
    """The user's text, with a placeholder for every picture among its parts."""
    messages = row.fields.get("prompt")
    if isinstance(messages, str):
        return row.text("prompt")
    if not isinstance(messages, list) or not all(isinstance(item, Mapping) for item in messages):
        raise row.wrong("prompt", _WANTED)
    users = list(messages)
    if len(users) > 1 and users[0].get("role") == "system":
        users = users[1:]
        if intake is not None:
            intake.notes[SYSTEM_TURN] += 1
    if len(users) != 1:
        raise row.wrong("prompt", _WANTED)
    message = Row(f"{row.where}: prompt[{len(messages) - 1}]", users[0])
    if message.fields.get("role") != "user":
        raise message.wrong("role", "'user' (the system prompt comes from the recipe)")
    parts = message.fields.get("content")
    if not isinstance(parts, list):
        return message.text("content")
    if not parts or not all(isinstance(part, Mapping) for part in parts):
        raise message.wrong("content", "a text or a list of parts with a type")
    texts = [_part(Row(f"{message.where}: content[{n}]", part)) for n, part in enumerate(parts)]
    return Row(message.where, {"content": "".join(texts)}).text("content")


def _part(part: Row) -> str:
    text = part.fields.get("text")
    if part.fields.get("type") == "text" and isinstance(text, str):
        return text
    if part.fields.get("type") != "image":
        raise part.wrong("type", "'text' with a text, or 'image'")
    held = [key for key, value in part.fields.items() if key != "type" and value]
    if held:
        raise part.wrong(held[0], "nothing: the pictures of a row stand in its field 'image'")
    return IMAGE_PLACEHOLDER


def _strip_placeholders(content: str) -> str:
    text = content.strip()
    while text.startswith(IMAGE_PLACEHOLDER):
        text = text.removeprefix(IMAGE_PLACEHOLDER).lstrip()
    while text.endswith(IMAGE_PLACEHOLDER):
        text = text.removesuffix(IMAGE_PLACEHOLDER).rstrip()
    return text
