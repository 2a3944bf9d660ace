"""What a batch of trajectories looked like, as sums that add up over ranks."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tapo_train.types import Group, Outcome, StopReason, Trajectory

__all__ = ["combine", "most_frequent_sources", "trajectory_sums"]

Sums = dict[str, tuple[float, float]]
"""name -> (sum, count); the metric is sum / count."""

MOST_SOURCES = 20
"""Data sets with metrics of their own; a file that names each row's origin has thousands."""

_UNFIT = re.compile(r"[^A-Za-z0-9_.+-]")
_BY_SOURCE = "reward/accuracy/"
_SQUARE = "reward/square"
"""Only for `reward/std`; not logged itself."""


def trajectory_sums(groups: Sequence[Group]) -> Sums:
    """Rewards, turns, calls, outcomes and stops of all trajectories of `groups`.

    Rewards are those of the trajectories that take part in the loss: a failure outside
    the policy says nothing about it. Names of tools the policy invented are not
    counted by tool, or a confused policy would make metrics without end.
    """
    held = [trajectory for group in groups for trajectory in group.trajectories]
    scored = [trajectory for trajectory in held if not trajectory.failed_outside_policy]
    sums = {
        "rollout/trajectories": (float(len(held)), 1.0),
        "rollout/failed_outside_policy": (float(len(held) - len(scored)), float(len(held))),
        "rollout/unscored": (float(sum(t.unscored is not None for t in held)), float(len(held))),
        "rollout/surplus": (float(sum(group.surplus for group in groups)), float(len(held))),
        "rollout/lost": (float(sum(len(group.lost) for group in groups)), float(len(held))),
    }
    return sums | _reward_sums(scored) | _group_sums(groups) | _shape_sums(held) | _call_sums(held)


def _reward_sums(scored: Sequence[Trajectory]) -> Sums:
    rewards = [trajectory.scored() for trajectory in scored]
    num = float(len(rewards))
    parts: dict[str, list[float]] = {}
    for reward in rewards:
        for name in reward.parts.keys() - {"accuracy"}:
            parts.setdefault(name, []).append(reward.parts[name])
    return {
        "reward/mean": (math.fsum(reward.total for reward in rewards), num),
        _SQUARE: (math.fsum(reward.total**2 for reward in rewards), num),
        "reward/accuracy": (math.fsum(reward.accuracy for reward in rewards), num),
        **{
            _part_name(name): (math.fsum(values), float(len(values)))
            for name, values in sorted(parts.items())
        },
        **_source_sums(scored),
    }


def _source_sums(scored: Sequence[Trajectory]) -> Sums:
    sums: Sums = {}
    for trajectory in scored:
        name = _BY_SOURCE + trajectory.task.source
        total, num = sums.get(name, (0.0, 0.0))
        sums[name] = (total + trajectory.scored().accuracy, num + 1.0)
    return sums


def most_frequent_sources(counts: Mapping[str, float]) -> list[tuple[str, str]]:
    """(source, its name in a metric) of the largest data sets; none where there is only one.

    Args:
        counts: trajectories by `Task.source`.
    """
    if len(counts) < 2:
        return []
    largest = sorted(counts, key=lambda source: (-counts[source], source))[:MOST_SOURCES]
    names = {source: _UNFIT.sub("_", source) or "unnamed" for source in largest}
    if len(set(names.values())) < len(names):
        names = {source: f"{name}.{number}" for number, (source, name) in enumerate(names.items())}
    return list(names.items())


def _group_sums(groups: Sequence[Group]) -> Sums:
    """Groups that teach nothing, of those with anything to compare."""
    totals = [
        [t.scored().total for t in group.trajectories if not t.failed_outside_policy]
        for group in groups
    ]
    compared = [own for own in totals if len(own) > 1]
    uniform = sum(len(set(own)) == 1 for own in compared)
    return {"advantage/uniform_groups": (float(uniform), float(len(compared)))}


