"""A command that runs out of room."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tapo_train.report.files import naming


def main(argv: Sequence[str]) -> None:
    """Write to a full disk."""
    with naming(Path("runs/demo/metrics.jsonl")), Path("/dev/full").open("w") as file:
        file.write("a row")
