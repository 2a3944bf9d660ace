"""Rows that no gradient comes from: counted in the means of their update, never computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tapo_train.learner.batch import MicroBatch, TrainingRow, join

__all__ = ["apart", "counting"]


def apart(rows: Sequence[TrainingRow]) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """The active and the idle ones: no advantage, no gradient of a loss that scales with it."""
    active = [row for row in rows if row.advantages.any()]
    return active, [row for row in rows if not row.advantages.any()]


def counting(batches: list[MicroBatch], idle: Sequence[TrainingRow]) -> list[MicroBatch]:
    """The micro-batches; the first counts the rows that are in none."""
    counts = [row.num_trained for row in idle]
    if not counts:
        return batches
    first, *others = batches or [join([])]
    counted = replace(first, idle_tokens=sum(counts), idle_sequences=sum(map(bool, counts)))
    return [counted, *others]
