"""`inspect`: a run, or rollouts of any framework, as pages that open from a folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tapo_train.errors import ConfigError
from tapo_train.inspector.run_pages import write_pages
from tapo_train.inspector.serve import serve

DESCRIPTION = """\
Write pages that show every dumped attempt of a run: what the policy wrote, what its tools
answered, the regions it cut drawn on the pictures, the advantage of every token before and after
the credit stage, and for each tool step why it was corrected or not. Open OUT/index.html; the
pages need no server and load nothing from elsewhere.

RUN is a run folder, or a file of the rows that `analyze` reads, from any framework.
"""


def main(argv: Sequence[str]) -> None:
    """Write the pages, and serve them if asked to."""
    arguments = _parser().parse_args(argv)
    source = Path(arguments.run)
    if not source.exists():
        raise ConfigError(f"inspect: {source} does not exist; wanted a run folder or a .jsonl file")
    out = Path(arguments.out) if arguments.out else _beside(source)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"inspect: --out {out} is a file; wanted a folder")
    first, last = _range(arguments.steps)
    written = write_pages(source, out, first=first, last=last)
    print(f"{written} step{'s' if written > 1 else ''}: {out}/index.html")
    if arguments.serve is not None:
        serve(out, arguments.serve, lambda: write_pages(source, out, first=first, last=last))


def _beside(source: Path) -> Path:
    return source / "inspect" if source.is_dir() else source.with_suffix(".inspect")


def _range(text: str) -> tuple[int, int | None]:
    """`3:10`, `3:` or `7` to the first and last step."""
    first, colon, last = text.partition(":")
    try:
        low = int(first or 1)
        high = int(last) if last else None if colon else low
    except ValueError:
        low, high = 0, None
    if low < 1 or (high is not None and high < low):
        raise ConfigError(f"inspect: --steps is {text!r}; wanted 5, 5:20 or 5:, counted from 1")
    return low, high


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tapo_train inspect",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="run folder, or rollouts (.jsonl)")
    parser.add_argument("--out", metavar="DIR", help="default: RUN/inspect")
    parser.add_argument("--steps", default="1:", metavar="A:B", help="only these (default: all)")
    parser.add_argument(
        "--serve",
        type=int,
        nargs="?",
        const=8265,
        metavar="PORT",
        help="serve the pages on 127.0.0.1 and add steps as they come (default port: 8265)",
    )
    return parser
