"""The console on a terminal: the rows as in a log, below them one line that says what goes on.

    step  9/30  reward 1.024  accuracy 0.555  tool calls 97%  9871 tokens/s  5.1 s  1 min 47 s left
    ⠹ step 10/30  update  2 s  1 min 44 s left

The only door to rich.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.console import Console as Terminal
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from tapo_train.report.sinks import Console, StepLines, duration

__all__ = ["LiveConsole", "open_console"]

_PER_SECOND = 4


class LiveConsole:
    """A sink with a line that moves; what others print meanwhile goes above it.

    Args:
        total_steps: of the run.
        first_step: 0-based, of this process.
        stream: a terminal.
        clock: [s], any origin.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        first_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lines = StepLines(total_steps=total_steps, clock=clock)
        self._clock = clock
        self._step, self._row_at = first_step, clock()
        self._stage, self._began = "", clock()
        self._spinner = Spinner("dots")
        self._terminal = Terminal(file=stream, highlight=False, soft_wrap=True)
        self._live = Live(
            console=self._terminal,
            get_renderable=self._now,
            refresh_per_second=_PER_SECOND,
            transient=True,
        )
        self._live.start()
        # A run that is killed cannot bring the cursor back, so it never goes.
        self._terminal.show_cursor(True)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the row above the line that moves."""
        line, warnings = self._lines(step, metrics)
        self._step, self._row_at = step + 1, self._clock()
        self._terminal.print(Text(line))
        for warning in warnings:
            self._terminal.print(Text(warning, style="yellow"))

    def enter(self, stage: str) -> None:
        """What the run does from now on."""
        self._stage, self._began = stage, self._clock()

    def close(self) -> None:
        """Take the line away."""
        self._live.stop()

    def _now(self) -> Spinner:
        now, lines = self._clock(), self._lines
        parts = [lines.count(min(self._step, lines.total_steps - 1)), self._stage]
        parts.append(duration(now - self._began))
        if lines.left_s is not None:
            parts.append(f"{duration(max(0.0, lines.left_s - (now - self._row_at)))} left")
        self._spinner.update(text=Text("  ".join(filter(None, parts)), style="dim"))
        return self._spinner


def open_console(
    *, total_steps: int, first_step: int = 0, stream: TextIO | None = None
) -> Console | LiveConsole:
    """One that moves on a terminal; plain lines in files, pipes, CI and dumb terminals."""
    out = stream or sys.stdout
    if out.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI"):
        return LiveConsole(total_steps=total_steps, first_step=first_step, stream=stream)
    return Console(total_steps=total_steps, stream=stream)
