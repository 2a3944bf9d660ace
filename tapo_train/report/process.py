"""What this process costs the machine."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["resident_gib"]


def resident_gib() -> float:
    """Resident memory of this process now [GiB]; Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
