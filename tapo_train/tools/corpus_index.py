"""BM25 over passages, in memory or in a folder that all ranks open at once (tantivy).

A query is never parsed: its words go through the analyser of the passages and become terms, so
nothing the policy writes is syntax. BM25 with k1 1.2 and b 0.75; lengths are kept in one byte.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tantivy

from tapo_train.errors import DataError
from tapo_train.tools.corpus import Passage, read_passages
from tapo_train.tools.index_file import TextDigest, digest_of
from tapo_train.tools.words import spread

__all__ = [
    "CorpusIndex",
    "Part",
    "add_to_index",
    "analyser",
    "build_index",
    "parts_of",
    "words_asked",
    "words_held",
]

FORMAT = 1
"""Of the folder: the fields, the analyser and the list of parts. Another one is refused."""
MANIFEST = "corpus_index.json"
MAX_QUERY_WORDS = 256
"""Different words of a query that are looked for; those after them are not."""
_WRITER_BYTES = 64_000_000
"""What a build holds before it writes a piece."""
_LONGEST_WORD_BYTES = 128
TIES = 16
"""Further hits that are looked at, so that equal scores come in the order of the corpus."""
_WORDS, _BODY, _PASSAGE, _NUMBER = "words", "body", "passage", "number"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one build or one addition brought into an index."""

    source: str
    passages: int
    digest: str


class CorpusIndex:
    """BM25 over passages."""

    def __init__(self, passages: Iterable[Passage]) -> None:
        """An index in memory."""
        index = _registered(tantivy.Index(_schema()))
        part = _written(index, passages, source="memory", parts=())
        self._serve(index, part.digest)

    @classmethod
    def load(cls, path: Path) -> CorpusIndex:
        """Open the folder of an index, or read a corpus file into memory.

        Raises:
            DataError: it is neither, or damaged.
        """
        if not path.is_dir():
            return cls(read_passages([path]))
        parts, opened = parts_of(path), cls.__new__(cls)
        digests = [part.digest for part in parts]
        opened._serve(_opened(path), digests[0] if len(digests) == 1 else digest_of(digests))
        found, wanted = len(opened), sum(part.passages for part in parts)
        if found != wanted:
            raise DataError(
                f"text index {path}: found {found} passages, wanted {wanted}: an addition is under "
                "way or was interrupted; wait for it, or build the index again"
            )
        return opened

    def _serve(self, index: tantivy.Index, digest: str) -> None:
        self.digest = digest
        self._schema = index.schema
        # One snapshot for the whole process: what is added later does not change a run.
        self._searcher = index.searcher()

    def __len__(self) -> int:
        return int(self._searcher.num_docs)

    def search(self, query: str, *, top_k: int) -> list[Passage]:
        """The best `top_k` passages that hold a word of the query; ties: the earlier one."""
        return [passage for passage, _ in self.ranked(query, top_k=top_k)]

    def ranked(self, query: str, *, top_k: int) -> list[tuple[Passage, float]]:
        """The same with their scores, greatest first."""
        hits = self._hits(query, top_k)
        return [(self._passage(address), score) for _, score, address in hits]

    def numbered(self, query: str, *, top_k: int) -> list[tuple[int, float]]:
        """Numbers of the best passages in the corpus, from 0, and their scores."""
        return [(number, score) for number, score, _ in self._hits(query, top_k)]

    def passage(self, number: int) -> Passage:
        """The passage of a number."""
        kind = tantivy.FieldType.Unsigned
        asked = tantivy.Query.range_query(self._schema, _NUMBER, kind, number, number)
        ((_, address),) = self._searcher.search(asked, limit=1, count=False).hits
        return self._passage(address)

    async def found(self, query: str, *, top_k: int) -> list[Passage]:
        """As `search`, in a thread: on a large corpus the engine would wait for it otherwise."""
        return await asyncio.to_thread(self.search, query, top_k=top_k)

    async def close(self) -> None:
        """Nothing has to be given back."""

    def _hits(self, query: str, top_k: int) -> list[tuple[int, float, tantivy.DocAddress]]:
        words = words_asked(query)
        if not words:
            return []
        terms = [tantivy.Query.term_query(self._schema, _BODY, word, "freq") for word in words]
        asked = tantivy.Query.boolean_query([(tantivy.Occur.Should, term) for term in terms])
        hits = self._searcher.search(asked, limit=top_k + TIES, count=False).hits
        numbers = self._searcher.fast_field_values(_NUMBER, [address for _, address in hits])
        found = [(int(n or 0), score, at) for (score, at), n in zip(hits, numbers, strict=True)]
        # Sums of the same float32 terms in another order differ in their last digits.
        return sorted(found, key=lambda hit: (-round(hit[1], 4), hit[0]))[:top_k]

    def _passage(self, address: tantivy.DocAddress) -> Passage:
        stored = self._searcher.doc(address).get_first(_PASSAGE)
        name, title, text = json.loads(bytes(stored or b""))
        return Passage(id=name, title=title, text=text)


