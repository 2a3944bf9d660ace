"""What tool calls took and cost: one record per call, and a purse that cannot be overdrawn.

    RUN/tool_spending/rank0.txt     what a run has spent: one amount per line; negative: given back

Each rank appends to a file of its own, so that none waits for another. An amount is handed to
the operating system before its call is made, and forced to the disk once a step: a process that
is killed forgets nothing, a machine that loses power at most the step's calls.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from io import FileIO
from pathlib import Path

from tapo_train.errors import DataError, ToolBudgetError
from tapo_train.types import Outcome

__all__ = ["CallRecord", "Ledger", "Spending"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRecord:
    """One call that was run."""

    tool: str
    outcome: Outcome
    latency_s: float
    """[s] of work, attempts and pauses between them included."""
    queue_s: float
    """[s] beside that: waiting for a seat, the rate limit or a thread."""
    attempts: int
    """At least 1."""
    cached: bool
    """Answered from a store of earlier answers, or with an equal call that was under way."""
    cost: float
    """In the unit of the prices, all attempts."""


class Ledger:
    """The records of this process since the last `drain`, and what it may still spend. Any thread.

    A price is taken before the call is made, so the purse cannot be overdrawn however many
    calls are under way; what a store answered is given back.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._records: list[CallRecord] = []
        self.events: Counter[str] = Counter()
        """What guards did since the last `drain_events`, by kind; guards count here."""
        self._taken = Decimal(0)
        self._purse = Decimal("Infinity")
        self.is_exhausted = False
        """Whether a call was not made because the purse could not pay for it."""
        self.keep: Callable[[Decimal], object] = lambda amount: None
        """Told each amount before its call is made, and what is given back as a negative one."""

    def fill(self, amount: Decimal) -> None:
        """Let the calls from now on cost `amount` together."""
        self.settle()
        self.grant(amount)

    def settle(self) -> tuple[Decimal, bool]:
        """What was spent since the last time, and whether a call was not made for want of money.

        Calls may go on meanwhile: what they cost is in this sum or in the next.
        """
        with self._guard:
            taken, was_exhausted = self._taken, self.is_exhausted
            self._purse -= taken
            self._taken, self.is_exhausted = Decimal(0), False
        return taken, was_exhausted

    def grant(self, amount: Decimal) -> None:
        """Let the calls since the last `settle` cost `amount` together."""
        with self._guard:
            self._purse = amount

    @property
    def spent(self) -> Decimal:
        """Since the last `settle`, calls included that ended with their trajectory."""
        return self._taken

    def charge(self, price: float) -> None:
        """Take the price of an attempt that is about to be made.

        Raises:
            ToolBudgetError: the purse has less than that.
        """
        with self._guard:
            taken = self._taken + _exactly(price)
            if taken > self._purse:
                self.is_exhausted = True
                raise ToolBudgetError(f"a call for {price:g} is not made: {self.spent:g} is spent")
            if price:
                self.keep(_exactly(price))
            self._taken = taken

    def give_back(self, price: float) -> None:
        """Return the price of an attempt that a store answered."""
        with self._guard:
            if price:
                self.keep(-_exactly(price))
            self._taken -= _exactly(price)

    def add(self, record: CallRecord) -> None:
        """Keep the record of a call that ended."""
        with self._guard:
            self._records.append(record)

    def drain(self) -> list[CallRecord]:
        """The records since the last time."""
        with self._guard:
            records, self._records = self._records, []
        return records

    def drain_events(self) -> Counter[str]:
        """What guards did since the last time."""
        events = Counter(self.events)
        self.events.clear()
        return events


@cache
def _exactly(amount: float) -> Decimal:
    """The number as it was written: three calls for 0.1 cost 0.3, not a little more."""
    return Decimal(repr(amount))


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
