"""Which trajectories are references, which are failing, and which of their calls count."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from tapo_train.credit.options import TapoOptions
from tapo_train.credit.regions import Region
from tapo_train.credit.similarity import DEFAULT_KINDS, Key, Similarity, load, registry
from tapo_train.credit.steps import CreditRow, Status
from tapo_train.errors import CreditError


class Role(Enum):
    """What a trajectory is to the credit stage."""

    SUCCESS = "success"
    FAILING = "failing"
    NEITHER = "neither"


@dataclass(slots=True)
class Calls:
    """Eligible calls as columns, in order of row, step and call."""

    row: list[int] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    """Position in `CreditRow.steps`."""
    call: list[int] = field(default_factory=list)
    """Position in `CreditStep.calls`."""
    turn: list[int] = field(default_factory=list)
    """Of the step, among all assistant turns."""
    key: list[Key] = field(default_factory=list)
    """What the call asks for."""


@dataclass(slots=True)
class Block:
    """Calls of one tool that are compared with each other."""

    tool: str
    library: list[int] = field(default_factory=list)
    """Positions in `Actions.library`."""
    queries: list[int] = field(default_factory=list)
    """Positions in `Actions.queries`."""


@dataclass(slots=True)
class Actions:
    """All eligible calls of a batch."""

    roles: list[Role]
    num_successes: dict[str, int]
    """|S| by group."""
    library: Calls
    """Of successful trajectories."""
    queries: Calls
    """Of failing trajectories."""
    blocks: list[Block]


def role(row: CreditRow, options: TapoOptions) -> Role:
    """Success, failing or neither; raises `CreditError` on a non-finite input.

    `both` keeps well-formatted wrong answers (positive advantage in an all-wrong group) from
    becoming references, and correct answers in bad format from being treated as failing.
    """
    if not (math.isfinite(row.advantage) and math.isfinite(row.correct)):
        raise CreditError(
            f"row {row.id!r} of group {row.group!r}: advantage {row.advantage}, correct "
            f"{row.correct}; want finite numbers"
        )
    correct = row.correct >= options.success_threshold
    positive, negative = row.advantage > 0.0, row.advantage < 0.0
    if options.success_rule == "advantage":
        success, failing = positive, negative
    elif options.success_rule == "outcome":
        success, failing = correct, not correct and negative
    else:
        success, failing = correct and positive, not correct and negative
    return Role.SUCCESS if success else Role.FAILING if failing else Role.NEITHER


def as_object(arguments: Any) -> Mapping[str, Any] | None:
    """Arguments as an object: None is {}, a string is parsed once; None if it is anything else."""
    if arguments is None:
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return arguments if isinstance(arguments, Mapping) else None


class Reader:
    """Looks up how calls of a tool are read; None for tools outside the allow-list."""

    def __init__(self, options: TapoOptions) -> None:
        self._known = registry(options.box_unit)
        self._kinds = {**DEFAULT_KINDS, **options.similarity}
        self._allowed = frozenset(options.tools)
        self._aliases = options.tool_aliases
        self._by_name: dict[str, tuple[str, Similarity] | None] = {}
        for name in self._kinds.values():
            load(name, self._known)  # a wrong name fails at start, not at the first such call

    def __call__(self, name: str) -> tuple[str, Similarity] | None:
        """(tool, similarity) of a tool name as the policy wrote it."""
        try:
            return self._by_name[name]
        except KeyError:
            tool = self._aliases.get(name, name)
            allowed = not self._allowed or tool in self._allowed
            found = (tool, self.similarity(tool)) if allowed else None
            self._by_name[name] = found
            return found

    def similarity(self, tool: str) -> Similarity:
        """The similarity of a tool, aliases resolved."""
        return load(self._kinds.get(tool, "generic"), self._known)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """Which valid calls of a trajectory count."""

    statuses: frozenset[Status]
    unexecuted: bool


_TEACHES = _Rule(statuses=frozenset({"ok"}), unexecuted=False)
"""Calls of successes: only what was executed and answered."""


def _learns(options: TapoOptions) -> _Rule:
    """Calls of failing trajectories: the arguments define the action, whatever became of it."""
    infra: frozenset[Status] = frozenset({"infra_error"} if options.correct_infra_error else ())
    return _Rule(statuses=infra | {"ok"}, unexecuted=options.correct_unexecuted)


def _root(key: Key) -> object:
    """The root picture of an image-bearing key: libraries of a whole batch are split by it."""
    if isinstance(key, Region):
        return key.root
    return _root(key[0]) if isinstance(key, tuple) and key else None


def gather(rows: Sequence[CreditRow], options: TapoOptions, reader: Reader) -> Actions:
    """Sort the eligible calls of successes and failing trajectories into blocks."""
    roles = [role(row, options) for row in rows]
    num_successes = Counter(
        row.group for row, part in zip(rows, roles, strict=True) if part is Role.SUCCESS
    )
    library, queries = Calls(), Calls()
    blocks: dict[str, dict[object, Block]] = {}
    learns = _learns(options)
    per_group = options.scope == "group"
    for i, (row, part) in enumerate(zip(rows, roles, strict=True)):
        if part is Role.NEITHER or row.discarded:
            continue
        teaches = part is Role.SUCCESS
        calls = library if teaches else queries
        here = blocks.setdefault(row.group if per_group else "", {})
        for s, c, turn, tool, key in _read(row, _TEACHES if teaches else learns, reader):
            where = tool if per_group else (_root(key), tool)
            block = here.get(where)
            if block is None:
                block = here[where] = Block(tool)
            (block.library if teaches else block.queries).append(len(calls.row))
            calls.row.append(i)
            calls.step.append(s)
            calls.call.append(c)
            calls.turn.append(turn)
            calls.key.append(key)
    found = [block for here in blocks.values() for block in here.values()]
    return Actions(roles, num_successes, library, queries, found)


def _read(row: CreditRow, rule: _Rule, reader: Reader) -> Iterator[tuple[int, int, int, str, Key]]:
    """(step, call, turn, tool, key) of every eligible call of a row."""
    statuses, unexecuted = rule.statuses, rule.unexecuted
    for s, step in enumerate(row.steps):
        for c, call in enumerate(step.calls):
            counts = call.valid and (call.executed or unexecuted) and call.status in statuses
            read = reader(call.name) if counts else None
            if read is None:
                continue
            arguments = call.arguments
            if type(arguments) is not dict:
                arguments = as_object(arguments)
                if arguments is None:
                    continue
            tool, similarity = read
            key = similarity.key(arguments, row, step)
            if key is not None:
                yield s, c, step.turn, tool, key
