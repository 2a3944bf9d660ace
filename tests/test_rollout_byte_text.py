"""Decoding tokens, and finding the tokens that wrote a piece of text."""

from __future__ import annotations

from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tapo_train.errors import RolloutError
from tapo_train.rollout.byte_text import ByteText
from tapo_train.rollout.chat import ChatFormat
from tapo_train.types import Span

TEXT = st.lists(
    st.sampled_from(["<tool_call>", "</tool_call>", "é", "🙂", "漢字", " Velor", "\n"])
    | st.text(max_size=6),
    max_size=10,
).map("".join)


@pytest.fixture(scope="module")
def chat(tiny_qwen3_vl: Path) -> ChatFormat:
    return ChatFormat(tiny_qwen3_vl)


@given(text=TEXT)
@settings(max_examples=200, deadline=None)
def test_a_tokenised_text_is_decoded_to_itself(chat: ChatFormat, text: str) -> None:
    assume(text.isprintable() or text.isascii())
    tokens = chat.assistant(text)[:-1]
    assert chat.decode(tokens).text == normalize("NFC", text)


@given(text=TEXT, data=st.data())
@settings(max_examples=300, deadline=None)
def test_the_token_span_of_characters_covers_them_and_no_more(
    chat: ChatFormat, text: str, data: st.DataObject
) -> None:
    tokens = chat.assistant(text)[:-1]
    decoded = chat.decode(tokens)
    assume(decoded.text)
    start = data.draw(st.integers(0, len(decoded.text) - 1))
    end = data.draw(st.integers(start + 1, len(decoded.text)))
    span = decoded.token_span(start, end)
    # An independent way back: the number of bytes decoded before and after a token.
    sizes = [len(chat.decode(tokens[:count]).text.encode()) for count in range(len(tokens) + 1)]
    first, last = len(decoded.text[:start].encode()), len(decoded.text[:end].encode())
    if all(chat.decode(tokens[k : k + 1]).text.count("\ufffd") == 0 for k in range(len(tokens))):
        assert sizes[span.start] <= first < sizes[span.start + 1]
        assert sizes[span.end - 1] < last <= sizes[span.end]
    assert decoded.text[start:end] in chat.decode(tokens[span.start : span.end]).text


def test_a_call_after_characters_cut_across_tokens_is_found(chat: ChatFormat) -> None:
    head = chat.assistant("🙂🙂 é漢")[:-1]
    call = chat.assistant("<tool_call>{}</tool_call>")[:-1]
    assert len(head) > len("🙂🙂 é漢"), "the picture must be cut across tokens for this test"
    decoded = chat.decode(np.concatenate([head, call]))
    start = decoded.text.index("<tool_call>")
    span = decoded.token_span(start, len(decoded.text))
    assert span == Span(start=len(head), end=len(head) + len(call))


def test_every_invalid_byte_is_one_replacement_character(chat: ChatFormat) -> None:
    smile = chat.assistant("🙂")[:-1]
    assert len(smile) == 4, "one token per byte"
    broken = np.concatenate([smile[:3], chat.assistant("a<answer>")[:-1], smile[2:]])
    decoded = chat.decode(broken)
    assert decoded.text == "\ufffd\ufffd\ufffda<answer>\ufffd\ufffd"
    assert decoded.token_span(3, 4).start == 3
    assert decoded.text.encode()  # can be written to a file


def test_a_range_outside_the_text_is_refused(chat: ChatFormat) -> None:
    decoded = chat.decode(chat.assistant("abc")[:-1])
    for start, end in ((0, 4), (1, 1), (-1, 2)):
        with pytest.raises(RolloutError, match="of a text of 3"):
            decoded.token_span(start, end)


def test_an_id_without_text_is_refused(chat: ChatFormat) -> None:
    with pytest.raises(RolloutError, match="token id 1279 has no text"):
        chat.decode(np.array([1279], dtype=np.int32))


def test_a_tokenizer_that_is_not_byte_level_is_refused(tiny_qwen3_vl: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3_vl)
    tokenizer.backend_tokenizer.decoder = None
    with pytest.raises(RolloutError, match="wanted a ByteLevel one"):
        ByteText(tokenizer)
