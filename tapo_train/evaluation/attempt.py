"""What is kept of one attempt at a question: numbers and names, no text of the question.

Rules beside the reward's parts, for every attempt without a judge:

* supported: an observation holds the answer's words one after the other (VistaArena's validation by
  evidence; an answer that is right and supported was found, not guessed);
* completeness: share of an accepted answer's words that the answer has, best of the accepted;
* faithfulness: share of the answer's words that the question or an observation has.

The last two are named as in LocalSearchBench, whose judge forms are the reward templates `complete`
and `faithful`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tapo_train.data.rows import Row
from tapo_train.errors import OutageError
from tapo_train.rewards.matching import normalise
from tapo_train.rewards.official import metric_of, official_score
from tapo_train.rewards.penalties import is_supported, observed_texts
from tapo_train.rollout.failures import failures_of
from tapo_train.types import JsonObject, Outcome, ToolCall, Trajectory

__all__ = ["EMPTY", "SEARCHES", "Attempt", "attempt_of", "read_attempt", "require_enough"]

SEARCHES = ("text_search_tool", "image_search_tool")
EMPTY = ("No results were found.", "No matching images were found.")
"""What a search says that found nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt; of one that failed outside the policy only `failed` counts."""

    benchmark: str
    task: str
    repeat: int
    """0-based."""
    failed: str = ""
    """Why it says nothing about the policy; "" if it does."""
    unscored: bool = False
    """Whether that is because it ended and its reward failed."""
    source: str = ""
    """Data set of the question."""
    accuracy: float | None = None
    """The reward's part of that name, in [0, 1]."""
    official: float | None = None
    """By the rule of the benchmark's paper; None where that is a judge's."""
    metric: str = ""
    """Name of that rule."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Of the reward, without weights."""
    attempted: bool = False
    """Whether there is an answer."""
    supported: bool = False
    completeness: float = 0.0
    faithfulness: float = 0.0
    split: str = ""
    """The data set's, where it has some (InfoSeek)."""
    hops: str = ""
    """Searches the question needs, where the data set says it."""
    turns: int = 0
    tokens: int = 0
    """Sampled."""
    calls: Mapping[str, int] = field(default_factory=dict)
    """Executed, by tool."""
    searches: int = 0
    answered: int = 0
    """Searches that were answered at all."""
    empty: int = 0
    """Of these with nothing found."""
    cost: float = 0.0
    """Of the calls at their list price, whether a recording answered or not."""


def attempt_of(
    trajectory: Trajectory, *, benchmark: str, repeat: int, prices: Mapping[str, float]
) -> Attempt:
    """What counts of a scored trajectory.

    Args:
        prices: of a call, by tool.
    """
    task = trajectory.task
    if trajectory.failed_outside_policy:
        return Attempt(
            benchmark=benchmark,
            task=task.id,
            repeat=repeat,
            failed=_reason(trajectory),
            unscored=trajectory.unscored is not None,
            source=task.source,
        )
    reward = trajectory.scored()
    made = [call for turn in trajectory.turns for call in turn.calls if call.executed]
    calls = Counter(call.name for call in made)
    searches = [call for call in made if call.name in SEARCHES]
    return Attempt(
        benchmark=benchmark,
        task=task.id,
        repeat=repeat,
        source=task.source,
        accuracy=reward.accuracy,
        official=official_score(task, trajectory.answer),
        metric=metric_of(task),
        parts=dict(reward.parts),
        attempted=bool((trajectory.answer or "").strip()),
        supported=is_supported(trajectory),
        completeness=_completeness(trajectory),
        faithfulness=_faithfulness(trajectory),
        split=str(task.metadata.get("data_split", "")),
        hops=str(task.metadata.get("hops", "")),
        turns=len(trajectory.turns),
        tokens=sum(len(turn.span) for turn in trajectory.turns),
        calls=dict(sorted(calls.items())),
        searches=len(searches),
        answered=sum(call.outcome is Outcome.OK for call in searches),
        empty=sum(map(_is_empty, searches)),
        cost=sum(prices.get(tool, 0.0) * number for tool, number in calls.items()),
    )


def require_enough(
    attempts: Sequence[Attempt], *, max_failed_fraction: float, min_scored: float
) -> None:
    """Refuse to make anything of attempts, however few, that an outage broke.

    Raises:
        OutageError: more than the share failed outside the policy, or all of them, or fewer than
            `min_scored` of those that ended have a reward.
    """
    failed = [attempt.failed for attempt in attempts if attempt.failed]
    said = max(set(failed), key=failed.count) if failed else "there are none"
    if len(failed) > max_failed_fraction * len(attempts) or len(failed) == len(attempts):
        raise OutageError(
            f"{len(failed)} of {len(attempts)} attempts failed outside the policy, most often: "
            f"{said}; at most rollout.max_failed_fraction = {max_failed_fraction:g} of them may. "
            "The same command asks them again"
        )
    unscored = sum(attempt.unscored for attempt in attempts)
    ended = len(attempts) - len(failed) + unscored
    if ended - unscored < min_scored * ended:
        raise OutageError(
            f"{unscored} of {ended} attempts that ended got no reward, most often: {said}; "
            f"reward.min_scored = {min_scored:g} of them must. The same command asks them again"
        )


def _reason(trajectory: Trajectory) -> str:
    said = failures_of([trajectory]).messages.most_common(1)
    return f"{said[0][0][0]}: {said[0][0][1]}" if said else str(trajectory.stop)


def _is_empty(call: ToolCall) -> bool:
    return call.observation is not None and call.observation.text in EMPTY


def _words(text: str) -> list[str]:
    return normalise(text).split()


def _completeness(trajectory: Trajectory) -> float:
    said = set(_words(trajectory.answer or ""))
    wanted = [set(_words(answer)) for answer in trajectory.task.answers]
    return max((len(said & words) / len(words) for words in wanted if words), default=0.0)


def _faithfulness(trajectory: Trajectory) -> float:
    said = _words(trajectory.answer or "")
    seen = set(_words(" ".join([trajectory.task.question, *observed_texts(trajectory.turns)])))
    return sum(word in seen for word in said) / len(said) if said else 0.0


def as_json(attempt: Attempt) -> JsonObject:
    """The attempt as a line."""
    return asdict(attempt)


def read_attempt(row: Row) -> Attempt:
    """The attempt of a line; DataError if it is none."""
    names = {item.name for item in fields(Attempt)}
    for name in ("benchmark", "task", "failed"):
        if not isinstance(row.fields.get(name), str):
            raise row.wrong(name, "a text: a line that eval wrote")
    unknown = set(row.fields) - names
    if unknown:
        raise row.wrong(sorted(unknown)[0], "a line that this version of eval wrote")
    values: dict[str, Any] = dict(row.fields)
    return Attempt(**values)
