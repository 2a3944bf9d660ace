"""How the correctable shares depend on one or two options."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tapo_train.credit.actions import Reader, gather
from tapo_train.credit.assigners import paused_collector
from tapo_train.credit.diagnostics import finish, tally
from tapo_train.credit.options import TapoOptions
from tapo_train.credit.overrides import parse_number
from tapo_train.credit.steps import CreditRow
from tapo_train.credit.tapo import decide
from tapo_train.errors import ConfigError

AXES = ("theta", "alpha_min", "cluster_theta", "beta")
"""Options that can be swept: those that leave the eligible calls as they are."""
SHARES = {
    "trajectories, theta only": "tapo/frac_fail_traj_corrected_theta",
    "trajectories, both gates": "tapo/frac_fail_traj_corrected",
    "steps, theta only": "tapo/frac_fail_steps_corrected_theta",
    "steps, both gates": "tapo/frac_fail_steps_corrected",
    "steps in mixed groups, theta only": "tapo/frac_fail_steps_corrected_theta_mixed",
    "steps in mixed groups, both gates": "tapo/frac_fail_steps_corrected_mixed",
}
"""Columns: correctable shares of failing trajectories and of their tool steps."""
MAX_POINTS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One swept option and its values."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One combination of values and the shares there (NaN: no failing trajectory)."""

    at: tuple[float, ...]
    shares: Mapping[str, float]


def parse_axes(specs: Sequence[str]) -> list[Axis]:
    """Axes from `name=low:high:step` (both ends included) or `name=a,b,c`; one or two."""
    axes = [_axis(spec) for spec in specs]
    names = [axis.name for axis in axes]
    if not 1 <= len(axes) <= 2 or len(set(names)) != len(names):
        raise ConfigError(f"--sweep names {names}; want one or two different options")
    points = math.prod(len(axis.values) for axis in axes)
    if points > MAX_POINTS:
        raise ConfigError(f"--sweep has {points} points; want at most {MAX_POINTS}")
    return axes


def _axis(spec: str) -> Axis:
    name, _, text = spec.partition("=")
    name = name.removeprefix("credit.")
    if name not in AXES:
        raise ConfigError(f"--sweep {spec}: cannot sweep {name!r}; want one of {list(AXES)}")
    path = f"--sweep {name}"
    parts = text.split(":")
    if len(parts) == 1:
        return Axis(name=name, values=tuple(parse_number(v, path) for v in text.split(",")))
    if len(parts) != 3:
        raise ConfigError(f"{path} is {text!r}; want low:high:step or a,b,c")
    low, high, step = (parse_number(part, path) for part in parts)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high and step > 0):
        raise ConfigError(f"{path} is {text!r}; want low <= high and step > 0")
    count = math.floor((high - low) / step + 1e-9) + 1 if math.isfinite(step) else 1
    if count > MAX_POINTS:
        raise ConfigError(f"{path} has {count} values; want at most {MAX_POINTS}")
    # Rounding gives 0.3 where 0.1 + 2 * 0.1 would miss an inclusive gate.
    return Axis(name=name, values=tuple(round(low + i * step, 10) for i in range(count)))


def require_legal(options: TapoOptions, axes: Sequence[Axis]) -> None:
    """Raise `ConfigError` if an option cannot have one of the swept values."""
    for axis in axes:
        for value in axis.values:
            _with(options, axis.name, value)


def sweep(rows: Sequence[CreditRow], options: TapoOptions, axes: Sequence[Axis]) -> list[Point]:
    """The shares at every combination. A swept theta holds for every tool."""
    reader = Reader(options)
    points = []
    with paused_collector():
        actions = gather(rows, options, reader)
        for at in itertools.product(*(axis.values for axis in axes)):
            changed = options
            for axis, value in zip(axes, at, strict=True):
                changed = _with(changed, axis.name, value)
            metrics = finish(tally(rows, decide(rows, actions, changed, reader), audit=False))
            shares = {name: metrics.get(key, math.nan) for name, key in SHARES.items()}
            points.append(Point(at=at, shares=shares))
    return points


def _with(options: TapoOptions, name: str, value: float) -> TapoOptions:
    if name == "theta":
        return replace(options, theta=value, theta_by_tool={})
    return replace(options, **{name: value})  # type: ignore[arg-type]


def table(axes: Sequence[Axis], points: Sequence[Point]) -> list[str]:
    """The points as lines of text."""
    heads = [axis.name for axis in axes] + list(SHARES)
    widths = [max(len(head), 7) for head in heads]
    lines = ["  ".join(head.rjust(width) for head, width in zip(heads, widths, strict=True))]
    for point in points:
        cells = [f"{value:g}" for value in point.at]
        cells += ["-" if math.isnan(s) else f"{s:.3f}" for s in point.shares.values()]
        lines.append("  ".join(c.rjust(width) for c, width in zip(cells, widths, strict=True)))
    return lines
