"""Rows on their way in: what happens to those that cannot be used, and what is said about them.

One damaged picture among thousands is found at the start. Either nothing begins, and every bad
row is named at once, or the rows are left out and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tapo_train.errors import DataError
from tapo_train.types import Task

__all__ = ["MOST_SHOWN", "Intake"]

MOST_SHOWN = 20
"""Rows named in a message; where nothing is dropped, reading ends with so many."""


@dataclass(slots=True)
class Intake:
    """Takes the tasks of one split, from as many files as there are."""

    drop: bool = False
    """Leave rows out that cannot be used, instead of refusing them all."""
    problems: list[str] = field(default_factory=list)
    """What is wrong, one text per row that is left out: place, found, wanted."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was done to rows that are used, with their number."""
    _places: dict[str, str] = field(default_factory=dict)

    def take(self, where: str, read: Callable[[], Sequence[Task]]) -> list[Task]:
        """The tasks of the row at `where`; none if it cannot be used.

        Raises:
            DataError: nothing is dropped, and there are too many problems to go on.
        """
        try:
            tasks = list(read())
            for task in tasks:
                self._require_new(task.id, where)
        except DataError as error:
            self.leave_out(str(error))
            return []
        self._places |= {task.id: where for task in tasks}
        return tasks

    def leave_out(self, problem: str) -> None:
        """Note a row that cannot be used; raises as `take`."""
        self.problems.append(problem)
        if len(self.problems) == MOST_SHOWN:
            self.settle(is_all=False)

    def settle(self, *, is_all: bool = True) -> None:
        """Go on, or not.

        Raises:
            DataError: nothing is dropped, but there were problems; all of them in one message.
        """
        if not self.problems or self.drop:
            return
        if len(self.problems) == 1:
            raise DataError(self.problems[0])
        number = f"{len(self.problems)} rows" if is_all else f"{len(self.problems)} rows and more"
        raise DataError(
            "\n  ".join(
                [f"{number} cannot be used (data.bad_rows=drop leaves them out):", *self.problems]
            )
        )

    def report(self) -> list[str]:
        """Lines for the screen; none if every row was used as it is."""
        lines = [f"{number} rows {note}" for note, number in self.notes.items()]
        if self.problems:
            lines.append(f"{len(self.problems)} rows left out (data.bad_rows=drop):")
            lines += [f"  {problem}" for problem in self.problems[:MOST_SHOWN]]
            more = len(self.problems) - MOST_SHOWN
            lines += [f"  and {more} more"] if more > 0 else []
        return lines

    def _require_new(self, identifier: str, where: str) -> None:
        if identifier in self._places:
            raise DataError(
                f"{where}: id {identifier!r} was used before, at {self._places[identifier]}; "
                "wanted a unique id for each task"
            )
