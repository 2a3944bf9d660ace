"""One line of bench/results.jsonl, and how the benches take their figures.

A measure is a ratio within one run: ours and the peer's interleaved, CPU time of this process,
medians over the pairs. Wall time on a shared machine says little.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What was measured, beside what, and whether that was the aim."""

    id: str
    """As in docs/results.md: C5.gspo.cpu."""
    value: float
    unit: str
    peer: str | None = None
    """What the value is compared with, in words."""
    peer_value: float | None = None
    """In the same unit."""
    ratio: float | None = None
    """How many times better than the peer: above 1 is better."""
    target: str
    """In words with numbers: "ratio >= 25"."""
    met: bool
    versions: dict[str, str]
    load: float
    """Of the machine over the last minute: figures of a busy one are worse."""


def append(measures: Sequence[Measure], out: Path = RESULTS) -> None:
    """Append the measures, a line each, and print them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        for measure in measures:
            line = json.dumps(asdict(measure))
            file.write(line + "\n")
            print(line, flush=True)


def load() -> float:
    """Load average of the last minute."""
    return round(os.getloadavg()[0], 2)


def versions(*packages: str) -> dict[str, str]:
    """Of Python and the named distributions."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def cpu_s(function: Callable[[], object]) -> float:
    """[s] CPU time of this process, all threads, that one call takes."""
    start = time.process_time()
    function()
    return time.process_time() - start


def interleaved(
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    pairs: int = 3,
    before: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """Median CPU time [s] of both, run in turn after one warm-up each.

    Args:
        before: called before each call, not timed: empties caches.
    """
    ours()
    peer()
    times: list[list[float]] = []
    for _ in range(pairs):
        times.append([])
        for side in (ours, peer):
            before()
            times[-1].append(cpu_s(side))
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def peak_mb(function: Callable[[], object]) -> float:
    """[MB] peak of one call above what is resident before it; Linux with glibc.

    For a process of its own: allocations of 64 kB and more go back to the system when freed
    from now on, so that none is served, unseen, from a pool that earlier work left behind.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 16)
    libc.malloc_trim(0)
    before = _resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    function()
    return _resident_mb("VmHWM") - before


def _resident_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}")
