"""`eval`: accuracy of a policy on a task file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tapo_train.commands.recipe_arguments import OVERRIDES_HELP, quoted
from tapo_train.errors import ConfigError
from tapo_train.recipe.compose import load_recipe
from tapo_train.report.files import require_writable

DESCRIPTION = """\
Ask a policy every question of a task file, greedily, and print its accuracy with a 95 %
confidence interval.

A question that failed outside the policy (its search was down) is not counted, and said; where
that is more than rollout.max_failed_fraction of them, there is no accuracy and the exit code is 2.

Prompt, tools and limits are those the policy was trained with: the recipe.yaml in its folder,
unless --recipe says another. Where the task file's folder holds a corpus.jsonl or an
image_index.jsonl, the search tools use these.
"""

_INDEXES = {"tools.corpus": "corpus.jsonl", "tools.image_index": "image_index.jsonl"}


def main(argv: Sequence[str]) -> None:
    """Evaluate and print."""
    arguments = _parser().parse_intermixed_args(argv)
    model, tasks = Path(arguments.model), Path(arguments.tasks)
    path = Path(arguments.recipe) if arguments.recipe else model / "recipe.yaml"
    if not path.is_file():
        raise ConfigError(
            f"eval: {path} does not exist, so prompt and tools are unknown; wanted --recipe FILE"
        )
    if arguments.questions < 0:
        raise ConfigError(f"eval: --questions is {arguments.questions}; wanted 0 or more")
    if not tasks.exists():
        raise ConfigError(f"eval: --tasks {tasks} does not exist; wanted a task file")
    out = Path(arguments.out) if arguments.out else None
    if out is not None and out.is_dir():
        raise ConfigError(f"eval: --out {out} is a folder; wanted a file to write")
    if out is not None:
        require_writable(out.parent, field="eval: --out")
    recipe = load_recipe(path, eval_overrides(model, tasks, arguments.overrides))

    from tapo_train import runs  # loads torch and vllm

    print(runs.evaluate(recipe, tasks=tasks, num_questions=arguments.questions, out=out))


def eval_overrides(model: Path, tasks: Path, overrides: Sequence[str]) -> list[str]:
    """The user's overrides, after those that model and task file bring along."""
    folder = tasks if tasks.is_dir() else tasks.parent
    found = {key: folder / name for key, name in _INDEXES.items() if (folder / name).is_file()}
    implied = {"model.path": model, **found}
    return [*(f"{key}={quoted(value)}" for key, value in implied.items()), *overrides]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tapo_train eval",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--tasks", required=True, metavar="FILE", help="jsonl, parquet or json")
    parser.add_argument("--recipe", metavar="FILE", help="default: recipe.yaml in the model folder")
    parser.add_argument(
        "--questions", type=int, default=0, metavar="N", help="ask only the first N; 0: all"
    )
    parser.add_argument("--out", metavar="FILE", help="write the trajectories (jsonl) there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    return parser
