"""How many trajectories failed outside the policy, and when that ends the run.

A failed trajectory leaves loss and baseline, so a run whose tools are down goes on without
noticing: it learns from ever fewer trajectories. The failure budget stops it, with the words of
the tool that failed most.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tapo_train.errors import OutageError
from tapo_train.types import Outcome, StopReason, ToolCall, Trajectory

__all__ = ["FEWEST", "FailureBudget", "Failures", "failures_of"]

FEWEST = 32
"""Fewer trajectories are not judged: in a batch of four, one hiccup would be a quarter."""

REWARD = "the reward"
"""Who said why a trajectory has no reward."""

_MESSAGE_CHARS = 300
_MESSAGES = 20
"""Kept per rank; servers that put a request's number into each message make many."""

_HARMLESS = (Outcome.OK, Outcome.MODEL_ERROR, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Counts of one step; those of several ranks or steps add up."""

    trajectories: int = 0
    """Those that a deadline cut are not among them: that is slowness, which the recipe chose."""
    failed: int = 0
    """Trajectories whose tools broke or gave no answer in time."""
    unscored: int = 0
    """Trajectories that ended, and whose reward failed or was late."""
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Calls that the tools' side failed, by (tool, outcome), in any trajectory."""
    messages: Counter[tuple[str, str]] = field(default_factory=Counter)
    """What was said about the calls that ended a trajectory, by (tool, text)."""

    def __add__(self, other: Failures) -> Failures:
        return Failures(
            trajectories=self.trajectories + other.trajectories,
            failed=self.failed + other.failed,
            unscored=self.unscored + other.unscored,
            calls=self.calls + other.calls,
            messages=self.messages + other.messages,
        )

    def words(self) -> str:
        """Which calls failed, and what their tools said most often."""
        counts = ", ".join(
            f"{tool}: {count} {outcome}" for (tool, outcome), count in self.calls.most_common(8)
        )
        said = "no tool said why"
        if self.messages:
            (tool, text), count = self.messages.most_common(1)[0]
            said = f"most often ({count} times) {tool} said: {text!r}"
        return f"calls that failed: {counts or 'none'}; {said}"


def failures_of(trajectories: Sequence[Trajectory]) -> Failures:
    """Count the failures of `trajectories`."""
    failed = [trajectory for trajectory in trajectories if trajectory.stop is StopReason.INFRA]
    num_late = sum(trajectory.stop is StopReason.DEADLINE for trajectory in trajectories)
    blamed = [call for call in _calls(trajectories) if call.outcome not in _HARMLESS]
    said = Counter(
        (call.name, call.observation.text[:_MESSAGE_CHARS])
        for call in _calls(failed)
        if call.outcome not in _HARMLESS and call.observation is not None
    )
    said += Counter(
        (REWARD, trajectory.unscored[:_MESSAGE_CHARS])
        for trajectory in trajectories
        if trajectory.unscored is not None
    )
    return Failures(
        trajectories=len(trajectories) - num_late,
        failed=len(failed),
        calls=Counter((call.name, str(call.outcome)) for call in blamed),
        unscored=sum(trajectory.unscored is not None for trajectory in trajectories),
        messages=Counter(dict(said.most_common(_MESSAGES))),
    )


def _calls(trajectories: Iterable[Trajectory]) -> list[ToolCall]:
    return [call for t in trajectories for turn in t.turns for call in turn.calls]


class FailureBudget:
    """Ends a run in which too many trajectories fail outside the policy.

    Judged are the trajectories of the step; where those are fewer than `fewest`, the steps
    before it are added until there are as many. A run that is resumed begins to count anew.

    Args:
        max_fraction: largest share that is borne; 1 bears everything.
        min_scored: least share of the trajectories that ended which must have a reward.
        fewest: trajectories that are judged.
    """

    def __init__(
        self, max_fraction: float, *, min_scored: float = 0.0, fewest: int = FEWEST
    ) -> None:
        self._most = max_fraction
        self._min_scored = min_scored
        self._fewest = fewest
        self._steps: deque[Failures] = deque()

    def anew(self) -> FailureBudget:
        """One of the same share that has seen nothing."""
        return FailureBudget(self._most, min_scored=self._min_scored, fewest=self._fewest)

    def check(self, step: Failures) -> None:
        """Count a step of all ranks.

        Raises:
            OutageError: more than the share failed, or fewer have a reward; quotes the most
                frequent message.
        """
        self._steps.append(step)
        while self._held(skip=1) >= self._fewest:
            self._steps.popleft()
        seen = sum(self._steps, start=Failures())
        if seen.trajectories >= self._fewest and seen.failed > self._most * seen.trajectories:
            raise OutageError(
                f"rollout.max_failed_fraction: {seen.failed} of the last {seen.trajectories} "
                f"trajectories failed outside the policy, wanted at most {self._most:g} of them; "
                f"{seen.words()}"
            )
        ended = seen.trajectories - seen.failed
        if seen.trajectories >= self._fewest and ended - seen.unscored < self._min_scored * ended:
            raise OutageError(
                f"reward.min_scored: {seen.unscored} of the last {ended} trajectories that ended "
                f"got no reward, wanted one for {self._min_scored:g} of them; {seen.words()}"
            )

    def _held(self, *, skip: int) -> int:
        return sum(step.trajectories for step in list(self._steps)[skip:])