def _num_repeated(trajectory: Trajectory) -> int:
    """Readable calls whose tool and arguments were asked before."""
    asked = [
        (call.name, json.dumps(call.arguments, sort_keys=True))
        for turn in trajectory.turns
        for call in turn.calls
        if call.valid
    ]
    return len(asked) - len(set(asked))


def _part_name(name: str) -> str:
    return "reward/format" if name == "format" else f"reward/part/{name}"


def _shape_sums(held: Sequence[Trajectory]) -> Sums:
    num = float(len(held))
    stops = Counter(trajectory.stop for trajectory in held)
    return {
        "rollout/turns": (float(sum(len(trajectory.turns) for trajectory in held)), num),
        "rollout/tokens": (float(sum(len(trajectory.tokens) for trajectory in held)), num),
        "rollout/trained_tokens": (
            float(sum(len(turn.span) for trajectory in held for turn in trajectory.turns)),
            num,
        ),
        "rollout/entropy": _surprise(held),
        **{f"rollout/stop/{reason}": (float(stops[reason]), num) for reason in StopReason},
    }


def _surprise(held: Sequence[Trajectory]) -> tuple[float, float]:
    """Sum of -log p over the sampled tokens, and their number."""
    drawn = [t.logprobs[np.isfinite(t.logprobs)] for t in held]
    total = math.fsum(-float(own.sum(dtype=np.float64)) for own in drawn)
    return total, float(sum(map(len, drawn)))


def _call_sums(held: Sequence[Trajectory]) -> Sums:
    num = float(len(held))
    calls = [[call for turn in trajectory.turns for call in turn.calls] for trajectory in held]
    flat = [call for own in calls for call in own]
    outcomes = Counter(call.outcome for call in flat if call.outcome is not None)
    tools = Counter(call.name for call in flat if call.valid)
    waited = [call.observation.latency_s for call in flat if call.executed and call.observation]
    return {
        "rollout/calls": (float(len(flat)), num),
        "rollout/call_rate": (float(sum(any(c.executed for c in own) for own in calls)), num),
        "rollout/repeated_calls": (
            float(sum(map(_num_repeated, held))),
            float(sum(call.valid for call in flat)),
        ),
        "rollout/tool_latency_s": (math.fsum(waited), float(len(waited))),
        **{f"rollout/calls/{name}": (float(count), num) for name, count in tools.items()},
        **{
            f"rollout/outcome/{outcome}": (float(outcomes[outcome]), float(outcomes.total()))
            for outcome in Outcome
        },
    }


def combine(parts: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """Metrics from the sums of all ranks; one whose count is 0 is left out."""
    held = list(parts)
    total: Sums = {}
    for name in {name: None for part in held for name in part}:
        sums, counts = zip(*(part.get(name, _absent(name, part)) for part in held), strict=True)
        total[name] = (math.fsum(sums), math.fsum(counts))
    total["rollout/trajectories"] = (total["rollout/trajectories"][0], 1.0)
    by_source = {name: total.pop(name) for name in list(total) if name.startswith(_BY_SOURCE)}
    metrics = {name: value / count for name, (value, count) in total.items() if count}
    sizes = {name.removeprefix(_BY_SOURCE): count for name, (_, count) in by_source.items()}
    for source, name in most_frequent_sources(sizes):
        value, count = by_source[_BY_SOURCE + source]
        metrics[_BY_SOURCE + name] = value / count
    square = metrics.pop(_SQUARE, None)
    if square is not None:
        metrics["reward/std"] = math.sqrt(max(0.0, square - metrics["reward/mean"] ** 2))
    return metrics


def _absent(name: str, part: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    """What a rank without `name` adds: a tool nobody called was not called by anyone there."""
    is_call_count = name.startswith("rollout/calls/")
    return (0.0, part["rollout/calls"][1]) if is_call_count else (0.0, 0.0)