def build_index(folder: Path, sources: Sequence[Path]) -> Part:
    """A new index in `folder`, which is there only once it is whole.

    Raises:
        DataError: the folder holds something, or the sources cannot be read.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"text index {folder}: found something there; wanted a new or an empty folder (to an "
            f"index that exists: python -m tapo_train index add {folder} CORPUS…)"
        )
    unfinished = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        index = _registered(tantivy.Index(_schema(), path=str(unfinished)))
        part = _written(index, read_passages(sources), source=_named(sources), parts=())
        _write_parts(unfinished, [part])
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return part


def add_to_index(folder: Path, sources: Sequence[Path]) -> Part:
    """More passages for an index; processes that have it open keep what they see.

    Raises:
        DataError: another process adds to it, or the same passages are in it already.
    """
    CorpusIndex.load(folder)  # refuses one that an interrupted addition left behind
    parts = parts_of(folder)
    part = _written(_opened(folder), read_passages(sources), source=_named(sources), parts=parts)
    _write_parts(folder, [*parts, part])
    return part


def _written(
    index: tantivy.Index, passages: Iterable[Passage], *, source: str, parts: Sequence[Part]
) -> Part:
    """Add the passages in one commit, or nothing."""
    try:
        writer = index.writer(heap_size=_WRITER_BYTES, num_threads=1)
    except ValueError as error:
        raise DataError(f"text index: cannot be written to: {str(error)[:200]}") from error
    try:
        part = _added(writer, passages, source=source, parts=parts)
        writer.commit()
    finally:
        # Ends its threads and frees the lock; what was not committed is gone.
        writer.wait_merging_threads()
    index.reload()
    return part


def _added(
    writer: tantivy.IndexWriter, passages: Iterable[Passage], *, source: str, parts: Sequence[Part]
) -> Part:
    first, count, digest = sum(part.passages for part in parts), 0, TextDigest()
    for passage in passages:
        writer.add_document(_document(passage, first + count))
        digest.add(passage.title)
        digest.add(passage.text)
        count += 1
    part = Part(source=source, passages=count, digest=digest.hex())
    if not count:
        raise DataError("text corpus: no passages; wanted at least one")
    if part.digest in {other.digest for other in parts}:
        raise DataError(f"text index: the {count} passages of {source} are in it already")
    return part


def _document(passage: Passage, number: int) -> tantivy.Document:
    document = tantivy.Document()
    document.add_text(_BODY, spread(f"{passage.title} {passage.text}"))
    # Escaped to ASCII: half a surrogate pair has no UTF-8.
    document.add_bytes(_PASSAGE, json.dumps([passage.id, passage.title, passage.text]).encode())
    document.add_unsigned(_NUMBER, number)
    return document


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    builder.add_text_field(_BODY, tokenizer_name=_WORDS, index_option="freq")
    builder.add_bytes_field(_PASSAGE, stored=True)
    builder.add_unsigned_field(_NUMBER, fast=True)
    return builder.build()


def analyser(*, is_query: bool = False) -> tantivy.TextAnalyzer:
    """Lower case without accents, English stems; stop words are found, but not looked for."""
    words = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.regex(r"[\p{L}\p{M}\p{N}]+"))
    words = words.filter(tantivy.Filter.remove_long(_LONGEST_WORD_BYTES))
    words = words.filter(tantivy.Filter.lowercase()).filter(tantivy.Filter.ascii_fold())
    if is_query:
        words = words.filter(tantivy.Filter.stopword("english"))
    return words.filter(tantivy.Filter.stemmer("english")).build()


def words_asked(query: str) -> list[str]:
    """The terms a query looks for: without English stop words, if there are others."""
    text = spread(query)
    words = _ASKED.analyze(text) or _ALL.analyze(text)
    return list(dict.fromkeys(words))[:MAX_QUERY_WORDS]


def words_held(passage: Passage) -> list[str]:
    """The terms a passage is found by, in order."""
    words: list[str] = _ALL.analyze(spread(f"{passage.title} {passage.text}"))
    return words


_ALL, _ASKED = analyser(), analyser(is_query=True)


def _registered(index: tantivy.Index) -> tantivy.Index:
    index.register_tokenizer(_WORDS, analyser())
    return index


def _opened(folder: Path) -> tantivy.Index:
    try:
        return _registered(tantivy.Index.open(str(folder)))
    except (ValueError, OSError) as error:
        raise DataError(f"text index {folder}: {str(error)[:300]}; wanted it whole") from error


def parts_of(folder: Path) -> list[Part]:
    """What came into an index, in order."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        found = manifest["format"]
        parts = [Part(**part) for part in manifest["parts"]]
    except FileNotFoundError as error:
        raise DataError(
            f"text index {folder}: found no {MANIFEST}; wanted a corpus file or an index: "
            f"python -m tapo_train index build {folder} --out DIR"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: {type(error).__name__}: {error}; wanted a whole index") from error
    if found != FORMAT:
        raise DataError(f"{path}: found format {found!r}, wanted {FORMAT}: build the index again")
    return parts


def _write_parts(folder: Path, parts: Sequence[Part]) -> None:
    text = json.dumps({"format": FORMAT, "parts": [asdict(part) for part in parts]}, indent=1)
    unfinished = folder / f"{MANIFEST}.new"
    unfinished.write_text(text)
    unfinished.replace(folder / MANIFEST)


def _named(sources: Sequence[Path]) -> str:
    return ", ".join(source.name for source in sources)
