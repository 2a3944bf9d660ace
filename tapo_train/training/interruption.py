"""SIGTERM: the run stops at the next border of a step, on all ranks, with a checkpoint.

A rollout is given up at once, as it may take long and what launchers leave between SIGTERM
and SIGKILL is short; the run goes on before that step. What comes after the rollout is
finished. A later SIGTERM ends the process on the spot; one within `RELAYED_S` is the same request,
which a scheduler sent to every process and torchrun passes on to its ranks once more.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from tapo_train.errors import TapoError

T = TypeVar("T")

RELAYED_S = 5.0
"""[s] after a SIGTERM in which further ones say nothing new."""


class StepGivenUp(Exception):
    """A step that is not finished because the run is to stop; nothing has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """That the run ends with a step; on all ranks alike."""

    error: TapoError | None = None
    """Why, raised once every checkpoint is written; None: it was asked to stop."""


class _GivenUp(KeyboardInterrupt):
    """Raised inside the work that is given up.

    A KeyboardInterrupt, because an event loop hands that on and swallows others.
    """


class Interruption:
    """Whether this process has been asked to stop.

    Args:
        gives_up: False where ranks play in lockstep: one that left a rollout, or did not begin
            it, would leave the others waiting for it. The step is then finished.
    """

    def __init__(self, *, gives_up: bool = True) -> None:
        self.is_requested = False
        self._gives_up = gives_up
        self._may_give_up = False
        self._requested_at = 0.0

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
        if not self._gives_up:
            return work()
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
        if self.is_requested:
            if time.monotonic() - self._requested_at > RELAYED_S:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.is_requested, self._requested_at = True, time.monotonic()
        text = "SIGTERM: stopping with a checkpoint; another one later: at once"
        print(text, file=sys.stderr, flush=True)
        if self._may_give_up:
            self._may_give_up = False
            raise _GivenUp
