"""`data`: task files looked at, and turned into the native form."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

DESCRIPTION = """\
Look at task files, or turn them into the native form (docs/data.md). Rows are streamed.

check says how many rows have a missing, unreadable or oversized picture, no answer or an id that
was used before, and what they share with the test files of --against; its exit code is 1 if it
found anything. prepare writes a native jsonl with its pictures beside it, and leaves out what
cannot be used, after saying so.
"""


def main(argv: Sequence[str]) -> int:
    """Check or prepare; 1 if a check found something."""
    arguments = _parser().parse_args(argv)
    return _check(arguments) if arguments.action == "check" else _prepare(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from tapo_train.data.check import check_files

    found = check_files(
        arguments.files,
        against=arguments.against,
        format=arguments.format,
        image_roots=arguments.image_root,
    )
    print("\n".join(found.lines()))
    return 1 if found.counts else 0


def _prepare(arguments: argparse.Namespace) -> int:
    from tapo_train.data.tasks import stream_tasks, write_tasks
    from tapo_train.errors import DataError
    from tapo_train.types import Task

    left_out = 0

    def usable() -> Iterator[Task]:
        nonlocal left_out
        for path in arguments.files:
            rows = stream_tasks(path, format=arguments.format, image_roots=arguments.image_root)
            for _, tasks in rows:
                if isinstance(tasks, DataError):
                    left_out += 1
                    print(f"left out: {tasks}")
                    continue
                yield from tasks

    number = write_tasks(arguments.out, usable())
    print(f"{number} tasks -> {arguments.out} ({left_out} rows left out)")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tapo_train data",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    check = actions.add_parser("check", help="count what is wrong")
    prepare = actions.add_parser("prepare", help="write the native form")
    for action in (check, prepare):
        action.add_argument("files", nargs="+", type=Path, metavar="FILE")
        action.add_argument("--format", default="auto", help="of the files; default: told apart")
        action.add_argument(
            "--image-root",
            action="append",
            default=[],
            type=Path,
            metavar="DIR",
            help="a further folder of pictures",
        )
    check.add_argument(
        "--against", nargs="+", default=[], type=Path, metavar="FILE", help="test files"
    )
    prepare.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl")
    return parser
