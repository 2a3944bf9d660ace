"""Where metrics go: every sink takes one row per step."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TextIO

from tapo_train.report.warnings import explain

__all__ = ["Console", "Sink", "duration", "write_all"]


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
    ("throughput/tokens_per_s", lambda value: f"{value:.0f} tokens/s"),
    ("time/step_s", lambda value: f"{value:.1f} s"),
    ("eval/accuracy", lambda value: f"validation {value:.3f}"),
    ("eval/failed", lambda value: f"{value:.0%} of the validation failed" if value else ""),
)
"""What the console shows of a row, in this order; what is absent or empty is left out."""


class Console:
    """One line per step: where training stands and when it will end; and signs of collapse, in
    words when they appear."""

    _SMOOTHING_STEPS = 10

    def __init__(
        self,
        *,
        total_steps: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._stream = stream
        self._clock = clock
        self._ends: deque[tuple[int, float]] = deque(maxlen=self._SMOOTHING_STEPS + 1)
        self._warned: set[str] = set()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the row; steps are shown from 1."""
        width = len(str(self._total_steps))
        parts = [f"step {step + 1:{width}d}/{self._total_steps}"]
        shown = [show(metrics[name]) for name, show in _COLUMNS if name in metrics]
        parts += filter(None, shown)
        self._ends.append((step, self._clock()))
        left = self._seconds_left(step, metrics.get("time/step_s"))
        if left is not None:
            parts.append(f"{duration(left)} left")
        lines = ["  ".join(parts)]
        warnings = explain(metrics)
        lines += [f"  warning: {text}" for name, text in warnings if name not in self._warned]
        self._warned = {name for name, _ in warnings}
        print("\n".join(lines), file=self._stream or sys.stdout, flush=True)

    def _seconds_left(self, step: int, step_s: float | None) -> float | None:
        """By the mean of the last steps; the first one is judged by its own time."""
        (first_step, first_time), (last_step, last_time) = self._ends[0], self._ends[-1]
        if last_step > first_step:
            step_s = (last_time - first_time) / (last_step - first_step)
        return None if step_s is None else step_s * (self._total_steps - step - 1)

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
