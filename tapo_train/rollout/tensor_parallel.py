"""One engine over several ranks: the first of them plays, the others mirror its engine.

    rank 0 of the group   episodes, tools ─ submit, abort, step ─┐ broadcast before each step
    the other ranks       follow: submit, abort, step ◀──────────┘

vLLM's tensor parallelism wants every rank to add the same requests in the same order and
to step together. Tools run on the leader alone, so nothing a clock decides differs between
ranks. Each rank keeps its own tasks and gets its own groups back, so whoever plays needs
not know that the engine is shared, and the learner's ranks have as much to train as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from tapo_train.errors import EngineError
from tapo_train.rollout.engine import Completion, Engine, GenerationRequest
from tapo_train.types import Group, Image, Task

if TYPE_CHECKING:
    import torch


class RankGroup(Protocol):
    """What ranks that share an engine tell each other; every rank takes part in each call."""

    @property
    def index(self) -> int:
        """This rank's place in the group; 0 is the leader, which plays."""
        ...

    def broadcast(self, value: Any) -> Any:
        """The leader's value, on every rank."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks by rank, on every rank."""
        ...


class Player(Protocol):
    """Plays tasks: one group of `rollouts` trajectories for each, in order."""

    def __call__(
        self, tasks: Sequence[Task], *, rollouts: int, greedy: bool, policy_version: int
    ) -> list[Group]:
        """See the class."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MirroredStep:
    """What the leader does to its engine before a step; without a step, the end."""

    commands: tuple[GenerationRequest | tuple[str, ...], ...] = ()
    """In order: requests to submit, ids to abort."""
    steps: bool = True
    failure: str = ""
    """Why the leader stopped in the middle; "" if it did not."""


class MirroredEngine:
    """The `Engine` protocol over an engine that every rank of a group has a part of.

    `score`, `load_weights` and `close` are called by all ranks; `submit`, `step` and
    `abort` by the leader inside `leading`, while the others are inside `follow`.
    """

    def __init__(self, engine: Engine, ranks: RankGroup) -> None:
        self._engine = engine
        self.ranks = ranks
        self._commands: list[GenerationRequest | tuple[str, ...]] = []

    @contextmanager
    def leading(self) -> Iterator[None]:
        """On the leader: whatever happens inside, the others are told when it is over."""
        failure = "the leader's rollout broke off"
        try:
            yield
            failure = ""
        finally:
            last = MirroredStep(commands=tuple(self._commands), steps=False, failure=failure)
            self._commands = []
            self.ranks.broadcast(last)

    def follow(self) -> None:
        """On the others: do what the leader does until it is done.

        Raises:
            EngineError: the leader failed.
        """
        while True:
            told: MirroredStep = self.ranks.broadcast(None)
            for command in told.commands:
                if isinstance(command, GenerationRequest):
                    self._engine.submit(command)
                else:
                    self._engine.abort(command)
            if told.failure:
                raise EngineError(f"tensor parallelism: {told.failure}; its message says why")
            if not told.steps:
                return
            self._engine.step()

    def submit(self, request: GenerationRequest) -> None:
        """See `Engine.submit`. A refused request is refused here and never mirrored."""
        self._engine.submit(request)
        self._commands.append(request)

    def step(self) -> list[Completion]:
        """See `Engine.step`."""
        self.ranks.broadcast(MirroredStep(commands=tuple(self._commands)))
        self._commands = []
        return self._engine.step()

    def has_unfinished(self) -> bool:
        """See `Engine.has_unfinished`."""
        return self._engine.has_unfinished()

    def idle_s(self) -> float:
        """See `Engine.idle_s`."""
        return self._engine.idle_s()

    def capacity_tokens(self) -> int | None:
        """See `Engine.capacity_tokens`."""
        return self._engine.capacity_tokens()

    def abort(self, ids: Sequence[str]) -> None:
        """See `Engine.abort`."""
        self._engine.abort(ids)
        self._commands.append(tuple(ids))

    def score(
        self, tokens: npt.NDArray[np.int32], images: Sequence[Image]
    ) -> npt.NDArray[np.float32]:
        """See `Engine.score`. On all ranks, with the same arguments."""
        return self._engine.score(tokens, images)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """See `Engine.load_weights`. On all ranks; each keeps its part of every tensor."""
        self._engine.load_weights(weights, version=version)

    def close(self) -> None:
        """See `Engine.close`. On all ranks."""
        self._engine.close()


class GroupPlay:
    """Plays the tasks of all ranks of a group on its leader; each rank gets its groups back."""

    def __init__(self, play: Player, engine: MirroredEngine) -> None:
        self._play = play
        self._engine = engine

    def __call__(
        self, tasks: Sequence[Task], *, rollouts: int, greedy: bool, policy_version: int
    ) -> list[Group]:
        """This rank's groups, in the order of its tasks; called by all ranks together."""
        ranks = self._engine.ranks
        shares: list[list[Task]] = ranks.gather(list(tasks))
        played: list[list[Group]] | None = None
        if ranks.index == 0:
            everything = [task for share in shares for task in share]
            with self._engine.leading():
                groups = self._play(
                    everything, rollouts=rollouts, greedy=greedy, policy_version=policy_version
                )
            remaining = iter(groups)
            played = [[next(remaining) for _ in share] for share in shares]
        else:
            self._engine.follow()
        own: list[Group] = ranks.broadcast(played)[ranks.index]
        return own
