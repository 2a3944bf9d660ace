"""Vectors of an index's passages beside its words, and both searched together.

    dense.faiss   a vector a passage, in the order of the corpus
    dense.json    which embedder made them, and of what

Scores of either search are brought to 0…1 among its DEPTH best, weighed and added; what one of
them did not find counts 0 there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from tapo_train.errors import DataError
from tapo_train.tools.corpus import Passage, read_passages
from tapo_train.tools.corpus_index import CorpusIndex, Part, parts_of
from tapo_train.tools.embedders import Embedder
from tapo_train.tools.index_file import TextDigest
from tapo_train.tools.vector_index import load_beside, writing_beside

__all__ = ["HybridIndex", "embed_index", "fused"]

NAME = "dense"
DEPTH = 50
"""Passages of each search that are weighed against each other."""
_TOGETHER = 256
"""Passages that are embedded at a time."""


class HybridIndex:
    """Words and meaning.

    Args:
        dense_weight, words_weight: of the two scores.

    Raises:
        DataError: the folder has no vectors, or they are another embedder's or another corpus'.
    """

    def __init__(
        self,
        folder: Path,
        embedder: Embedder,
        *,
        dense_weight: float = 1.0,
        words_weight: float = 0.5,
    ) -> None:
        self._corpus = CorpusIndex.load(folder)
        self._vectors = load_beside(
            folder,
            NAME,
            made_by=embedder.version,
            of=[part.digest for part in parts_of(folder)],
            entries=(len(self._corpus), "passages"),
            wanted=f"python -m tapo_train index embed {folder} CORPUS…",
        )
        self._embedder = embedder
        self._weights = (dense_weight, words_weight)
        weights = f"{dense_weight:g}:{words_weight:g}"
        self.digest = f"{self._corpus.digest} dense={embedder.version} weights={weights}"

    async def found(self, query: str, *, top_k: int) -> list[Passage]:
        """The best passages.

        Raises:
            ToolDownError: the embedder's endpoint is down.
        """
        vector = await self._embedder.embed([query], is_query=True)
        return await asyncio.to_thread(self._found, query, vector, top_k)

    def _found(self, query: str, vector: np.ndarray, top_k: int) -> list[Passage]:
        scores, rows = self._vectors.search(vector, DEPTH)
        near = [(int(row), float(s)) for row, s in zip(rows[0], scores[0], strict=True) if row >= 0]
        told = self._corpus.numbered(query, top_k=DEPTH)
        best = fused([near, told], self._weights)[:top_k]
        return [self._corpus.passage(number) for number in best]

    async def close(self) -> None:
        """Close the embedder."""
        await self._embedder.close()


def fused(found: Sequence[Sequence[tuple[int, float]]], weights: Sequence[float]) -> list[int]:
    """Numbers by the weighted sum of scores, each search's brought to 0…1; ties by number."""
    sums: dict[int, float] = {}
    for hits, weight in zip(found, weights, strict=True):
        scores = [score for _, score in hits]
        low, span = min(scores, default=0.0), max(scores, default=0.0) - min(scores, default=0.0)
        for number, score in hits:
            share = (score - low) / span if span > 0 else 1.0
            sums[number] = sums.get(number, 0.0) + weight * share
    return sorted(sums, key=lambda number: (-round(sums[number], 6), number))


async def embed_index(folder: Path, sources: Sequence[Path], embedder: Embedder) -> int:
    """Write the vectors of an index; its sources are read again, in the order they came into it.

    Raises:
        DataError: they are not what the index was made of.
        ToolDownError: the embedder's endpoint is down.
    """
    parts = parts_of(folder)
    passages = _checked(read_passages(sources), parts, folder)
    digests = [part.digest for part in parts]
    with writing_beside(folder, NAME, made_by=embedder.version, of=digests) as add:
        while batch := [passage.shown() for passage in islice(passages, _TOGETHER)]:
            add(await embedder.embed(batch, is_query=False))
    return sum(part.passages for part in parts)


def _checked(passages: Iterable[Passage], parts: Sequence[Part], folder: Path) -> Iterator[Passage]:
    """The passages, if they are those of the parts."""
    left = iter(passages)
    for part in parts:
        digest = TextDigest()
        for passage in islice(left, part.passages):
            digest.add(passage.title)
            digest.add(passage.text)
            yield passage
        if digest.hex() != part.digest:
            raise DataError(f"text index {folder}: found other passages than {part.source} gave it")
    if next(left, None) is not None:
        raise DataError(f"text index {folder}: found more passages than it has")
