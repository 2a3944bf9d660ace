"""`index`: the text search's corpus as a folder that all ranks open at once."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
Write a text index (BM25) from corpora, or add to one. Name its folder in tools.corpus.

CORPUS is a .jsonl or .parquet with id, title, text or with id, contents (Search-R1), or a folder
of .txt and .md. Files are streamed: memory does not grow with them.
"""


def main(argv: Sequence[str]) -> None:
    """Build or add."""
    arguments = _parser().parse_args(argv)
    from tapo_train.tools.corpus_index import add_to_index, build_index

    started = time.monotonic()
    change = build_index if arguments.action == "build" else add_to_index
    part = change(arguments.folder, arguments.corpus)
    size = sum(file.stat().st_size for file in arguments.folder.iterdir())
    print(
        f"{part.passages} passages of {part.source} -> {arguments.folder} "
        f"({size / 1e6:.1f} MB in all, {time.monotonic() - started:.1f} s)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tapo_train index",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", help="a new index")
    build.add_argument("corpus", nargs="+", type=Path, metavar="CORPUS")
    build.add_argument("--out", dest="folder", type=Path, required=True, metavar="DIR")
    add = actions.add_parser("add", help="more passages for an index, in place")
    add.add_argument("folder", type=Path, metavar="DIR")
    add.add_argument("corpus", nargs="+", type=Path, metavar="CORPUS")
    return parser
