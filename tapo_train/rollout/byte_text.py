"""Token ids → text, with the way back from characters to tokens.

A byte-level token is a string of bytes, and a character of several bytes may be cut
across tokens. The text is therefore decoded once from all bytes, and positions are
mapped through byte offsets:

    tokens      [ "a" ] [ c3 ] [ a9 "<" ] [ "tool" ]
    bytes         0       1      2   3      4..7
    characters    a       é(1..2)    <      tool
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tapo_train.errors import RolloutError
from tapo_train.types import Span

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedText:
    """A text that knows which tokens wrote which characters."""

    text: str
    """Every invalid byte is one U+FFFD."""
    char_starts: npt.NDArray[np.int64] = field(repr=False)
    """[C+1] byte offset of each character; last entry: number of bytes."""
    token_starts: npt.NDArray[np.int64] = field(repr=False)
    """[L+1] byte offset of each token; last entry: number of bytes."""

    def token_span(self, start: int, end: int) -> Span:
        """Smallest range of tokens that covers the characters [start, end).

        A token that only touches the range with one of its bytes is included.
        """
        if not 0 <= start < end < len(self.char_starts):
            limit = len(self.char_starts) - 1
            raise RolloutError(f"characters [{start}, {end}) of a text of {limit} were asked for")
        first_byte, end_byte = self.char_starts[start], self.char_starts[end]
        return Span(
            start=int(np.searchsorted(self.token_starts, first_byte, side="right")) - 1,
            end=int(np.searchsorted(self.token_starts, end_byte, side="left")),
        )


class ByteText:
    """Decodes the tokens of a byte-level tokenizer.

    Raises:
        RolloutError: the tokenizer is not byte-level.
    """

    def __init__(self, tokenizer: Any) -> None:
        if "ByteLevel" not in repr(tokenizer.backend_tokenizer.decoder):
            found = type(tokenizer).__name__
            raise RolloutError(f"tokenizer {found} does not decode bytes; wanted a ByteLevel one")
        added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        byte_of = _byte_of_symbol()
        self._bytes: dict[int, bytes] = {
            index: bytes(byte_of[symbol] for symbol in word)
            for word, index in tokenizer.get_vocab().items()
            if index not in added
        }
        self._bytes.update((index, text.encode()) for index, text in added.items())

    def __contains__(self, token: int) -> bool:
        return token in self._bytes

    def decode(self, tokens: npt.NDArray[np.int32]) -> DecodedText:
        """Decode [L] ids; raises RolloutError for an id outside the vocabulary."""
        try:
            pieces = [self._bytes[token] for token in tokens.tolist()]
        except KeyError as error:
            raise RolloutError(f"token id {error.args[0]} has no text in the tokenizer") from error
        # One lone surrogate per invalid byte keeps characters and bytes aligned ...
        text = b"".join(pieces).decode(errors="surrogateescape")
        return DecodedText(
            # ... but cannot be written to a file, so it is shown as U+FFFD, one for one.
            text=_SURROGATE.sub("\ufffd", text),
            char_starts=_char_starts(text),
            token_starts=_offsets([len(piece) for piece in pieces]),
        )


def _char_starts(text: str) -> npt.NDArray[np.int64]:
    if text.isascii():
        return np.arange(len(text) + 1)
    return _offsets([len(char.encode(errors="replace")) for char in text])


def _offsets(lengths: list[int]) -> npt.NDArray[np.int64]:
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.array(lengths, dtype=np.int64).cumsum(out=starts[1:])
    return starts


def _byte_of_symbol() -> dict[str, int]:
    """Inverse of GPT-2's table that writes every byte as a printable character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + offset): byte for offset, byte in enumerate(hidden)}
