"""Which of a rank's groups may begin, and which of them an update trains. No I/O, no clock.

    started - trained ≤ (S + 1) · B      at each version, S = max_staleness, B groups per update

bounds what may begin. A group that began with the weights of version v is trained by update v + S
at the latest, so an update that would leave more such groups than the updates up to then have
places for waits for some of them. By the rule that is always possible: no group is older than S at
its update, whatever it takes, and none is thrown away. Throwing away what is late would keep the
slow questions, which are the hard ones, from ever being learned. What is complete goes oldest
first. With S = 0 an update waits for every group that began for it: the synchronous run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tapo_train.errors import TapoError

__all__ = ["Admission"]


@dataclass(slots=True, kw_only=True)
class Admission:
    """Groups by number, the order in which they were drawn."""

    per_update: int
    """B: groups an update trains."""
    max_staleness: int
    """S: most versions between a group's beginning and its update."""
    active: int | None = None
    """Most groups under way at a time; None: as many as may begin."""
    version: int = 0
    """Of the weights that sample now; also the number of the update that comes."""
    _waiting: list[int] = field(default_factory=list)
    """Drawn, and not begun."""
    _under_way: dict[int, int] = field(default_factory=dict)
    """Number -> version at the beginning."""
    _complete: dict[int, int] = field(default_factory=dict)
    """The same of those that are over."""

    @property
    def most(self) -> int:
        """Groups that may be drawn and untrained."""
        return (self.max_staleness + 1) * self.per_update

    @property
    def num_under_way(self) -> int:
        """Groups that have begun and are not complete."""
        return len(self._under_way)

    def draw(self, number: int) -> None:
        """A group may begin from now on; numbers ascend."""
        held = len(self._waiting) + len(self._under_way) + len(self._complete)
        if held >= self.most:
            raise TapoError(f"group {number}: {held} are untrained; wanted at most {self.most}")
        self._waiting.append(number)

    def begin(self) -> list[int]:
        """Groups that begin now, the oldest first."""
        free = len(self._waiting)
        if self.active is not None:
            free = max(0, self.active - len(self._under_way))
        begun, self._waiting = self._waiting[:free], self._waiting[free:]
        self._under_way |= dict.fromkeys(begun, self.version)
        return begun

    def complete(self, number: int) -> None:
        """A group is complete."""
        self._complete[number] = self._under_way.pop(number)

    def is_ready(self) -> bool:
        """Whether the update may begin."""
        chosen = self._chosen()
        over = [began for number, began in self._complete.items() if number not in chosen]
        left = [*self._under_way.values(), *over]
        return len(chosen) == self.per_update and all(
            sum(began + self.max_staleness <= self.version + later for began in left)
            <= later * self.per_update
            for later in range(self.max_staleness)
        )

    def take(self) -> list[int]:
        """The groups of the update that begins, by number."""
        chosen = self._chosen()
        for number in chosen:
            del self._complete[number]
        return chosen

    def _chosen(self) -> list[int]:
        return sorted(self._complete)[: self.per_update]
