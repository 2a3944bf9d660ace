"""VSRM (arXiv 2508.10293): a step of a thought earns the change of correctness that it makes.

    reward:
      process: [{path: tapo_train.systems.vsrm:StepGains, arguments: {samples: 4}}]
    algo:
      advantage: {kind: returns_to_go, gamma: 1.0}

A thought is cut before words such as "Wait"; after each step it is cut short, closed, and the
policy answers. With c_k the share of right answers after step k and c_0 = 0, step k earns
c_k - c_(k-1): what is thought after the answer is known earns nothing, and less than the rest.
Steps become turns of their own, so that advantages by turn tell them apart.

It costs `samples` short answers for every step but the last, whose correctness is the attempt's.
The look-ahead (`decay`, `window`) is our reading of the paper's propagated decay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.engine import GenerationRequest
from tapo_train.rollout.parse import parse_turn
from tapo_train.training.process import PolicyAccess, earning
from tapo_train.types import Span, Trajectory, Turn, VersionSpan

__all__ = ["StepGains", "cut_into_steps", "gains"]

_THOUGHT_ENDS = re.compile("</think>|</thinking>|<answer>|<tool_call>")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepGains:
    """weight * (c_k - c_(k-1)) for step k."""

    weight: float = 1.0
    markers: tuple[str, ...] = ("However", "Therefore", "So", "But", "Wait")
    """A step begins at each of these words."""
    least_tokens: int = 1
    """[tokens] of a step; shorter ones belong to the one before."""
    samples: int = 1
    """Answers tried after each step."""
    temperature: float = 0.0
    """Of these answers; 0: the most probable one, of which one sample is enough."""
    answer_tokens: int = 32
    """[tokens] of an answer, at most."""
    closing: str = "</think><answer>"
    """What is written after a thought that is cut short."""
    direct: str = "<answer>"
    """The same where a turn would begin."""
    decay: float = 0.0
    """A step that changes nothing earns decay^q of the next change, q steps later; 0: nothing."""
    window: int = 0
    """[steps] as far as that looks ahead."""

    def __call__(
        self, trajectories: Sequence[Trajectory], policy: PolicyAccess
    ) -> list[Trajectory]:
        """The trajectories in steps with their rewards; left out where an answer was not judged."""
        chat = policy.chat
        cut = [
            t if t.failed_outside_policy else cut_into_steps(t, self._cuts(t, chat), chat)
            for t in trajectories
        ]
        requests = [list(self._requests(t, policy)) for t in cut]
        said = iter(policy.sample([request for own in requests for request in own]))
        tried = [
            self._answered(t, request, chat.decode(next(said).tokens).text)
            for t, own in zip(cut, requests, strict=True)
            for request in own
        ]
        right = iter(policy.accuracies(tried))
        return [
            self._rewarded(t, [next(right) for _ in own])
            for t, own in zip(cut, requests, strict=True)
        ]

    def _cuts(self, trajectory: Trajectory, chat: ChatFormat) -> list[list[int]]:
        """Of each turn, positions in the trajectory's tokens at which a step begins."""
        words = re.compile(rf"\b(?:{'|'.join(map(re.escape, self.markers))})\b")
        found = []
        for turn in trajectory.turns:
            tokens = trajectory.tokens[turn.span.start : turn.span.end]
            decoded = chat.decode(tokens)
            ending = _THOUGHT_ENDS.search(decoded.text)
            thought = decoded.text[: ending.start()] if ending else decoded.text
            cuts = [turn.span.start]
            for word in words.finditer(thought):
                begins = turn.span.start + decoded.token_span(word.start(), word.end()).start
                if begins - cuts[-1] >= self.least_tokens:
                    cuts.append(begins)
            found.append(cuts[1:])
        return found

    def _requests(
        self, trajectory: Trajectory, policy: PolicyAccess
    ) -> Iterator[GenerationRequest]:
        """An answer after each step but the last, `samples` times."""
        if trajectory.failed_outside_policy:
            return
        sampling = replace(policy.sampling, temperature=self.temperature)
        for turn, following in pairwise(trajectory.turns):
            observed = turn.observation_span
            end = observed.end if observed else turn.span.end
            closed = policy.chat.assistant(self.direct if observed else self.closing)[:-1]
            for sample in range(self.samples):
                yield GenerationRequest(
                    id=f"{trajectory.id}~{turn.index}.{sample}",
                    tokens=np.concatenate([trajectory.tokens[:end], closed]),
                    images=trajectory.images[: following.num_images_before],
                    max_tokens=self.answer_tokens,
                    sampling=sampling,
                )

    def _answered(
        self, trajectory: Trajectory, request: GenerationRequest, said: str
    ) -> Trajectory:
        """The attempt with another answer, not judged yet."""
        answer = parse_turn(f"<answer>{said}").answer
        return replace(trajectory, id=request.id, answer=answer, reward=None)

    def _rewarded(self, trajectory: Trajectory, found: Sequence[float | None]) -> Trajectory:
        if trajectory.failed_outside_policy:
            return trajectory
        known = [value for value in found if value is not None]
        if len(known) < len(found):
            return replace(trajectory, unscored="step_not_judged")
        shares = np.array(known).reshape(-1, self.samples).mean(axis=1).tolist()
        steps = gains([*shares, trajectory.scored().accuracy], decay=self.decay, window=self.window)
        return earning(trajectory, [self.weight * step for step in steps], part="step_gain")


