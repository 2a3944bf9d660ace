"""A playground of several search tools over one world, as in LocalSearchBench and VistaHop.

    tools.extra:
      - path: tapo_train.systems.playground:SearchTool
        arguments: {name: people_tool, description: "Find a person.", corpus: people.jsonl}
      - path: tapo_train.systems.playground:SearchTool
        arguments: {name: places_tool, description: "Find a place.", corpus: places.jsonl}

Each tool has a corpus of its own, or the part of a shared one whose titles match, so that a policy
has to learn which one knows what. Tasks are native ones; VistaHop's are of the same form.
"""

from __future__ import annotations

import re
from pathlib import Path

from tapo_train.errors import ConfigError
from tapo_train.tools.corpus import read_passages
from tapo_train.tools.text_search import CorpusIndex, TextSearchTool

__all__ = ["SearchTool"]


class SearchTool(TextSearchTool):
    """A text search under a name and a description of its own.

    Args:
        corpus: a file of passages (see docs/tools.md, "A text index").
        titles: a regular expression; only passages with such a title are found.

    Raises:
        ConfigError: no passage has such a title.
    """

    def __init__(
        self,
        name: str,
        description: str,
        corpus: str,
        titles: str = "",
        top_k: int = 3,
        max_chars: int = 8192,
    ) -> None:
        shown = re.compile(titles)
        held = [found for found in read_passages([Path(corpus)]) if shown.search(found.title)]
        if not held:
            raise ConfigError(f"{name}: no passage of {corpus} has a title like {titles!r}")
        super().__init__(CorpusIndex(held), top_k=top_k, max_chars=max_chars)
        self.name = name
        self.description = description
