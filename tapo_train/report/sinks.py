"""Where metrics go: every sink takes one row per step."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TextIO

from tapo_train.report.warnings import explain

__all__ = ["Console", "Sink", "StepLines", "duration", "write_all"]


class Sink(Protocol):
    """Takes the metrics of a step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` of 0-based `step`."""

    def close(self) -> None:
        """Finish; no write comes afterwards."""


def write_all(sinks: Sequence[Sink], step: int, metrics: Mapping[str, float]) -> None:
    """Hand one row to every sink."""
    for sink in sinks:
        sink.write(step, metrics)


_COLUMNS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("reward/mean", lambda value: f"reward {value:.3f}"),
    ("reward/accuracy", lambda value: f"accuracy {value:.3f}"),
    ("rollout/call_rate", lambda value: f"tool calls {value:.0%}"),
    ("rollout/staleness", lambda value: f"age {value:.1f}" if value else ""),
    ("wait/rollouts", lambda value: f"waiting {value:.0%}"),
    ("throughput/tokens_per_s", lambda value: f"{value:.0f} tokens/s"),
    ("time/step_s", lambda value: f"{value:.1f} s"),
    ("eval/accuracy", lambda value: f"validation {value:.3f}"),
    ("eval/failed", lambda value: f"{value:.0%} of the validation failed" if value else ""),
)
"""What the console shows of a row, in this order; what is absent or empty is left out."""


class StepLines:
    """Rows of metrics as lines for people: where training stands, when it will end, what is wrong.

    Args:
        total_steps: of the run.
        clock: [s], any origin.
    """

    _SMOOTHING_STEPS = 10

    def __init__(self, *, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_steps = total_steps
        self.left_s: float | None = None
        """[s] of the run when the last row came; None before there is one that tells."""
        self._clock = clock
        self._ends: deque[tuple[int, float]] = deque(maxlen=self._SMOOTHING_STEPS + 1)
        self._warned: set[str] = set()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> tuple[str, list[str]]:
        """The line of 0-based `step`, shown from 1, and the warnings that did not hold before."""
        parts = [self.count(step)]
        shown = [show(metrics[name]) for name, show in _COLUMNS if name in metrics]
        parts += filter(None, shown)
        self._ends.append((step, self._clock()))
        self.left_s = self._seconds_left(step, metrics.get("time/step_s"))
        if self.left_s is not None:
            parts.append(f"{duration(self.left_s)} left")
        warnings = explain(metrics)
        new = [f"  warning: {text}" for name, text in warnings if name not in self._warned]
        self._warned = {name for name, _ in warnings}
        return "  ".join(parts), new

    def count(self, step: int) -> str:
        """`step  3/30`."""
        return f"step {step + 1:{len(str(self.total_steps))}d}/{self.total_steps}"

    def _seconds_left(self, step: int, step_s: float | None) -> float | None:
        """By the mean of the last steps; the first one is judged by its own time."""
        (first_step, first_time), (last_step, last_time) = self._ends[0], self._ends[-1]
        if last_step > first_step:
            step_s = (last_time - first_time) / (last_step - first_step)
        return None if step_s is None else step_s * (self.total_steps - step - 1)


class Console:
    """One line per step, and signs of collapse in words when they appear."""

    def __init__(
        self,
        *,
        total_steps: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lines = StepLines(total_steps=total_steps, clock=clock)
        self._stream = stream

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the row."""
        line, warnings = self._lines(step, metrics)
        print("\n".join([line, *warnings]), file=self._stream or sys.stdout, flush=True)

    def enter(self, stage: str) -> None:
        """Nothing: a log has no line that changes."""

    def close(self) -> None:
        """Nothing to finish."""


def duration(seconds: float) -> str:
    """`7 s`, `3 min 20 s`, `2 h 05 min`."""
    total = round(seconds)
    minutes, rest = divmod(total, 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
