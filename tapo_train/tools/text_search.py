"""text_search_tool: passages of a corpus."""

from __future__ import annotations

from typing import Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tapo_train.tools.base import ToolContext
from tapo_train.tools.corpus import Passage
from tapo_train.tools.corpus_index import CorpusIndex
from tapo_train.tools.page_text import numbered
from tapo_train.types import Observation

__all__ = ["CorpusIndex", "Passage", "TextIndex", "TextSearchArguments", "TextSearchTool"]


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


class TextIndex(Protocol):
    """What finds passages: words, words and vectors, or a server that has both."""

    @property
    def digest(self) -> str:
        """Differs where the answers may."""

    async def found(self, query: str, *, top_k: int) -> list[Passage]:
        """The best passages, best first."""

    async def close(self) -> None:
        """Give back what it holds."""


class TextSearchTool:
    """Search the corpus; the best passages come back numbered, best first."""

    name = "text_search_tool"
    description = "Search the text corpus."
    reads: frozenset[str] = frozenset()
    arguments_model: type[BaseModel] = TextSearchArguments

    def __init__(self, index: TextIndex, *, top_k: int = 3, max_chars: int = 8192) -> None:
        self._index = index
        self._top_k = top_k
        self._max_chars = max_chars
        self.version = f"3 corpus={index.digest} top_k={top_k} max_chars={max_chars}"

    async def run(self, arguments: TextSearchArguments, context: ToolContext) -> Observation:
        """Numbered passages, or a sentence that says there are none."""
        passages = await self._index.found(arguments.query, top_k=self._top_k)
        if not passages:
            return Observation(text="No results were found.")
        shown = [passage.shown() for passage in passages]
        return Observation(text=numbered(shown, max_chars=self._max_chars))

    async def close(self) -> None:
        """Close the index."""
        await self._index.close()
