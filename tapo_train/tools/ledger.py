"""What tool calls took and cost: one record per call, and a purse that cannot be overdrawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import cache

from tapo_train.errors import ToolBudgetError
from tapo_train.types import Outcome

__all__ = ["CallRecord", "Ledger"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRecord:
    """One call that was run."""

    tool: str
    outcome: Outcome
    latency_s: float
    """[s] from the start of the call to its answer, attempts and pauses between them included."""
    queue_s: float
    """[s] before that: waiting for a seat or for the rate limit."""
    attempts: int
    """At least 1."""
    cached: bool
    """Answered from a store of earlier answers."""
    cost: float
    """In the unit of the prices, all attempts."""


class Ledger:
    """The records of this process since the last `drain`, and what it may still spend.

    A price is taken before the call is made, so the purse cannot be overdrawn however many
    calls are under way; what a store answered is given back.
    """

    def __init__(self) -> None:
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
        """Let the calls until the next `fill` cost `amount` together."""
        self._purse = amount
        self._taken = Decimal(0)
        self.is_exhausted = False

    @property
    def spent(self) -> Decimal:
        """Since the last `fill`, calls included that ended with their trajectory."""
        return self._taken

    def charge(self, price: float) -> None:
        """Take the price of an attempt that is about to be made.

        Raises:
            ToolBudgetError: the purse has less than that.
        """
        taken = self._taken + _exactly(price)
        if taken > self._purse:
            self.is_exhausted = True
            raise ToolBudgetError(f"a call for {price:g} is not made: {self.spent:g} is spent")
        if price:
            self.keep(_exactly(price))
        self._taken = taken

    def give_back(self, price: float) -> None:
        """Return the price of an attempt that a store answered."""
        if price:
            self.keep(-_exactly(price))
        self._taken -= _exactly(price)

    def add(self, record: CallRecord) -> None:
        """Keep the record of a call that ended."""
        self._records.append(record)

    def drain(self) -> list[CallRecord]:
        """The records since the last time."""
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
