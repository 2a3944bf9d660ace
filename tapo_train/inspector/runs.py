"""Run folders side by side: what they are, how far they came, where their recipes differ."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tapo_train.data.rows import parse_json
from tapo_train.errors import ConfigError, DataError
from tapo_train.report.metrics_file import Row, read_metrics
from tapo_train.report.run_folder import RunFolder

__all__ = ["ONE_RUNS_OWN", "Run", "differences", "find_runs", "read_run", "variants"]

ONE_RUNS_OWN = ("run.dir", "run.seed", "run.resume", "run.wandb")
"""Fields in which runs of one experiment differ."""

LONGEST_LABEL = 60
"""Characters; a curve has no room for more."""

QUIET_S = 900.0
"""[s] without a new row after which a run that is not done counts as stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run folder, read."""

    path: Path
    recipe: Mapping[str, Any]
    """Resolved, by dotted field."""
    rows: Sequence[Row] = field(repr=False)
    """Of metrics.jsonl, one per step."""
    manifest: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.path.resolve().name

    @property
    def done(self) -> int:
        """Steps that are logged."""
        return max((int(row["step"]) + 1 for row in self.rows), default=0)

    def state(self, now: float) -> str:
        """done, running or stopped; `now` in seconds since 1970."""
        if self.done >= int(self.recipe.get("run.steps", 0)):
            return "done"
        last = max((row.get("time", 0.0) for row in self.rows), default=0.0)
        return "running" if now - last < QUIET_S else "stopped"

    def last(self, name: str) -> float | None:
        """The last finite value of a metric."""
        values = self.series(name)
        return values[-1][1] if values else None

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step from 1, value) of a metric, where it is finite."""
        return [
            (int(row["step"]) + 1, row[name])
            for row in self.rows
            if math.isfinite(row.get(name, math.nan))
        ]


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        ConfigError: it is none.
        DataError: one of its files is damaged.
    """
    folder = RunFolder(path)
    if not folder.recipe.is_file():
        raise ConfigError(f"{path} has no recipe.yaml; wanted the folder of a run")
    try:
        recipe = yaml.safe_load(folder.recipe.read_text(errors="replace"))
    except yaml.YAMLError as error:
        raise DataError(f"{folder.recipe}: {error}; wanted the resolved recipe") from error
    manifest: Any = {}
    if folder.manifest.is_file():
        manifest = parse_json(folder.manifest.read_bytes(), where=str(folder.manifest))
    if not isinstance(recipe, dict) or not isinstance(manifest, dict):
        raise DataError(f"{path}: recipe and manifest are no objects; wanted those of a run")
    rows = read_metrics(folder.metrics)
    return Run(path=path, recipe=dict(_flat(recipe)), rows=rows, manifest=manifest)


def find_runs(root: Path) -> list[Run]:
    """The run folders in `root` and one level below it, by name."""
    if not root.is_dir():
        raise ConfigError(f"{root} is no folder; wanted one that holds runs")
    inside = [path for path in sorted(root.iterdir()) if path.is_dir()]
    below = [path for folder in inside for path in sorted(folder.iterdir()) if path.is_dir()]
    folders = [root, *inside, *below]
    return [read_run(path) for path in folders if RunFolder(path).manifest.is_file()]


def differences(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Fields whose values are not the same in all recipes: one value each, None where absent.

    Where parts of another name stand in one place (`credit.name`), the fields that only one of
    them has follow from that and are left out.
    """
    names = sorted({name for recipe in recipes for name in recipe})
    values = {name: [recipe.get(name) for recipe in recipes] for name in names}
    found = {name: held for name, held in values.items() if any(v != held[0] for v in held)}
    others = tuple(name.removesuffix("name") for name in found if name.endswith(".name"))
    return {
        name: held
        for name, held in found.items()
        if not name.startswith(others) or all(name in recipe for recipe in recipes)
    }


def variants(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in seed and folder alone, by what tells them from the others.

    Where that is too much for the legend of a curve, by the folder of the first of them.
    """
    recipes = [
        {name: value for name, value in run.recipe.items() if name not in ONE_RUNS_OWN}
        for run in runs
    ]
    apart = differences(recipes)
    found: dict[str, list[Run]] = {}
    for index, run in enumerate(runs):
        label = ", ".join(f"{name}={values[index]}" for name, values in apart.items())
        found.setdefault(label or run.name, []).append(run)
    if not apart and len(runs) > 1:
        return {runs[0].name: list(runs)}
    return {
        label if len(label) <= LONGEST_LABEL else held[0].path.as_posix(): held
        for label, held in found.items()
    }


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def age(seconds: float) -> str:
    """A duration as people say it."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def listing(runs: Sequence[Run], now: float | None = None) -> str:
    """A line per run: state, steps, accuracy, when it was last heard of."""
    moment = time.time() if now is None else now
    lines = [f"{'run':<32} {'state':<8} {'steps':>11} {'accuracy':>9} {'validation':>11}  last row"]
    for run in runs:
        accuracy, checked = run.last("reward/accuracy"), run.last("eval/accuracy")
        last = max((row.get("time", 0.0) for row in run.rows), default=0.0)
        lines.append(
            f"{run.path.as_posix()[-32:]:<32} {run.state(moment):<8} "
            f"{run.done:>5}/{run.recipe.get('run.steps', 0):<5} {_number(accuracy):>9} "
            f"{_number(checked):>11}  {age(moment - last) + ' ago' if last else '-'}"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
