"""How long a trajectory may become, in tokens, turns and seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tapo_train.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When a trajectory has to end."""

    max_turns: int = 10
    """Most assistant turns."""
    max_turn_tokens: int = 1024
    """Most sampled tokens of one turn, the end token included."""
    max_tokens: int = 16384
    """Most tokens of the whole trajectory: prompt, turns and observations."""
    max_parallel_calls: int = 1
    """Most tool calls run per turn."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ConfigError(f"limits.{name} is {getattr(self, name)}; wanted >= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """When a trajectory is late [s]; infinity is never."""

    turn_s: float = math.inf
    """For one turn: waiting for the engine, sampling, and its tools."""
    trajectory_s: float = math.inf
    """From the first request of a trajectory to its end."""
    step_s: float = math.inf
    """For all attempts at a question, from its beginning; those that have not begun included."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ConfigError(f"deadlines.{name} is {getattr(self, name)}; wanted > 0")


NEVER = Deadlines()
