"""The command line: `python -m tapo_train COMMAND …`.

Each command lives in the module that does the work, which is imported only when its turn
comes: `--help`, `world` and `analyze` start without torch.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from tapo_train.errors import ConfigError, TapoError

EXIT_REFUSED = 2
"""The input is wrong or the work cannot go on; one message says why."""
EXIT_INTERRUPTED = 130

_OF_THE_DISK = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}
)
"""What no program can mend: a full disk, a missing right, a file system that is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A subcommand: `function(argv)` of `module` does it."""

    module: str
    summary: str
    function: str = "main"


COMMANDS = {
    "train": Command(
        module="tapo_train.commands.train",
        summary="train a policy with a recipe; resumes by itself",
    ),
    "eval": Command(
        module="tapo_train.commands.evaluate",
        summary="accuracy of a policy on a task file, with a confidence interval",
    ),
    "collect": Command(
        module="tapo_train.commands.collect",
        summary="right attempts of a policy as demonstrations that sft imitates",
    ),
    "data": Command(
        module="tapo_train.commands.data",
        summary="check task files, or turn published ones into the native form",
    ),
    "serve-engine": Command(
        module="tapo_train.commands.serve_engine",
        summary="an engine process that training runs send their rollouts to",
    ),
    "sft": Command(
        module="tapo_train.commands.sft",
        summary="supervised warm start on demonstrations, same learner",
    ),
    "world": Command(
        module="tapo_train.demo.world.build",
        summary="write an offline search world: questions, pictures, corpus, image index",
    ),
    "index": Command(
        module="tapo_train.commands.index",
        summary="write a text index from a corpus, or add to one",
    ),
    "serve-search": Command(
        module="tapo_train.commands.serve_search",
        summary="serve a text index to other programs (Search-R1's /retrieve)",
    ),
    "analyze": Command(
        module="tapo_train.credit.analyze",
        summary="run the credit stage alone on dumped rollouts of any framework",
    ),
    "inspect": Command(
        module="tapo_train.commands.inspect",
        summary="write pages that show every attempt of a run, and why a step was corrected",
    ),
    "dashboard": Command(
        module="tapo_train.commands.dashboard",
        summary="make a workspace of Weights & Biases from the metric catalogue",
    ),
    "report": Command(
        module="tapo_train.commands.runs",
        function="report",
        summary="one page about one or several runs, with curves, tools and credit",
    ),
    "ls": Command(
        module="tapo_train.commands.runs", function="list_runs", summary="the runs in a folder"
    ),
    "diff": Command(
        module="tapo_train.commands.runs",
        function="diff",
        summary="the fields in which the recipes of runs differ",
    ),
    "export": Command(
        module="tapo_train.learner.export",
        summary="write a checkpoint as a Hugging Face folder",
    ),
    "doctor": Command(
        module="tapo_train.commands.doctor",
        summary="check this machine's set-up and say how to mend what fails",
    ),
}

_COMMAND_LINES = "\n".join(f"  {name:<13}{item.summary}" for name, item in COMMANDS.items())
USAGE = f"""\
usage: python -m tapo_train COMMAND …     (COMMAND --help says more)
       torchrun --nproc-per-node N -m tapo_train train RECIPE …

{_COMMAND_LINES}

examples:
  python -m tapo_train doctor
  python -m tapo_train world --seed 1 --out runs/world
  python -m tapo_train train recipes/demo_cpu.yaml --dry-run
  torchrun --nproc-per-node 2 -m tapo_train train recipes/demo_cpu.yaml algo/loss=gspo credit=none
  python -m tapo_train eval --model runs/demo/export --tasks runs/world/test.jsonl

options:
  --debug   show the traceback of an error, not only its message
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done or stopped by SIGTERM, 1 checks failed (doctor), 2 refused, 130
        interrupted.
        A run that makes no progress ends itself with 3 (`watchdog`).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in arguments
    if is_debug:
        arguments.remove("--debug")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else EXIT_REFUSED
    try:
        return _dispatch(arguments)
    except TapoError as error:
        if is_debug:
            traceback.print_exc()
        _report(error)
        return EXIT_REFUSED
    except OSError as error:
        if is_debug or error.errno not in _OF_THE_DISK:
            raise
        _report(TapoError(f"{error.filename or 'a file'}: {error.strerror}"))
        return EXIT_REFUSED
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED


def _dispatch(arguments: Sequence[str]) -> int:
    name, *rest = arguments
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}; wanted one of {', '.join(COMMANDS)}")
    module = importlib.import_module(COMMANDS[name].module)
    code: int | None = getattr(module, COMMANDS[name].function)(rest)
    return code or 0


def _report(error: TapoError) -> None:
    """One message. Every rank finds the same fault in a recipe: only the first says so."""
    rank = os.environ.get("RANK", "0")
    if isinstance(error, ConfigError) and rank != "0":
        return
    where = "" if "RANK" not in os.environ else f"rank {rank}: "
    print(f"{where}error: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
