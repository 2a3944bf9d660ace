"""One row of metrics per step, reduced over ranks; and the clock of its stages."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from tapo_train.algos.metrics import Metrics, finalise, merge
from tapo_train.credit.diagnostics import finish
from tapo_train.errors import RolloutError
from tapo_train.learner import distributed
from tapo_train.report.trajectory_metrics import combine, trajectory_sums
from tapo_train.training.colocation import begin_stage, stage_memory
from tapo_train.types import Group


@dataclass(slots=True)
class Stopwatch:
    """Wall time and memory by stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    """[s] by stage, in the order the stages began."""
    on_stage: Callable[[str], None] = lambda _: None
    """Told the name of each stage that begins."""
    memory: dict[str, float] = field(default_factory=dict)
    """[GiB] by `<stage>_<kind>`; see `colocation.stage_memory`."""

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the block to `stage`."""
        self.on_stage(stage)
        begin_stage()
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
        self.memory |= {f"{stage}_{kind}": value for kind, value in stage_memory().items()}


def step_metrics(
    groups: Sequence[Group],
    *,
    advantages: npt.NDArray[np.float64],
    credit_sums: Mapping[str, float],
    learned: Metrics,
    probe: Mapping[str, float],
    seconds: Mapping[str, float],
    memory: Mapping[str, float],
) -> dict[str, float]:
    """What a step did. Every rank calls it with its own part and gets the whole row.

    Args:
        groups: this rank's, scored, with those that others replaced.
        advantages: [N] of this rank's trajectories that were not replaced, before the credit
            stage.
        learned: (sum, count) pairs of this rank's updates.
        probe: how far this rank's engine and the learner are apart; the largest of the ranks
            is logged.
        seconds: this rank's wall time by stage; rank 0's are logged.
        memory: [GiB] of this rank by stage and kind; the largest of the ranks is logged.
    """
    own = {
        "trajectories": trajectory_sums(groups),
        "credit": dict(credit_sums),
        "abs_advantage": float(np.abs(advantages).sum()),
        "advantages": len(advantages),
        "probe": dict(probe),
        "seconds": dict(seconds),
        "memory": dict(memory),
    }
    ranks = distributed.all_gather_objects(own)
    rolled = combine([rank["trajectories"] for rank in ranks])
    count, times = rolled["rollout/trajectories"], ranks[0]["seconds"]
    if count == 0:
        raise RolloutError("the step has no trajectory on any rank")
    step_s = sum(times.values())
    slowest_s = max(rank["seconds"]["rollout"] for rank in ranks)
    sums = _added([rank["credit"] for rank in ranks])
    credit = finish(sums) if sums else {}
    return (
        rolled
        | means_over_ranks(learned)
        | credit
        | _time_of_tapo(credit, times["credit"], step_s)
        | _times(times, step_s)
        | {f"memory/{name}_gib": max(r["memory"][name] for r in ranks) for name in memory}
        | _largest([rank["probe"] for rank in ranks])
        | {
            "advantage/abs": (
                sum(rank["abs_advantage"] for rank in ranks)
                / sum(rank["advantages"] for rank in ranks)
            ),
            "time/step_s": step_s,
            "throughput/tokens_per_s": rolled["rollout/tokens"] * count / step_s,
            "throughput/sampled_tokens_per_s": (
                rolled["rollout/trained_tokens"] * count / slowest_s
            ),
            "memory/rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
    )


def _times(times: Mapping[str, float], step_s: float) -> dict[str, float]:
    return {f"time/{stage}_s": duration for stage, duration in times.items()} | {
        "wait/rollouts": times["rollout"] / step_s,
        "wait/weights": times["sync"] / step_s,
    }


def _time_of_tapo(found: Mapping[str, float], credit_s: float, step_s: float) -> dict[str, float]:
    is_tapo = any(name.startswith("tapo/") for name in found)
    return {"tapo/time_s": credit_s, "tapo/time_frac": credit_s / step_s} if is_tapo else {}


def means_over_ranks(own: Metrics) -> dict[str, float]:
    """(sum, count) pairs of all ranks to means; every rank calls it."""
    ranks = distributed.all_gather_objects({name: value.tolist() for name, value in own.items()})
    total: Metrics = {}
    for rank in ranks:
        total = merge(total, {n: torch.tensor(v, dtype=torch.float64) for n, v in rank.items()})
    return finalise(total)


def _largest(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = {name: None for rank in ranks for name in rank}
    return {name: max(rank[name] for rank in ranks if name in rank) for name in names}


def _added(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = {name: None for rank in ranks for name in rank}
    return {name: sum(rank.get(name, 0.0) for rank in ranks) for name in names}
