"""The determinism audit: does the same request bring the same information?

Credit transfer assumes that equal parameters mean equal information. The audit compares the
observation of every corrected call with those of its matched cluster. It changes no advantage
(unless `require_observation_agreement` makes it a gate) and needs only what rows already hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from tapo_train.credit.actions import Actions, Calls
from tapo_train.credit.matching import Floats, Matches
from tapo_train.credit.steps import CreditCall, CreditRow
from tapo_train.credit.text import jaccard, token_set_of
from tapo_train.types import ImageRef

EQUIVALENT = 0.9
"""Token Jaccard from which two observation texts say the same."""

Answer = tuple[str, tuple[ImageRef, ...]]
"""What a tool answered: text and pictures."""


def answer_of(call: CreditCall) -> Answer | None:
    """The recorded observation of a call; None if it was not recorded."""
    return None if call.observation is None else (call.observation, call.observation_images)


class Audit:
    """Compares observations of one batch; every comparison is made once."""

    def __init__(self, rows: Sequence[CreditRow], actions: Actions, matches: Matches) -> None:
        self._rows = rows
        self._actions = actions
        self._matches = matches
        # Token sets of long texts are large; neighbours in a batch are of the same question.
        self._tokens = lru_cache(maxsize=1024)(token_set_of)
        self._answers: dict[int, Counter[Answer]] = {}
        self._news: dict[int, bool] = {}

    def agreement(self, query: int) -> tuple[int, int]:
        """(agreeing, comparable) pairs of a failing call with the members of its cluster."""
        answer = answer_of(self._call(self._actions.queries, query))
        if answer is None:
            return 0, 0
        members = self._cluster_answers(int(self._matches.cluster[query]))
        agreeing = sum(n for other, n in members.items() if self.equivalent(answer, other))
        return agreeing, members.total()

    def turn_gaps(self, queries: Sequence[int]) -> Floats:
        """|turn of the failing step - mean turn of the matched members| [turns], per query."""
        actions = self._actions
        clusters = self._matches.cluster[queries].tolist()
        means = {c: self._mean_turn(c) for c in set(clusters)}
        turns = [actions.queries.turn[query] for query in queries]
        return np.abs(np.array(turns, dtype=np.float64) - [means[c] for c in clusters])

    def recorded(self, queries: Sequence[int]) -> list[int]:
        """The queries whose observation is known."""
        calls = self._actions.queries
        return [query for query in queries if self._call(calls, query).observation is not None]

    def is_stale(self, query: int) -> bool:
        """A repeat for the failing trajectory that was news to a successful one."""
        if self._is_news(self._actions.queries, query):
            return False
        cluster = int(self._matches.cluster[query])
        if cluster not in self._news:
            library, members = self._actions.library, self._matches.clusters[cluster].members
            recorded = [i for i in members if self._call(library, i).observation is not None]
            self._news[cluster] = any(self._is_news(library, i) for i in recorded)
        return self._news[cluster]

    def equivalent(self, left: Answer, right: Answer) -> bool:
        """Equal pictures, and texts of at least 0.9 token Jaccard."""
        if left == right:
            return True
        if left[1] != right[1]:
            return False
        return jaccard(self._tokens(left[0]), self._tokens(right[0])) >= EQUIVALENT

    def _is_news(self, calls: Calls, i: int) -> bool:
        """Whether no earlier step of the trajectory had brought an equivalent observation."""
        answer = answer_of(self._call(calls, i))
        if answer is None:
            return True
        earlier = self._rows[calls.row[i]].steps[: calls.step[i]]
        old = (answer_of(call) for step in earlier for call in step.calls)
        return not any(other is not None and self.equivalent(answer, other) for other in old)

    def _cluster_answers(self, cluster: int) -> Counter[Answer]:
        if cluster not in self._answers:
            members = self._matches.clusters[cluster].members
            found = (answer_of(self._call(self._actions.library, i)) for i in members)
            self._answers[cluster] = Counter(answer for answer in found if answer is not None)
        return self._answers[cluster]

    def _mean_turn(self, cluster: int) -> float:
        members = self._matches.clusters[cluster].members
        turn = self._actions.library.turn
        return sum([turn[i] for i in members]) / len(members)

    def _call(self, calls: Calls, i: int) -> CreditCall:
        return self._rows[calls.row[i]].steps[calls.step[i]].calls[calls.call[i]]
