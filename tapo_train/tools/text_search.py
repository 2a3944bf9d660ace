"""text_search_tool: BM25 over a local corpus (bm25s)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import bm25s
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from tapo_train.errors import DataError
from tapo_train.tools.base import ToolContext
from tapo_train.tools.index_file import digest_of, index_lines
from tapo_train.tools.page_text import numbered
from tapo_train.types import Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """One entry of a corpus file."""

    id: str
    title: str
    text: str

    def shown(self) -> str:
        """As the policy reads it."""
        return f"{self.title}: {self.text}" if self.title else self.text


class CorpusIndex:
    """BM25 (Lucene variant, k1 1.5, b 0.75) over passages, in memory."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        if not passages:
            raise DataError("text corpus: no passages; wanted at least one")
        self._passages = tuple(passages)
        self.digest = digest_of(text for item in passages for text in (item.title, item.text))
        self._bm25 = bm25s.BM25(method="lucene")
        texts = [f"{passage.title} {passage.text}" for passage in passages]
        tokens = _tokenise(texts)
        if not any(tokens):
            raise DataError("text corpus: no words to index beside stop words")
        self._bm25.index(tokens, show_progress=False)

    @classmethod
    def load(cls, path: Path) -> CorpusIndex:
        """Read `corpus.jsonl`: one {"id", "title", "text"} per line."""
        lines = index_lines(path, "text corpus")
        return cls([_passage(line, where=where) for where, line in lines])

    def search(self, query: str, *, top_k: int) -> list[Passage]:
        """The best `top_k` passages with a positive score; ties go to the earlier passage."""
        known = [word for word in _tokenise([query])[0] if word in self._bm25.vocab_dict]
        if not known:
            return []
        scores = self._bm25.get_scores(known)
        best = np.argsort(-scores, kind="stable")[:top_k]
        return [self._passages[index] for index in best if scores[index] > 0]


class TextSearchArguments(BaseModel):
    """Arguments of text_search_tool."""

    model_config = ConfigDict(extra="ignore")

    query: Annotated[str, Field(description="what to look for")]

    @field_validator("query")
    @classmethod
    def _not_blank(cls, query: str) -> str:
        if not query.strip():
            raise ValueError("must not be empty")
        return query


class TextSearchTool:
    """Search the corpus; the best passages come back numbered, best first."""

    name = "text_search_tool"
    description = "Search the text corpus."
    reads: frozenset[str] = frozenset()
    arguments_model: type[BaseModel] = TextSearchArguments

    def __init__(self, index: CorpusIndex, *, top_k: int = 3, max_chars: int = 8192) -> None:
        self._index = index
        self._top_k = top_k
        self._max_chars = max_chars
        self.version = f"2 corpus={index.digest} top_k={top_k} max_chars={max_chars}"

    async def run(self, arguments: TextSearchArguments, context: ToolContext) -> Observation:
        """Numbered passages, or a sentence that says there are none."""
        # In a thread: on a large corpus the engine would wait for it otherwise.
        passages = await asyncio.to_thread(self._index.search, arguments.query, top_k=self._top_k)
        if not passages:
            return Observation(text="No results were found.")
        shown = [passage.shown() for passage in passages]
        return Observation(text=numbered(shown, max_chars=self._max_chars))


def _tokenise(texts: list[str]) -> list[list[str]]:
    tokens: list[list[str]] = bm25s.tokenize(
        texts, stopwords="en", return_ids=False, show_progress=False
    )
    return tokens


def _passage(line: str, *, where: str) -> Passage:
    try:
        row = json.loads(line)
        title, text = row.get("title", ""), row["text"]
        if not isinstance(title, str) or not isinstance(text, str):
            raise TypeError("title and text must be strings")
        return Passage(id=str(row.get("id", where)), title=title, text=text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{where}: {type(error).__name__}: {error}; wanted {{"id", "title", "text"}}'
        ) from error
