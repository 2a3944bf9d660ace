"""What is wrong with task files, counted; and what training files share with test files.

Rows are streamed: of the files that are checked nothing is kept but a digest of each id, of the
test files also one of each question and picture.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tapo_train.data.tasks import stream_tasks
from tapo_train.errors import DataError
from tapo_train.types import Task

__all__ = ["Finding", "Findings", "check_files"]

SAME_QUESTION, SAME_PICTURE = "same question and pictures as a test task", "picture of a test task"
TWICE = "duplicate id"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong, and where."""

    kind: str
    what: str


@dataclass(slots=True)
class Findings:
    """What was seen of some files."""

    rows: int = 0
    tasks: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """By kind."""
    first: dict[str, list[str]] = field(default_factory=dict)
    """The first few of each kind, in words."""

    def note(self, finding: Finding, *, shown: int = 5) -> None:
        """Count it, and keep its words if it is among the first of its kind."""
        self.counts[finding.kind] += 1
        words = self.first.setdefault(finding.kind, [])
        if len(words) < shown:
            words.append(finding.what)

    def lines(self) -> Iterator[str]:
        """For the screen."""
        yield f"{self.rows} rows, {self.tasks} tasks that can be used"
        for kind, number in self.counts.most_common():
            yield f"{kind}: {number}"
            yield from (f"  {what}" for what in self.first[kind])
            if number > len(self.first[kind]):
                yield f"  and {number - len(self.first[kind])} more"


@dataclass(frozen=True, slots=True)
class _Known:
    """Digests of what test files hold."""

    questions: set[bytes] = field(default_factory=set)
    pictures: set[str] = field(default_factory=set)

    def add(self, task: Task) -> None:
        self.questions.add(_digest(task))
        self.pictures.update(image.sha256 for image in task.images)

    def findings(self, where: str, task: Task) -> Iterator[Finding]:
        """A leak counts once: a question that is the same has the same pictures."""
        if _digest(task) in self.questions:
            yield Finding(SAME_QUESTION, f"{where}: task {task.id}: {task.question[:80]!r}")
        elif shared := self.pictures & {image.sha256 for image in task.images}:
            yield Finding(SAME_PICTURE, f"{where}: task {task.id}: {sorted(shared)[0][:12]}")


def check_files(
    paths: Iterable[Path],
    *,
    against: Iterable[Path] = (),
    format: str = "auto",
    image_roots: Sequence[Path] = (),
) -> Findings:
    """Look at every row of `paths`, pictures opened.

    Args:
        against: test files that they should share nothing with.

    Raises:
        DataError: a file is of no known form, or cannot be taken apart into rows.
    """
    known, found = _Known(), Findings()
    for path in against:
        for _, tasks in stream_tasks(path, image_roots=image_roots):
            for task in tasks if isinstance(tasks, list) else ():
                known.add(task)
    ids: set[bytes] = set()
    for path in paths:
        for where, tasks in stream_tasks(path, format=format, image_roots=image_roots):
            found.rows += 1
            if isinstance(tasks, DataError):
                found.note(Finding(tasks.kind, str(tasks)))
                continue
            for task in tasks:
                found.tasks += 1
                own = hashlib.blake2b(task.id.encode(), digest_size=16).digest()
                if own in ids:
                    found.note(Finding(TWICE, f"{where}: id {task.id!r} was used before"))
                ids.add(own)
                for leak in known.findings(where, task):
                    found.note(leak)
    return found


def _digest(task: Task) -> bytes:
    said = " ".join(task.question.casefold().split())
    whole = "\0".join([said, *(image.sha256 for image in task.images)])
    return hashlib.blake2b(whole.encode(), digest_size=16).digest()
