"""Curves of a run as a PNG, from its metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from tapo_train.errors import DataError
from tapo_train.report.metrics_file import read_metrics

__all__ = ["CURVES", "plot_metrics"]

CURVES = ("reward/mean", "reward/accuracy", "eval/accuracy")


def plot_metrics(metrics: Path, out: Path, *, names: Sequence[str] = CURVES) -> list[str]:
    """Draw `names` over the steps of `metrics` (a metrics.jsonl) into the PNG `out`.

    Returns the names drawn: those with at least one finite value. Validation points
    are marked with their 95 % interval where it was logged.

    Raises:
        DataError: none of `names` was logged.
    """
    # Here, not above: matplotlib takes a second to import and few commands draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step")
    axes.grid(alpha=0.3)
    axes.locator_params(axis="x", integer=True)
    drawn = []
    for name in names:
        points = [
            (row["step"] + 1, row[name], row.get(f"{name}_low"), row.get(f"{name}_high"))
            for row in rows
            if math.isfinite(row.get(name, math.nan))
        ]
        if not points:
            continue
        drawn.append(name)
        steps, values, lows, highs = zip(*points, strict=True)
        (line,) = axes.plot(steps, values, label=name, marker="o" if len(points) < 30 else None)
        if None not in lows + highs:
            axes.fill_between(steps, lows, highs, alpha=0.15, color=line.get_color())
    if not drawn:
        raise DataError(f"{metrics}: none of {list(names)} was logged; nothing to draw")
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120, format="png")
    return drawn
