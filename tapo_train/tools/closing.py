"""The end of a run's tools: each is closed, whatever the others do, and none holds the end up."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import wait
from typing import Any

from tapo_train.tools.threads import DaemonThreads

__all__ = ["CLOSE_S", "close_tools"]

CLOSE_S = 20.0
"""[s] all tools together have to close; longer than a server of theirs is waited for."""


def close_tools(tools: Sequence[Any], *, within_s: float = CLOSE_S) -> None:
    """Call `close` of those that have one, side by side.

    What goes wrong is said on standard error and not raised: a run that fails has an error of
    its own to end with, and one that is done has its results.
    """
    threads = DaemonThreads(max(1, len(tools)), max_abandoned=1)
    closing = {
        threads.submit(tool.close): str(tool.name) for tool in tools if hasattr(tool, "close")
    }
    done, late = wait(closing, timeout=within_s)
    for call in late:
        _say(f"{closing[call]} has not closed within {within_s:g} s")
    for call in done:
        if (error := call.exception()) is not None:
            _say(f"{closing[call]} could not be closed: {type(error).__name__}: {error}")


def _say(problem: str) -> None:
    print(f"tool {problem}", file=sys.stderr, flush=True)
