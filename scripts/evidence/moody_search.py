"""A search whose answer depends on what it was asked before: equal calls, unequal answers.

Every third call of the process finds nothing, whatever it asks for. Transfer assumes that equal
arguments bring equal information; here a failing attempt's call may have brought none.
"""

from __future__ import annotations

from pathlib import Path

from tapo_train.tools.base import ToolContext
from tapo_train.tools.text_search import CorpusIndex, TextSearchArguments, TextSearchTool
from tapo_train.types import Observation

corpus = Path()
"""Set before a recipe that names `moody_search:MoodySearch` is built."""


class MoodySearch(TextSearchTool):
    """`text_search_tool` with moods."""

    def __init__(self) -> None:
        super().__init__(CorpusIndex.load(corpus), top_k=2)
        self._calls = 0

    async def run(self, arguments: TextSearchArguments, context: ToolContext) -> Observation:
        """As the plain search, or nothing."""
        self._calls += 1
        if self._calls % 3 == 0:
            return Observation(text="No results were found.")
        return await super().run(arguments, context)