def gains(correct: Sequence[float], *, decay: float = 0.0, window: int = 0) -> list[float]:
    """[steps] changes of the correctness [steps], which is 0 before the first.

    A change of 0 becomes decay^q of the next other one, if that is q <= window steps later.
    """
    changes = [after - before for before, after in pairwise([0.0, *correct])]
    found = []
    for step, change in enumerate(changes):
        ahead = enumerate(changes[step : step + window + 1])
        q, next_change = next(((q, value) for q, value in ahead if value), (0, change))
        found.append(next_change * decay**q if q else change)
    return found


def cut_into_steps(
    trajectory: Trajectory, cuts: Sequence[Sequence[int]], chat: ChatFormat
) -> Trajectory:
    """The same tokens with more turns: those of a turn's steps, its calls in the last of them.

    Args:
        cuts: of each turn, ascending positions strictly inside its span.
    """
    turns: list[Turn] = []
    rewards: list[float] = []
    reward = trajectory.reward
    for turn, inner in zip(trajectory.turns, cuts, strict=True):
        for start, end in pairwise([turn.span.start, *inner, turn.span.end]):
            is_last = end == turn.span.end
            step = replace(
                turn,
                index=len(turns),
                span=Span(start=start, end=end),
                calls=turn.calls if is_last else (),
                observation_span=turn.observation_span if is_last else None,
                versions=tuple(_versions(turn, start, end)),
            )
            if inner:
                step = replace(step, text=_text(trajectory, step, chat))
            turns.append(step)
            earned = reward.turns[turn.index] if reward and reward.turns and is_last else 0.0
            rewards.append(earned)
    if reward and reward.turns:
        reward = replace(reward, turns=tuple(rewards))
    return replace(trajectory, turns=tuple(turns), reward=reward)


def _text(trajectory: Trajectory, step: Turn, chat: ChatFormat) -> str:
    tokens = trajectory.tokens[step.span.start : step.span.end]
    return chat.decode(tokens[:-1] if tokens[-1] == chat.end_token_id else tokens).text


def _versions(turn: Turn, start: int, end: int) -> Iterator[VersionSpan]:
    """Which weights sampled [start, end) of the trajectory's tokens, counted from start."""
    for part in turn.versions:
        first = max(part.start + turn.span.start, start)
        last = min(part.end + turn.span.start, end)
        if first < last:
            yield VersionSpan(start=first - start, end=last - start, version=part.version)
