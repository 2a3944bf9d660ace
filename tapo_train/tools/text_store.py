"""Passages on a database server, for corpora that outgrow one machine.

The server holds what `index build` would write to a folder, and ranks by BM25 and by vectors; the
analyser and the weighing of both are those of the embedded index, here. A text goes there as its
terms with blanks between them, so that no server's own analyser (which may not know Thai, or
another version of English) decides what is a word: a term that is not ASCII is spelled in hex.

A collection is written once, from its first passage to its last, and refused until it is whole.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from tapo_train.errors import DataError, ToolDownError
from tapo_train.tools.corpus import Passage
from tapo_train.tools.corpus_index import TIES, words_asked, words_held
from tapo_train.tools.dense_index import DEPTH, fused
from tapo_train.tools.embedders import Embedder
from tapo_train.tools.index_file import TextDigest

__all__ = ["Hits", "StoreIndex", "StoredPassage", "TextStore", "upload"]

FORMAT = 1
_TOGETHER = 256
"""Passages that are sent at a time."""

Hits = list[tuple[int, float]]
"""Numbers of passages and their scores, best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPassage:
    """A row of a collection."""

    number: int
    """Place in the corpus, from 0."""
    words: str
    """Terms it is found by, with blanks between them."""
    passage: str
    """Id, title and text as a JSON list."""
    vector: Sequence[float] | None = None


class TextStore(Protocol):
    """A collection on a server; every method asks it and raises `ToolDownError` if it is down."""

    def exists(self) -> bool:
        """Whether there is a collection of this name."""

    def create(self, *, dimension: int) -> None:
        """A new collection; `dimension` 0: without vectors."""

    def add(self, rows: Sequence[StoredPassage]) -> None:
        """Write rows."""

    def finish(self, manifest: str) -> None:
        """Say that it is whole, and of what."""

    def manifest(self) -> str | None:
        """What `finish` said; None if it did not."""

    def by_words(self, words: str, *, limit: int) -> Hits:
        """The best by BM25."""

    def by_vector(self, vector: Sequence[float], *, limit: int) -> Hits:
        """The nearest by the cosine; scores may be a linear function of it."""

    def passages(self, numbers: Sequence[int]) -> Mapping[int, str]:
        """What is kept of these rows."""

    def close(self) -> None:
        """Close the connections."""


def terms(words: Iterable[str]) -> str:
    """Words as every server's simplest analyser keeps them."""
    return " ".join(word if word.isascii() else f"u{word.encode().hex()}" for word in words)


async def upload(
    store: TextStore, passages: Iterable[Passage], *, embedder: Embedder | None = None
) -> tuple[int, str]:
    """Write a collection; how many passages it has, and their digest, that of an embedded index.

    Raises:
        DataError: there is a collection of this name, or no passage.
        ToolDownError: the server is down, or refuses.
    """
    if store.exists():
        raise DataError("text store: found a collection of this name; wanted a new name")
    left, count, digest = iter(passages), 0, TextDigest()
    while batch := list(islice(left, _TOGETHER)):
        vectors = await _embedded(embedder, batch)
        if not count:
            store.create(dimension=len(vectors[0] or ()))
        numbered = zip(range(count, count + len(batch)), batch, vectors, strict=True)
        store.add([_row(*row) for row in numbered])
        for passage in batch:
            digest.add(passage.title)
            digest.add(passage.text)
        count += len(batch)
    if not count:
        raise DataError("text store: no passages; wanted at least one")
    version = embedder.version if embedder is not None else None
    manifest = {"format": FORMAT, "passages": count, "digest": digest.hex(), "embedder": version}
    store.finish(json.dumps(manifest))
    return count, digest.hex()


async def _embedded(
    embedder: Embedder | None, batch: Sequence[Passage]
) -> Sequence[Sequence[float] | None]:
    if embedder is None:
        return [None] * len(batch)
    texts = [passage.shown() for passage in batch]
    vectors: list[list[float]] = (await embedder.embed(texts, is_query=False)).tolist()
    return vectors


