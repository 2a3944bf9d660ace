"""Compare what `eval --out` wrote of several policies, question by question.

    python scripts/compare_answers.py NAME=FILE...

A line for each policy: the share of questions that were answered in the agreed form, for which the
tool was called in the agreed form, and that were answered correctly, with 95 % intervals (Wilson).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tapo_train.report.statistics import accuracy_of

MEASURES: dict[str, Callable[[Any], bool]] = {
    "form": lambda row: row["reward"]["parts"]["format"] == 1.0,
    "searched": lambda row: any(call["valid"] for turn in row["turns"] for call in turn["calls"]),
    "right": lambda row: row["reward"]["accuracy"] == 1.0,
}


def read(path: Path) -> dict[str, Any]:
    """Question -> what was played."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["id"]: row for row in rows}


def table(played: dict[str, dict[str, Any]]) -> list[str]:
    """The lines, over the questions that all policies were asked."""
    asked = sorted(set.intersection(*(set(rows) for rows in played.values())))
    lines = [["policy", *MEASURES]]
    for name, rows in played.items():
        cells = []
        for holds in MEASURES.values():
            found = accuracy_of(sum(holds(rows[id]) for id in asked), len(asked))
            share = found.correct / found.num
            cells.append(f"{share:.2f} [{found.low:.2f}, {found.high:.2f}]")
        lines.append([name, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    return [*shown, f"n = {len(asked)}"]


def main(argv: Sequence[str]) -> None:
    """Print the table."""
    named = (argument.partition("=") for argument in argv)
    print("\n".join(table({name: read(Path(path)) for name, _, path in named})))


if __name__ == "__main__":
    main(sys.argv[1:])
