"""`ls`, `diff` and `report`: runs listed, compared and told about on one page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tapo_train.errors import ConfigError
from tapo_train.inspector.runs import differences, find_runs, listing, read_run


def list_runs(argv: Sequence[str]) -> None:
    """Print a line for every run in a folder."""
    parser = _parser("ls", "A line for every run in a folder and one level below it.")
    parser.add_argument("folder", nargs="?", default="runs", metavar="DIR", help="default: runs")
    print(listing(find_runs(Path(parser.parse_args(argv).folder))))


def diff(argv: Sequence[str]) -> None:
    """Print the fields in which two recipes differ."""
    parser = _parser("diff", "The fields in which the recipes of runs differ.")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    names = parser.parse_args(argv).runs
    if len(names) < 2:
        raise ConfigError(f"diff: found {names[0]} alone, wanted two runs or more")
    found = differences([read_run(Path(name)).recipe for name in names])
    for field, values in found.items():
        print(f"{field:<40} " + "   ".join(str(value) for value in values))
    if not found:
        print("the recipes are the same")


def report(argv: Sequence[str]) -> None:
    """Write one page about one or several runs, and its curves as PNGs."""
    parser = _parser(
        "report", "One page about runs: curves, time, tools, credit, warnings, samples."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", metavar="FILE", help="default: RUN/report.html of the first run")
    arguments = parser.parse_args(argv)
    runs = [read_run(Path(name)) for name in arguments.runs]
    out = Path(arguments.out) if arguments.out else runs[0].path / "report.html"
    if out.suffix != ".html" or out.is_dir():
        raise ConfigError(f"report: --out is {out}, wanted a file that ends in .html")
    if not any(run.rows for run in runs):
        raise ConfigError(f"report: no step is logged in {', '.join(arguments.runs)}")

    from tapo_train.inspector.report import write_report

    page, *pictures = write_report(runs, out)
    print(f"{page}\n{len(pictures)} pictures: {out.with_suffix('')}")


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"python -m tapo_train {name}", description=description)