def _row(number: int, passage: Passage, vector: Sequence[float] | None) -> StoredPassage:
    # Escaped to ASCII: half a surrogate pair has no UTF-8.
    kept = json.dumps([passage.id, passage.title, passage.text])
    return StoredPassage(
        number=number, words=terms(words_held(passage)), passage=kept, vector=vector
    )


class StoreIndex:
    """A collection as a `TextIndex`.

    Args:
        name: engine and collection, for versions and messages.
        store: None answers nothing, for a strict replay.
        wanted: digest of the passages; "" takes what is there.
        embedder: what made the collection's vectors; None: words alone.
        weights: of the scores of vectors and of words.

    Raises:
        DataError: the collection is not whole, or of other passages or vectors.
        ToolDownError: the server is down.
    """

    def __init__(
        self,
        name: str,
        store: TextStore | None,
        *,
        wanted: str = "",
        embedder: Embedder | None = None,
        weights: tuple[float, float] = (1.0, 0.5),
    ) -> None:
        self._name, self._store, self._embedder, self._weights = name, store, embedder, weights
        found = wanted if store is None else _opened(name, store, wanted, embedder)
        self.digest = f"{found} in={name}"
        if embedder is not None:
            self.digest += f" dense={embedder.version} weights={weights[0]:g}:{weights[1]:g}"

    async def found(self, query: str, *, top_k: int) -> list[Passage]:
        """The best passages.

        Raises:
            ToolDownError: the server or the embedder's endpoint is down, or answers nonsense.
        """
        if self._store is None:
            raise ToolDownError("tools.replay=replay forbids the network", retryable=False)
        vector: Sequence[float] | None = None
        if self._embedder is not None:
            vector = (await self._embedder.embed([query], is_query=True))[0].tolist()
        return await asyncio.to_thread(self._found, self._store, query, vector, top_k)

    def _found(
        self, store: TextStore, query: str, vector: Sequence[float] | None, top_k: int
    ) -> list[Passage]:
        words, depth = terms(words_asked(query)), top_k + TIES if vector is None else DEPTH
        told = store.by_words(words, limit=depth) if words else []
        if vector is None:
            # As the embedded index has it: equal scores come in the order of the corpus.
            numbers = [n for n, _ in sorted(told, key=lambda hit: (-round(hit[1], 4), hit[0]))]
        else:
            near = store.by_vector(vector, limit=depth)
            numbers = fused([near, told], self._weights)
        best = numbers[:top_k]
        held = store.passages(best) if best else {}
        return [_passage(self._name, held.get(number)) for number in best]

    async def close(self) -> None:
        """Close the connections."""
        if self._store is not None:
            await asyncio.to_thread(self._store.close)
        if self._embedder is not None:
            await self._embedder.close()


def _opened(name: str, store: TextStore, wanted: str, embedder: Embedder | None) -> str:
    """Digest of a collection that is whole, and what was wanted."""
    text = store.manifest() if store.exists() else None
    if text is None:
        raise DataError(
            f"text store {name}: found no whole collection of this name; wanted one that `python "
            "-m tapo_train index upload` has finished"
        )
    manifest = _json(name, text, dict)
    found, made_by = str(manifest.get("digest")), manifest.get("embedder")
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"text store {name}: found format {manifest.get('format')!r}, wanted {FORMAT}"
        )
    if wanted and found != wanted:
        raise DataError(f"text store {name}: found passages of digest {found}, wanted {wanted}")
    if embedder is not None and made_by != embedder.version:
        raise DataError(
            f"text store {name}: found vectors of {made_by}, wanted those of {embedder.version}"
        )
    return found


def _passage(name: str, kept: str | None) -> Passage:
    fields = _json(name, kept or "null", list)
    if len(fields) != 3 or not all(isinstance(field, str) for field in fields):
        raise ToolDownError(f"{name}: its passage has another form", retryable=False)
    return Passage(id=fields[0], title=fields[1], text=fields[2])


def _json(name: str, text: str, kind: type[Any]) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ToolDownError(f"{name}: its answer is not JSON ({error})", retryable=False) from error
    if not isinstance(value, kind):
        raise ToolDownError(f"{name}: its answer has another form", retryable=False)
    return value
