"""Rules about how a trajectory went: its length, its calls, what its answer rests on.

Penalties are 0 or negative. Those of calls say which turn earned them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal, get_args

from tapo_train.errors import ConfigError
from tapo_train.rewards.matching import normalise
from tapo_train.rewards.score import Score
from tapo_train.types import Outcome, ToolCall, Trajectory, Turn

__all__ = ["CallCount", "call_penalty", "is_supported", "observed_texts", "overlong"]

CallCount = Literal["executed", "failed", "repeated"]


def overlong(num_tokens: int, *, longest: int, buffer: int) -> float:
    """DAPO's soft punishment of length (2503.14476, eq. 13), in [-1, 0].

        0                                   up to longest - buffer tokens
        (longest - buffer - n) / buffer     within the buffer
        -1                                  beyond longest

    Raises:
        ConfigError: the buffer is not in [1, longest].
    """
    if not 1 <= buffer <= longest:
        raise ConfigError(f"overlong: buffer is {buffer} of {longest}; wanted 1 to {longest}")
    return max(-1.0, min(0.0, (longest - buffer - num_tokens) / buffer))


def sampled_tokens(trajectory: Trajectory) -> int:
    """Tokens that the policy wrote."""
    return sum(len(turn.span) for turn in trajectory.turns)


def call_penalty(trajectory: Trajectory, *, count: CallCount, free: int = 0) -> Score:
    """Minus one for each call of a kind, at its turn; the first `free` ones cost nothing.

    executed: that was run; failed: that was unreadable or wrong (the policy's error); repeated:
    readable, with the tool and arguments of an earlier one.

    Raises:
        ConfigError: unknown kind.
    """
    if count not in get_args(CallCount):
        raise ConfigError(f"call_penalty: count is {count!r}; wanted one of {get_args(CallCount)}")
    seen: set[str] = set()
    left, turns = free, []
    for turn in trajectory.turns:
        num = sum(_counts(call, count, seen) for call in turn.calls)
        turns.append(-float(max(0, num - left)))
        left = max(0, left - num)
    return Score(value=sum(turns), turns=tuple(turns))


def _counts(call: ToolCall, count: CallCount, seen: set[str]) -> bool:
    if count == "executed":
        return call.executed
    if count == "failed":
        return call.outcome is Outcome.MODEL_ERROR
    asked = json.dumps([call.name, call.arguments], sort_keys=True, default=repr)
    is_repeated = call.valid and asked in seen
    seen.add(asked)
    return is_repeated


def observed_texts(turns: Sequence[Turn]) -> list[str]:
    """What the tools answered, in order; what they said no to is left out."""
    found = [call.observation for turn in turns for call in turn.calls]
    return [seen.text for seen in found if seen is not None and seen.outcome is Outcome.OK]


def is_supported(trajectory: Trajectory) -> bool:
    """Whether some observation holds the answer's normalised words, one after the other."""
    form = normalise(trajectory.answer or "")
    texts = (normalise(text) for text in observed_texts(trajectory.turns))
    return bool(form) and any(f" {form} " in f" {text} " for text in texts)
