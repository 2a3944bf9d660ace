"""The metric catalogue as a workspace of Weights & Biases; the only door to wandb_workspaces.

A panel per metric, with its unit on the axis and its meaning in the title; metrics that the
catalogue knows by a pattern share one.
"""

from __future__ import annotations

from wandb_workspaces import workspaces
from wandb_workspaces.reports.v2.interface import LinePlot

from tapo_train.report.catalogue import METRICS, SECTIONS, panels_of, pattern_of, unit_of

__all__ = ["make_workspace"]

_OPEN = 2
"""Sections that are unfolded at first."""


def make_workspace(*, entity: str, project: str, name: str) -> workspaces.Workspace:
    """The workspace; `save()` sends it."""
    sections = [
        workspaces.Section(
            name=section,
            panels=[_panel(metric) for metric in panels_of(section)],
            is_open=number < _OPEN,
        )
        for number, section in enumerate(SECTIONS)
    ]
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections)


def _panel(metric: str) -> LinePlot:
    title, unit = f"{metric}: {METRICS[metric]}", unit_of(metric) or None
    if "<" in metric:
        return LinePlot(title=title, title_y=unit, metric_regex=pattern_of(metric))
    return LinePlot(title=title, title_y=unit, y=[metric])
