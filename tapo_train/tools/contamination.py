"""Results that give the benchmark away: pages with the question and its answer, or its hosts.

A live search finds copies of the benchmark itself. An agent that is rewarded for reading
them learns to look for the answer sheet.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tapo_train.types import Task

__all__ = ["Contamination"]

_WORDS = re.compile(r"\w+")


@dataclass(slots=True, kw_only=True)
class Contamination:
    """What of a search's results the policy must not see.

    Args:
        hosts: results from these hosts and all below them are left out.
        answers: leave out what holds the task's question together with an accepted answer,
            as words in a row, whatever their case and punctuation.
    """

    hosts: frozenset[str] = frozenset()
    answers: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    """Results seen, and how many were kept back for their host or their content."""

    @property
    def version(self) -> str:
        """For the tool's: other results pass when this changes."""
        return f"hosts={','.join(sorted(self.hosts))} answers={self.answers}"

    @property
    def reads(self) -> frozenset[str]:
        """Of the conversation, for replay keys."""
        return frozenset({"task"}) if self.answers else frozenset()

    def admits(self, task: Task, *, url: str, text: str) -> bool:
        """Whether the policy may see a result; counts it."""
        self.counts["results"] += 1
        if self.hosts and _is_below(_host(url), self.hosts):
            self.counts["kept_back_host"] += 1
            return False
        if self.answers and _gives_away(task, text):
            self.counts["kept_back_answer"] += 1
            return False
        return True


def _gives_away(task: Task, text: str) -> bool:
    words = _folded(text)
    question = _folded(task.question)
    answers = [folded for answer in task.answers if (folded := _folded(answer)).strip()]
    if not question.strip() or question not in words:
        return False
    # The answer may be part of the question; it gives something away beside it.
    rest = words.replace(question, " ")
    return any(answer in rest for answer in answers)


def _folded(text: str) -> str:
    """Lower-case words with single blanks around each."""
    return f" {' '.join(_WORDS.findall(text.casefold()))} "


def _host(url: str) -> str:
    try:
        return (urlsplit(url.strip()).hostname or "").rstrip(".")
    except ValueError:  # brackets that hold no address
        return ""


def _is_below(host: str, hosts: Iterable[str]) -> bool:
    return any(host == blocked or host.endswith(f".{blocked}") for blocked in hosts)
