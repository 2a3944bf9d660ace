"""A byte-level BPE tokenizer with Qwen's special tokens and one token per name syllable.

Merges are learned here, not with a library trainer, because the order matters:
syllables come first, so that a made-up name is always cut at its syllables and
copying an unseen name is copying known tokens. English merges come after, and a
merge that would join two syllables is never made.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MARKER_TOKENS: tuple[str, ...] = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
"""Added but not special, as in Qwen3's tokenizer."""

_PATTERN = (
    r"[\"\]]?[,{ ]*\"[a-z_0-9]+\": ?[\[{\"]?"
    r"|[a-z]+(?:_[a-z0-9]+)+|,? ?\p{N}{1,4}"
    r"|(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's pre-tokenisation after three additions that keep tool calls short: a JSON key with
the punctuation around it, an identifier with underscores, and a number with its comma."""

Word = tuple[str, ...]


def build_tokenizer(
    texts: Iterable[str], *, syllables: Iterable[str], num_merges: int
) -> PreTrainedTokenizerFast:
    """Learn the merges from `texts` (no invented names in them) and assemble the tokenizer."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    cased = [form for s in syllables for form in (s, s.capitalize())]
    merges: list[tuple[str, str]] = [(form[0], form[1]) for form in cased]
    words = Counter(tuple(piece) for text in texts for piece, _ in splitter.pre_tokenize_str(text))
    merges += learn_merges(words, merges, atoms=frozenset(cased), count=num_merges)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*alphabet, *(left + right for left, right in merges)])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in MARKER_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def learn_merges(
    words: Counter[Word], first: list[tuple[str, str]], *, atoms: frozenset[str], count: int
) -> list[tuple[str, str]]:
    """Most frequent pairs first, after applying `first`; ties in lexical order.

    No merge joins two `atoms`, or a space with a capitalised atom: those would
    give the same syllable different tokens in different places of a sentence.
    """
    for pair in first:
        words = _apply(words, pair)
    learned: list[tuple[str, str]] = []
    while len(learned) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, frequency in words.items():
            for left, right in pairwise(word):
                if right not in atoms or (left not in atoms and left not in _OPENERS):
                    pairs[left, right] += frequency
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        learned.append(best)
        words = _apply(words, best)
    return learned


_OPENERS = frozenset({"Ġ", '"', "<", "("})
"""Byte-level characters that can stand directly before a name."""


def _apply(words: Counter[Word], pair: tuple[str, str]) -> Counter[Word]:
    merged: Counter[Word] = Counter()
    for word, frequency in words.items():
        merged[_merge_word(word, pair)] += frequency
    return merged


def _merge_word(word: Word, pair: tuple[str, str]) -> Word:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return tuple(out)


def without_names(text: str, *, syllables: Iterable[str]) -> str:
    """`text` with capitalised words made of syllables removed."""
    unit = "|".join(syllables)
    return re.sub(rf"\b(?=[A-Z])(?i:(?:{unit}){{2,}})\b", "", text)
