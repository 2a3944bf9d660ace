"""What a run has spent on tool calls, on disk before the call is made.

    RUN/tool_spending/rank0.txt     one amount per line; negative: given back

Each rank appends to a file of its own, so that none waits for another. An amount is handed to
the operating system before its call is made, and forced to the disk once a step: a process that
is killed forgets nothing, a machine that loses power at most the step's calls.
"""

from __future__ import annotations

import os
from decimal import Decimal, InvalidOperation
from io import FileIO
from pathlib import Path

from tapo_train.errors import DataError

__all__ = ["Spending"]


class Spending:
    """The spending of a run; this rank's is written.

    Args:
        folder: of the run's spending, shared by its ranks; made when something is paid.
    """

    def __init__(self, folder: Path, *, rank: int) -> None:
        self._folder = folder
        self._own = folder / f"rank{rank}.txt"
        self._file: FileIO | None = None

    def write(self, amount: Decimal) -> None:
        """Keep an amount. OSError if that is not possible: then nothing may be bought."""
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(self._own, "a")
        line = f"{amount}\n".encode()
        if self._file.write(line) != len(line):
            raise OSError(f"{self._own}: the disk is full")

    def force(self) -> None:
        """Have what was written survive a loss of power."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def total(self) -> Decimal:
        """What the run has spent on all ranks, also when it had another number of them.

        Raises:
            DataError: a file is damaged; what is lost is not taken for nothing.
        """
        return sum(map(_sum, sorted(self._folder.glob("rank*.txt"))), start=Decimal(0))


def _sum(file: Path) -> Decimal:
    try:
        text = file.read_text(encoding="ascii")
        spent = sum(map(Decimal, text.splitlines()), start=Decimal(0))
    except (OSError, ValueError, InvalidOperation) as error:
        raise DataError(
            f"{file}: {type(error).__name__}: {error}; wanted what the run has spent on tools, an "
            "amount per line"
        ) from error
    is_whole = not text or text.endswith("\n")
    if not (is_whole and spent.is_finite() and spent >= 0):
        raise DataError(f"{file}: found {spent} and {text[-40:]!r} at its end, wanted whole lines")
    return spent
