"""Which trajectories are references, which are failing, and which of their calls count."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from tapo_train.credit.options import TapoOptions
from tapo_train.credit.regions import Region
from tapo_train.credit.similarity import DEFAULT_KINDS, Key, Similarity, load, registry
from tapo_train.credit.steps import CreditCall, CreditRow
from tapo_train.errors import CreditError


class Role(Enum):
    """What a trajectory is to the credit stage."""

    SUCCESS = "success"
    FAILING = "failing"
    NEITHER = "neither"


class Action(NamedTuple):
    """One eligible call: where it stands, and what it asks for."""

    row: int
    step: int
    """Position in `CreditRow.steps`."""
    call: int
    key: Key


@dataclass(slots=True)
class Block:
    """Calls of one tool that are compared with each other."""

    tool: str
    library: list[Action] = field(default_factory=list)
    queries: list[Action] = field(default_factory=list)


@dataclass(slots=True)
class Actions:
    """All eligible calls of a batch."""

    roles: list[Role]
    num_successes: dict[str, int]
    """|S| by group."""
    blocks: dict[Any, Block]


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


def _may_teach(call: CreditCall) -> bool:
    return call.valid and call.executed and call.status == "ok"


def _may_learn(options: TapoOptions) -> Callable[[CreditCall], bool]:
    unexecuted, infra = options.correct_unexecuted, options.correct_infra_error

    def allowed(call: CreditCall) -> bool:
        return (
            call.valid
            and (call.executed or unexecuted)
            and call.status != "model_error"
            and (call.status == "ok" or infra)
        )

    return allowed


def _root(key: Key) -> str | None:
    """The root picture of an image-bearing key: libraries of a whole batch are split by it."""
    first = key[0] if isinstance(key, tuple) and key and not isinstance(key, Region) else key
    return first.root if isinstance(first, Region) else None


def gather(rows: Sequence[CreditRow], options: TapoOptions, reader: Reader) -> Actions:
    """Sort the eligible calls of successes and failing trajectories into blocks."""
    roles = [role(row, options) for row in rows]
    num_successes: dict[str, int] = defaultdict(int)
    blocks: dict[Any, Block] = {}
    may_learn = _may_learn(options)
    per_group = options.scope == "group"
    for i, (row, part) in enumerate(zip(rows, roles, strict=True)):
        if part is Role.SUCCESS:
            num_successes[row.group] += 1
        if part is Role.NEITHER or row.discarded:
            continue
        counts = _may_teach if part is Role.SUCCESS else may_learn
        for s, step in enumerate(row.steps):
            for c, call in enumerate(step.calls):
                read = reader(call.name) if counts(call) else None
                arguments = None if read is None else as_object(call.arguments)
                if read is None or arguments is None:
                    continue
                tool, similarity = read
                key = similarity.key(arguments, row, step)
                if key is None:
                    continue
                where = (row.group, tool) if per_group else (_root(key), tool)
                block = blocks.get(where)
                if block is None:
                    block = blocks[where] = Block(tool)
                side = block.library if part is Role.SUCCESS else block.queries
                side.append(Action(i, s, c, key))
    return Actions(roles, dict(num_successes), blocks)
