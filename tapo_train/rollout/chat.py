"""Messages ↔ tokens: the only door to the processor.

Three kinds of text meet in a conversation, and each is tokenised by its own rule:

- the template and the system prompt are ours: control tokens are control tokens;
- questions, tool texts and everything else from outside are plain: `<|im_end|>`,
  `<tool_call>` or `<|image_pad|>` in them become ordinary characters;
- sampled turns are never tokenised at all, only decoded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import tokenizers
import torch
from jinja2 import TemplateError
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from tapo_train.errors import AlignmentError, RolloutError
from tapo_train.families.family import NO_ID
from tapo_train.rollout.byte_text import ByteText, DecodedText
from tapo_train.rollout.dialects import DIALECTS, ReadCall, read_xml
from tapo_train.rollout.model_folder import family_in
from tapo_train.rollout.parse import ParsedTurn, parse_turn
from tapo_train.rollout.pixels import Pixels
from tapo_train.rollout.template import ChatTemplate, Message, Schema
from tapo_train.tools.images import ImageDecoder
from tapo_train.types import Image, Observation, Task

Tokens = npt.NDArray[np.int32]

PICTURE_CACHE_BYTES = 512 * 2**20
"""Where no recipe says more."""


class ChatFormat:
    """Prompts, observations and decoded turns of one model folder.

    Args:
        picture_cache_bytes: for the learner's processed pictures.
        read_call: reads what stands in a call; None: the form that the template asks for.

    Raises:
        ConfigError: the model is of no known family, or its family refuses it.
        RolloutError: the chat template fails, is not prefix-stable or asks for calls that are
            not read, or the tokenizer is not byte-level or lacks the control tokens.
    """

    def __init__(
        self,
        model: Path,
        *,
        picture_cache_bytes: int = PICTURE_CACHE_BYTES,
        read_call: ReadCall | None = None,
    ) -> None:
        self.model = model
        self.family = family_in(model)
        loader = AutoProcessor if self.family.sees else AutoTokenizer
        self._processor: Any = loader.from_pretrained(model)
        self._tokenizer: Any = self._processor.tokenizer if self.family.sees else self._processor
        self._plain = _plain_tokenizer(self._tokenizer)
        self._text = ByteText(self._tokenizer)
        self.image_processor: Any = getattr(self._processor, "image_processor", None)
        """None without pictures."""
        config = AutoConfig.from_pretrained(model)
        self.family.check(config)
        vocabulary = int(config.get_text_config().vocab_size)  # rows of the head, padding included
        self.decoder = ImageDecoder()
        """Decodes every picture of this process, for policy and tools."""
        pictures = self.family.picture_ids(config)
        self.merge_size = pictures.merge_size if pictures else 1
        """Patches per side that become one token."""
        self._pixels = Pixels(
            self.family,
            self.image_processor,
            self.decoder,
            merge_size=self.merge_size,
            cache_bytes=picture_cache_bytes,
        )
        self._cut_template(read_call)
        self._number_tokens(vocabulary)

    def _cut_template(self, read_call: ReadCall | None) -> None:
        """The template's pieces, their tokens, and the form of calls."""
        ends = (self.family.end,) if self.family.end else self._special_texts()
        self.template = ChatTemplate(self._render, ends=ends, placeholder=self.family.placeholder)
        self._read_call = read_call or self._dialect()
        self.reads_texts = self._read_call is read_xml
        """Whether arguments are read as texts, whatever they mean to the tool."""
        pieces = self.template.pieces
        self._before, self._between = self._trusted(pieces.before), self._trusted(pieces.between)
        self._after = self._trusted(pieces.after)
        self.picture_tokens = self._trusted(pieces.picture)
        """[T] one picture, not expanded, with what stands around it."""

    def _number_tokens(self, vocabulary: int) -> None:
        """Ids of the tokens that mean something, and of those that are never sampled."""
        placeholder = self.family.placeholder
        self.end_token_id = self._control_id(self.template.pieces.end)
        self.image_token_id = NO_ID if placeholder is None else self._control_id(placeholder)
        self.banned_token_ids = self._banned(vocabulary)
        """Ids at -inf in the sampled distribution: see `Family.banned`, and ids without a text."""
        self.sampled_ids = np.setdiff1d(np.arange(vocabulary), self.banned_token_ids)
        self.control_token_ids = tuple(sorted(self._tokenizer.added_tokens_decoder))
        """Ids that no text from outside may become, special to the tokenizer or not."""
        self._is_control = np.zeros(self.control_token_ids[-1] + 1, dtype=bool)
        self._is_control[list(self.control_token_ids)] = True

    def prompt(self, task: Task, *, system_prompt: str, tool_schemas: Sequence[Schema]) -> Tokens:
        """[T] system prompt with tools, the task's pictures and question; placeholders expanded.

        Raises:
            RolloutError: the system prompt or a schema holds a control token.
        """
        self._refuse_control_tokens(system_prompt + json.dumps(tool_schemas, ensure_ascii=False))
        head, tail = self.template.prompt(system_prompt, tool_schemas, len(task.images))
        parts = (self._trusted(head), self.plain(task.question), self._trusted(tail))
        return self.expand(np.concatenate(parts), task.images)

    def observation(self, observations: Sequence[Observation]) -> Tokens:
        """[T] what is appended after a turn that ended in the end token.

        Wraps each tool answer (text, then its pictures), closes the message and opens
        the next assistant turn; placeholders expanded.
        """
        parts = [self._before]
        for index, observation in enumerate(observations):
            parts += [self._between] if index else []
            parts.append(self.plain(observation.text))
            parts += [self.picture_tokens] * len(observation.images)
        images = tuple(image for observation in observations for image in observation.images)
        return self.expand(np.concatenate([*parts, self._after]), images)

    def assistant(self, text: str) -> Tokens:
        """[L] a demonstration turn as the policy would sample it, the end token included.

        Tags such as `<tool_call>` are single tokens where the tokenizer has them;
        special tokens in `text` stay plain.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return np.array([*ids, self.end_token_id], dtype=np.int32)

    def plain(self, text: str) -> Tokens:
        """[L] text from outside: no control token, whatever it says."""
        # A lone surrogate has no UTF-8 form and would be refused by the tokenizer.
        readable = text.encode(errors="replace").decode()
        ids = np.array(self._plain.encode(readable, add_special_tokens=False).ids, dtype=np.int32)
        if self._is_control[ids[ids < len(self._is_control)]].any():
            raise RolloutError(f"text from outside became a control token: {readable[:80]!r}")
        return ids

    def decode(self, tokens: Tokens) -> DecodedText:
        """Text of [L] ids with the way back from characters to tokens."""
        return self._text.decode(tokens)

    def read(self, text: str) -> ParsedTurn:
        """The calls and the answer of a turn, in the model's dialect; offsets are in `text`."""
        opening = self.template.opening
        parsed = parse_turn(opening + text, self._read_call)
        shift = len(opening)
        calls = tuple(
            replace(call, start=max(0, call.start - shift), end=call.end - shift)
            for call in parsed.calls
        )
        return replace(parsed, said=parsed.said[shift:], calls=calls)

    def image_tokens(self, image: Image) -> int:
        """Number of placeholders of a picture."""
        return self._pixels.num_tokens(image)

    def expand(self, tokens: Tokens, images: Sequence[Image]) -> Tokens:
        """Repeat the i-th placeholder once per feature of the i-th picture.

        Raises:
            AlignmentError: the numbers of placeholders and pictures differ.
        """
        is_placeholder = tokens == self.image_token_id
        found = int(is_placeholder.sum())
        if found != len(images):
            raise AlignmentError(f"{found} image placeholders for {len(images)} images")
        repeats = np.ones(len(tokens), dtype=np.int64)
        repeats[is_placeholder] = [self.image_tokens(image) for image in images]
        return np.repeat(tokens, repeats)

    def collapse(self, tokens: Tokens) -> list[int]:
        """One placeholder per picture: the inverse of `expand`."""
        is_placeholder = tokens == self.image_token_id
        repeated = np.zeros(len(tokens), dtype=bool)
        repeated[1:] = is_placeholder[1:] & is_placeholder[:-1]
        collapsed: list[int] = tokens[~repeated].tolist()
        return collapsed

    def rgb(self, image: Image) -> PIL.Image.Image:
        """The decoded picture, as every engine and the learner see it."""
        return self._pixels.rgb(image)

    def pixels(self, images: Sequence[Image]) -> dict[str, torch.Tensor]:
        """`pixel_values` [sum of patches, D], `image_grid_thw` [N, 3]; {} without pictures."""
        return self._pixels.process(images)

    def save_processor(self, out: Path) -> None:
        """Write tokenizer, chat template and image processor beside exported weights."""
        self._processor.save_pretrained(out)

    def _render(self, messages: list[Message], schemas: Sequence[Schema]) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tools=list(schemas) or None,
                chat_template=self._processor.chat_template or self._tokenizer.chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise RolloutError(
                f"{self.model}: the chat template fails on a conversation of {roles}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if self.family.placeholder is not None:
            text = text.replace(
                self.family.placeholder, self.family.placeholder.join(self.family.around)
            )
        return text

    def _trusted(self, text: str) -> Tokens:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)

    def _control_id(self, token: str) -> int:
        for index, added in self._tokenizer.added_tokens_decoder.items():
            if str(added) == token:
                return int(index)
        raise RolloutError(
            f"{self.model}: the tokenizer has no {token}; wanted one of {self.family.name}"
        )

    def _dialect(self) -> ReadCall:
        if self.template.dialect is None:
            raise RolloutError(
                f"{self.model}: chat template: it asks for calls in a form that is not known; "
                f"wanted one of {', '.join(DIALECTS)}, or model.call_reader"
            )
        return DIALECTS[self.template.dialect]

    def _special_texts(self) -> tuple[str, ...]:
        added = self._tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in added if token.special)

    def _banned(self, vocabulary: int) -> tuple[int, ...]:
        added = self._tokenizer.added_tokens_decoder.items()
        banned = self.family.banned
        if banned is None:
            banned = tuple(t for t in self._special_texts() if t != self.template.pieces.end)
        named = {int(index) for index, token in added if str(token) in banned}
        nameless = {index for index in range(vocabulary) if index not in self._text}
        return tuple(sorted(named | nameless))

    def _refuse_control_tokens(self, text: str) -> None:
        for token in self._tokenizer.added_tokens_decoder.values():
            if token.special and token.content in text:
                raise RolloutError(f"system prompt or tool schema holds the control token {token}")


def _plain_tokenizer(tokenizer: Any) -> tokenizers.Tokenizer:
    """The same byte-pair model without any added token to look for.

    `split_special_tokens` alone is not enough: Qwen's `<tool_call>` and `</think>` are
    added tokens that are not special.
    """
    backend = tokenizer.backend_tokenizer
    plain = tokenizers.Tokenizer(backend.model)
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    plain.pre_tokenizer = backend.pre_tokenizer
    return plain
