"""Similarity matrices of token sets, exact and fast.

Sets become rows of bits over the vocabulary of the keys at hand, 64 tokens to a word, so an
intersection is one AND and one population count. Counts are integers, so the quotients are the
correctly rounded ones: the same floats as Python's `len(a & b) / len(a | b)`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Rows = Callable[[int, int], Floats]
"""rows(lo, hi) -> [hi - lo, n]"""

_WORD = 64


def bit_rows(keys: Sequence[frozenset[str]]) -> npt.NDArray[np.uint64]:
    """[len(keys), words] membership bits over the union of the sets."""
    bit = {token: 1 << i for i, token in enumerate(frozenset().union(*keys))}
    # The bits of a set are distinct, so their sum is their union.
    masks = [sum(map(bit.__getitem__, key)) for key in keys]
    if len(bit) <= _WORD:
        return np.array(masks, dtype=np.uint64).reshape(-1, 1)
    num_words = -(-len(bit) // _WORD)
    packed = b"".join([mask.to_bytes(8 * num_words, "little") for mask in masks])
    return np.frombuffer(packed, dtype="<u8").astype(np.uint64, copy=False).reshape(-1, num_words)


def set_space(
    keys: Sequence[frozenset[str]], references: int, *, measure: Literal["jaccard", "dice"]
) -> Rows:
    """Jaccard index |A and B| / |A or B|, or Dice 2 |A and B| / (|A| + |B|)."""
    bits = bit_rows(keys)
    size = np.array([len(key) for key in keys], dtype=np.int64)

    def rows(low: int, high: int) -> Floats:
        total = size[low:high, None] + size[None, :references]
        common = np.bitwise_count(bits[low:high, None, 0] & bits[None, :references, 0])
        common = common.astype(np.int64)
        for word in range(1, bits.shape[1]):
            common += np.bitwise_count(bits[low:high, None, word] & bits[None, :references, word])
        result: Floats
        result = common / (total - common) if measure == "jaccard" else 2 * common / total
        return result

    return rows


def tfidf_space(keys: Sequence[frozenset[str]], references: int) -> Rows:
    """Cosine of TF-IDF vectors; idf = 1 + ln((1 + n) / (1 + df)) over the n keys at hand."""
    frequency = Counter(token for key in keys for token in key)
    weight = {t: 1.0 + math.log((1 + len(keys)) / (1 + df)) for t, df in frequency.items()}
    column = {token: i for i, token in enumerate(sorted(weight))}
    dense = np.zeros((len(keys), len(column)))
    for i, key in enumerate(keys):
        for token in key:
            dense[i, column[token]] = weight[token]
    dense /= np.sqrt((dense**2).sum(axis=1, keepdims=True))
    identity = {key: i for i, key in enumerate(keys)}
    canonical = np.array([identity[key] for key in keys])

    def rows(low: int, high: int) -> Floats:
        cosine: Floats = np.clip(dense[low:high] @ dense[:references].T, 0.0, 1.0)
        # Rounding leaves the cosine of equal vectors beside 1; equal sets are the same action.
        equal = canonical[low:high, None] == canonical[None, :references]
        return np.where(equal, 1.0, cosine)

    return rows
