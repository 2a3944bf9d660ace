"""What a trainer works with: the seams of a run as protocols, and its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tapo_train.algos.aggregation import Aggregation
from tapo_train.algos.turn_advantages import Advantages, RewardRow
from tapo_train.credit.assigners import CreditAssigner
from tapo_train.data.sampler import TaskSampler
from tapo_train.learner.balance import RowExchange
from tapo_train.learner.nonfinite import NonFiniteGuard
from tapo_train.learner.objective import Objective
from tapo_train.learner.policy import Policy
from tapo_train.learner.reference import Reference
from tapo_train.report.dumps import TrajectoryDump
from tapo_train.report.warnings import Watch
from tapo_train.rollout.engine import Engine
from tapo_train.training.audit import RolloutAudit
from tapo_train.training.colocation import DeviceSharing
from tapo_train.training.interruption import Interruption
from tapo_train.training.probe import Probe
from tapo_train.training.watchdog import Watchdog
from tapo_train.types import Group, Task


class Play(Protocol):
    """Plays tasks with the engine's present weights."""

    def __call__(
        self, tasks: Sequence[Task], *, rollouts: int, greedy: bool, policy_version: int
    ) -> list[Group]:
        """One group of `rollouts` scored trajectories per task, in order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rolled:
    """This rank's part of a step's rollout."""

    groups: list[Group]
    """What is trained; scored."""
    questions: list[int]
    """Position of each group's question in the step's global batch."""
    replaced: list[Group] = field(default_factory=list)
    """Groups that were played and scored, but whose places others took: counted, not trained."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The same on all ranks."""


class Stateful(Protocol):
    """A part whose state a resumed run needs."""

    def state_dict(self) -> Mapping[str, Any]:
        """The state of this rank, as JSON can hold it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. With another number of ranks it is that of rank % former ranks."""
        ...


class Rounds(Stateful, Protocol):
    """Has a step's questions played."""

    def __call__(self, step: int) -> Rolled:
        """Called by all ranks together, at every step once."""
        ...

    def close(self) -> None:
        """Drop what is under way; the run ends."""
        ...


class ProcessFunction(Protocol):
    """What stands between rollout and advantage."""

    def __call__(self, groups: Sequence[Group]) -> tuple[list[Group], Mapping[str, float]]:
        """This rank's groups, changed, and metrics that are the same on all ranks."""
        ...


class AdvantageFunction(Protocol):
    """Rewards of the rows of all ranks to advantages."""

    def __call__(self, rows: Sequence[RewardRow]) -> Advantages:
        """An advantage per row or per turn; rows left out get 0."""
        ...


class Checkpoints(Protocol):
    """Where a run can be taken up again."""

    def save(self, step: int, state: Mapping[str, Any], score: float | None) -> None:
        """Keep policy, optimizer, random states and `state` as of the end of `step`.

        Args:
            score: validation accuracy after the step, if it was measured.
        """
        ...

    @property
    def has_failed(self) -> bool:
        """Whether a checkpoint could not be written; the next call raises the reason."""
        ...

    def wait(self) -> None:
        """Until every checkpoint is written."""
        ...

    def load_latest(self) -> Mapping[str, Any] | None:
        """Restore the newest checkpoint; its `state`, or None if there is none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Numbers of the loop."""

    steps: int
    questions_per_step: int
    """Over all ranks."""
    rollouts_per_question: int
    updates_per_batch: int
    epochs: int
    skip_idle_rows: bool
    """Rows with advantages of 0 have no gradient: count them, and spare their passes."""
    recompute_old_logprobs: bool
    drop_uniform_groups: bool
    aggregation: Aggregation
    norm_length: float
    save_every: int
    """[steps] 0: only at the end."""
    eval_every: int
    """[steps] 0: never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a trainer works with; rank 0 alone has sinks that write."""

    tasks: Sequence[Task]
    validation: Sequence[Task]
    order: TaskSampler
    engine: Engine
    sharing: DeviceSharing
    play: Play
    rounds: Rounds
    audit: RolloutAudit
    process: ProcessFunction
    advantage: AdvantageFunction
    credit: CreditAssigner
    exchange: RowExchange
    policy: Policy
    reference: Reference
    objective: Objective
    nonfinite: NonFiniteGuard
    checkpoints: Checkpoints
    stateful: Mapping[str, Stateful]
    """By name: what a checkpoint keeps besides the policy, `order` and `rounds`."""
    watch: Watch
    watchdog: Watchdog
    interruption: Interruption
    dump: TrajectoryDump
    probe: Probe
