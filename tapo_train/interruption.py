"""SIGTERM: the run stops at the next border of a step, on all ranks, with a checkpoint.

A rollout is given up at once, as it may take long and what launchers leave between SIGTERM
and SIGKILL is short; the run goes on before that step. What comes after the rollout is
finished. A second SIGTERM ends the process on the spot.
"""

from __future__ import annotations

import signal
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class StepGivenUp(Exception):
    """A step that is not finished because the run is to stop; nothing has changed."""


class _GivenUp(KeyboardInterrupt):
    """Raised inside the work that is given up.

    A KeyboardInterrupt, because an event loop hands that on and swallows others.
    """


class Interruption:
    """Whether this process has been asked to stop."""

    def __init__(self) -> None:
        self.is_requested = False
        self._may_give_up = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM for a request during the block. In the main thread only."""
        before = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def attempt(self, work: Callable[[], T]) -> T | None:
        """The result of `work`, or None if it was given up because the run is to stop."""
        if self.is_requested:
            return None
        try:
            self._may_give_up = True
            result = work()
            self._may_give_up = False
        except _GivenUp:
            return None
        finally:
            self._may_give_up = False
        return result

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        self.is_requested = True
        signal.signal(number, signal.SIG_DFL)
        print("SIGTERM: stopping with a checkpoint; again: at once", file=sys.stderr, flush=True)
        if self._may_give_up:
            self._may_give_up = False
            raise _GivenUp
