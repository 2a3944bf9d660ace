"""The text of single tokens, for colouring."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tapo_train.data.rows import parse_json, read_file
from tapo_train.errors import DataError
from tapo_train.rollout.byte_text import ByteText

__all__ = ["Pieces", "find_tokenizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Backend:
    decoder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Vocabulary:
    """What `ByteText` asks of a tokenizer, read from its tokenizer.json: no library loads it."""

    backend_tokenizer: _Backend
    words: Mapping[str, int]
    added_tokens_decoder: Mapping[int, str]

    def get_vocab(self) -> Mapping[str, int]:
        """Token to id."""
        return self.words


class Pieces:
    """Token ids of a dump to the pieces of text they stand for.

    Raises:
        DataError: the file is no tokenizer.json.
        RolloutError: it is not byte-level.
    """

    def __init__(self, path: Path) -> None:
        data = parse_json(read_file(path), where=str(path))
        try:
            added = {int(item["id"]): str(item["content"]) for item in data["added_tokens"]}
            words = {str(word): int(index) for word, index in data["model"]["vocab"].items()}
            decoder = json.dumps(data["decoder"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{path}: {error!r}; wanted vocabulary, added tokens, decoder"
            ) from error
        known = _Vocabulary(
            backend_tokenizer=_Backend(decoder=decoder),
            words=words | {text: index for index, text in added.items()},
            added_tokens_decoder=added,
        )
        self._text = ByteText(known)

    def __call__(self, tokens: Sequence[int | list[int]], start: int, end: int) -> list[str]:
        """One piece per token of positions [start, end); a run of placeholders is one piece.

        A character whose bytes several tokens wrote belongs to the first of them.
        """
        ids = _cut(tokens, start, end)
        decoded = self._text.decode(np.array(ids, dtype=np.int32))
        cuts = np.searchsorted(decoded.char_starts[:-1], decoded.token_starts)
        text = decoded.text
        return [text[low:high] for low, high in itertools.pairwise(cuts)]


def _cut(tokens: Sequence[int | list[int]], start: int, end: int) -> list[int]:
    """Ids at positions [start, end), with runs [id, length] once."""
    found, at = [], 0
    for entry in tokens:
        if at >= end:
            break
        token, length = entry if isinstance(entry, list) else (entry, 1)
        if at >= start:
            found.append(token)
        at += length
    return found


def find_tokenizer(folders: Sequence[Path]) -> Path | None:
    """The tokenizer.json of the first folder that has one."""
    return next((f / "tokenizer.json" for f in folders if (f / "tokenizer.json").is_file()), None)
