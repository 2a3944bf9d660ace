"""Similarity of calls of any schema, argument by argument."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from tapo_train.credit.regions import iou, legal_box
from tapo_train.credit.steps import CreditRow, CreditStep
from tapo_train.credit.text import jaccard, token_set

_MAX_DEPTH = 64
"""Deeper arguments would overflow the stack of the JSON encoder sooner or later."""


def canonical(value: Any) -> str:
    """JSON text with sorted keys: equal for equal arguments."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, default=repr)


@dataclass(frozen=True, slots=True)
class Arguments:
    """Arguments of an unknown schema, hashed and compared by their canonical JSON."""

    text: str

    def parsed(self) -> dict[str, Any]:
        """The arguments again."""
        parsed: dict[str, Any] = json.loads(self.text)
        return parsed


def generic_key(arguments: Mapping[str, Any], row: CreditRow, step: CreditStep) -> Arguments | None:
    """Any object is a legal request to a tool whose schema is not known, if nested sanely."""
    return None if _too_deep(arguments) else Arguments(canonical(dict(arguments)))


def _too_deep(value: Any) -> bool:
    """Whether containers are nested beyond `_MAX_DEPTH`, found without recursion."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        inside: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                inside.extend(item.values())
            elif isinstance(item, (list, tuple)):
                inside.extend(item)
        if not inside:
            return False
        level = inside
    return True


def _boxes(name: str, left: Any, right: Any) -> bool:
    lowered = name.lower()
    # The bound only keeps the area of absurd coordinates finite.
    return ("bbox" in lowered or "box" in lowered) and all(
        legal_box(value, 1e100, 1e100) is not None for value in (left, right)
    )


def value_similarity(name: str, left: Any, right: Any) -> float:
    """Similarity of one argument's two values, by their JSON type."""
    if isinstance(left, str) and isinstance(right, str):
        return jaccard(token_set(left), token_set(right))
    if isinstance(left, list) and isinstance(right, list):
        if _boxes(name, left, right):
            return iou(left, right)
        sets = (frozenset(canonical(item) for item in side) for side in (left, right))
        return jaccard(*sets)
    return float((type(left) is type(right) and left == right) or _equal_numbers(left, right))


def _equal_numbers(left: Any, right: Any) -> bool:
    """1 equals 1.0, but True does not equal 1."""
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (left, right))
    return numbers and bool(left == right)


def generic_similarity(left: Arguments, right: Arguments) -> float:
    """Mean over the union of argument names; a name missing on one side counts 0."""
    a, b = left.parsed(), right.parsed()
    names = sorted(a.keys() | b.keys())
    values = (value_similarity(name, a[name], b[name]) for name in names if name in a and name in b)
    return sum(values) / len(names) if names else 1.0


def exact(left: Hashable, right: Hashable) -> float:
    """1 for equal keys, else 0."""
    return float(left == right)
