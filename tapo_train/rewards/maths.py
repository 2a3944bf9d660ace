"""Whether two mathematical expressions are equal: math-verify, in a process that may be killed.

The answer is hostile: a short power tower keeps a computer algebra system busy for ever. So the
comparison runs in a process of its own with a limit on its CPU time and memory. An answer that
exceeds them is not verified, therefore wrong: how long it takes is the policy's doing, and counts
CPU seconds, which no load on the machine changes.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import FrameType

from tapo_train.errors import ConfigError, ToolDownError
from tapo_train.rewards.score import Score
from tapo_train.types import Trajectory

__all__ = ["MathsVerifier"]

CPU_S = 5.0
"""[s] of CPU time for one comparison."""
MEMORY_BYTES = 2 * 2**30
MAX_CHARS = 2000
"""A longer answer is no expression."""
_HARD_CPU_S = 2
"""[s] of CPU time after which the system kills a worker that does not hear its own alarm."""


class MathsVerifier:
    """The part of a reward: 1 if the answer equals an accepted one as mathematics.

    Raises:
        ConfigError: math-verify is not installed.
    """

    def __init__(self) -> None:
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"reward: the part maths wants math-verify ({error}): "
                "pip install 'tapo_train[maths]'"
            ) from error
        self._pool: ProcessPoolExecutor | None = None

    async def __call__(self, trajectory: Trajectory) -> Score:
        """Compare in the worker; one that had to be killed is replaced."""
        answer = (trajectory.answer or "").strip()
        if not answer or len(answer) > MAX_CHARS:
            return Score(value=0.0)
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_confine)
        pool, loop = self._pool, asyncio.get_running_loop()
        try:
            equal = await loop.run_in_executor(
                pool, _is_equal, answer, list(trajectory.task.answers)
            )
        except BrokenProcessPool as error:
            if self._pool is pool:
                self._pool = None
            raise ToolDownError(f"the process that verifies maths died: {error}") from error
        return Score(value=float(equal))

    def close(self) -> None:
        """End the worker."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


class _TooLong(Exception):
    """The CPU time of a comparison is up."""


def _alarm(number: int, frame: FrameType | None) -> None:
    raise _TooLong


def _confine() -> None:
    """Once in the worker: little memory, and an alarm."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGPROF, _alarm)


def _is_equal(answer: str, accepted: Sequence[str]) -> bool:
    """In the worker: whether the answer equals any accepted expression."""
    from math_verify import parse, verify

    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    try:
        found = parse(_as_latex(answer), parsing_timeout=None)
        return any(
            bool(verify(parse(_as_latex(text), parsing_timeout=None), found, timeout_seconds=None))
            for text in accepted
        )
    except (_TooLong, MemoryError, RecursionError):
        return False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _as_latex(text: str) -> str:
    """Bare LaTeX is only read between dollars."""
    return text if "$" in text or "\\" not in text else f"${text}$"
