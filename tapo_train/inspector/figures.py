"""Curves and bars of runs, as PNGs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tapo_train.inspector.runs import Run
from tapo_train.report.catalogue import meaning_of

__all__ = ["Picture", "by_stage", "curve", "memory", "stages"]

_STAGE = re.compile(r"time/([a-z_]+)_s")
_MEMORY = re.compile(r"memory/([a-z]+)_([a-z_]+)_gib")
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A drawn curve."""

    name: str
    meaning: str
    png: bytes

    @property
    def data(self) -> str:
        """For a page without files beside it."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def curve(name: str, groups: Mapping[str, Sequence[Run]]) -> Picture | None:
    """The mean over the seeds of each group, with their range; None if nobody logged it."""
    series = {
        label: _mean_and_range([run.series(name) for run in held]) for label, held in groups.items()
    }
    series = {label: columns for label, columns in series.items() if len(columns[0])}
    if not series:
        return None

    def draw(axes: Any) -> None:
        for label, (steps, mean, low, high) in series.items():
            seeds = len(groups[label])
            shown = label if seeds == 1 else f"{label} ({seeds} seeds)"
            (line,) = axes.plot(steps, mean, label=shown, marker="o" if len(steps) < 20 else None)
            if seeds > 1:
                axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color())
        axes.set_xlabel("step")
        axes.locator_params(axis="x", integer=True)
        axes.legend(fontsize="small")

    return _drawn(name, meaning_of(name) or "", draw)


def _mean_and_range(series: Sequence[Sequence[tuple[int, float]]]) -> tuple[Floats, ...]:
    """(steps, mean, lowest, highest) over the seeds, at steps that all of them logged."""
    shared = sorted(set.intersection(*(set(dict(held)) for held in series)))
    values = np.array([[dict(held)[step] for step in shared] for held in series], dtype=np.float64)
    return (
        np.array(shared, dtype=np.float64),
        values.mean(axis=0),
        values.min(axis=0),
        values.max(axis=0),
    )


def stages(runs: Sequence[Run]) -> Picture | None:
    """Where a step's time goes: medians by stage."""
    held = {run.name: by_stage(run) for run in runs}
    names = sorted({name for stage in held.values() for name in stage})
    if not names:
        return None

    def draw(axes: Any) -> None:
        left = np.zeros(len(held))
        for name in names:
            width = np.array([stage.get(name, 0.0) for stage in held.values()])
            axes.barh(list(held), width, left=left, label=name)
            left += width
        axes.set_xlabel("seconds of a step, medians")
        axes.legend(fontsize="small", ncols=3)

    return _drawn("time/by_stage", "[s] of a step in each stage, medians over the steps", draw)


def by_stage(run: Run) -> dict[str, float]:
    """Median seconds of each stage."""
    names = {
        match[1]: match[0] for row in run.rows for name in row if (match := _STAGE.fullmatch(name))
    }
    names.pop("step", None)
    return {
        stage: float(np.median([v for _, v in run.series(name)]))
        for stage, name in names.items()
        if run.series(name)
    }


def memory(runs: Sequence[Run]) -> Picture | None:
    """The most memory held after each stage."""
    held: dict[str, dict[str, float]] = {}
    for run in runs:
        for row in run.rows:
            for name, value in row.items():
                if match := _MEMORY.fullmatch(name):
                    bars = held.setdefault(f"{run.name} {match[2]}", {})
                    bars[match[1]] = max(bars.get(match[1], 0.0), value)
    if not held:
        return None

    def draw(axes: Any) -> None:
        names = list(dict.fromkeys(name for bars in held.values() for name in bars))
        place = np.arange(len(names))
        height = 0.8 / len(held)
        for number, (label, bars) in enumerate(held.items()):
            axes.barh(
                place + number * height, [bars.get(n, 0.0) for n in names], height, label=label
            )
        axes.set_yticks(place, names)
        axes.set_xlabel("GiB, most of any step")
        axes.legend(fontsize="small")

    return _drawn(
        "memory/by_stage", "[GiB] held after each stage, the most of any step and rank", draw
    )


def _drawn(name: str, meaning: str, draw: Callable[[Any], None]) -> Picture:
    # Here, not above: matplotlib takes a second to import and few commands draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title=name)
    axes.grid(alpha=0.3)
    draw(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return Picture(name=name, meaning=meaning, png=buffer.getvalue())
