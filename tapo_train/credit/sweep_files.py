"""A sweep as CSV and heat map. The only file of the credit stage that needs matplotlib."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tapo_train.credit.sweep import SHARES, Axis, Point
from tapo_train.errors import DataError

_PANELS = (
    "trajectories, theta only",
    "trajectories, both gates",
    "steps, theta only",
    "steps, both gates",
)
_MAX_LABELS = 150
"""Cells beyond are drawn without their number."""


def write_sweep(folder: Path, axes: Sequence[Axis], points: Sequence[Point]) -> list[Path]:
    """Write `sweep.csv` and `sweep.png`; returns both paths. `DataError` if they cannot be."""
    csv_path, png_path = folder / "sweep.csv", folder / "sweep.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with csv_path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([axis.name for axis in axes] + list(SHARES))
            writer.writerows([*point.at, *point.shares.values()] for point in points)
        _draw(png_path, axes, points)
    except OSError as error:
        raise DataError(
            f"{folder}: the sweep cannot be written there: {error.strerror or error}"
        ) from error
    return [csv_path, png_path]


def _draw(path: Path, axes: Sequence[Axis], points: Sequence[Point]) -> None:
    """A heat map per share for two axes, lines for one."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    if len(axes) == 1:
        _lines(figure.subplots(), axes[0], points)
    else:
        panels = figure.subplots(2, 2)
        for panel, share in zip(panels.flat, _PANELS, strict=True):
            heat_map(panel, figure, axes, points, share)
    figure.suptitle("Correctable share of failing trajectories and of their tool steps")
    figure.savefig(path, dpi=110)


def _lines(panel: Axes, axis: Axis, points: Sequence[Point]) -> None:
    for share in _PANELS:
        panel.plot(axis.values, [point.shares[share] for point in points], marker="o", label=share)
    panel.set(xlabel=axis.name, ylabel="share", ylim=(0, 1))
    panel.legend()


def heat_map(
    panel: Axes, figure: Figure, axes: Sequence[Axis], points: Sequence[Point], share: str
) -> None:
    """One share over two axes: the first upwards, the second to the right."""
    first, second = axes
    shape = (len(first.values), len(second.values))
    values = np.array([point.shares[share] for point in points]).reshape(shape)
    image = panel.imshow(values, origin="lower", aspect="auto", vmin=0, vmax=1, cmap="viridis")
    panel.set_yticks(range(shape[0]), [f"{value:g}" for value in first.values])
    panel.set_xticks(range(shape[1]), [f"{value:g}" for value in second.values])
    panel.set(ylabel=first.name, xlabel=second.name, title=share)
    if values.size <= _MAX_LABELS:
        for (i, j), value in np.ndenumerate(values):
            colour = "black" if value > 0.6 else "white"
            panel.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=panel)
