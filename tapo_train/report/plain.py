"""Values that JSON can hold, whatever the policy wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["plain"]

MAX_DEPTH = 32
"""Nesting kept; real tool arguments have two levels or three."""


def plain(value: Any, depth: int = 0) -> Any:
    """A copy of `value` that `json.dumps` takes.

    A policy can write 1e999, which is read as infinity, and brackets without end.
    Numbers that are not finite become their name, and what is nested deeper than
    `MAX_DEPTH` becomes "…".
    """
    if depth > MAX_DEPTH:
        return "…"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, depth + 1) for inner in value]
    return value
