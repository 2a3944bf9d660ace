"""What `train` and `sft` share: a recipe, overrides, and the dry run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tapo_train.recipe.compose import (
    Recipe,
    batch_arithmetic,
    load_recipe,
    require_room_for_cosine,
    to_yaml,
)
from tapo_train.recipe.staleness import cautions

OVERRIDES_HELP = (
    "dotted.path=value or group=choice, for instance learner.lr=1e-5, algo/loss=gspo, "
    "credit=none; unknown keys and values out of range are refused"
)


def recipe_parser(command: str, description: str) -> argparse.ArgumentParser:
    """`RECIPE [override …] [--dry-run]`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m tapo_train {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML file, for instance recipes/demo_cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe and the batch arithmetic, start nothing",
    )
    return parser


def no_remark(recipe: Recipe, arguments: argparse.Namespace) -> str:
    """Nothing to say about a recipe."""
    return ""


def read_recipe(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    *,
    updates: Callable[[Recipe], int],
    remark: Callable[[Recipe, argparse.Namespace], str] = no_remark,
) -> Recipe | None:
    """The checked recipe, or None after a dry run.

    Args:
        updates: optimizer updates the command does with a recipe.
        remark: what a dry run says about the recipe besides the batch arithmetic.
    """
    arguments = parser.parse_intermixed_args(argv)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    require_room_for_cosine(recipe, updates(recipe))
    ranks = getattr(arguments, "devices", None) or int(os.environ.get("WORLD_SIZE", "1"))
    arithmetic = batch_arithmetic(recipe, ranks)
    if os.environ.get("RANK", "0") == "0":
        for caution in cautions(recipe):
            print(f"warning: {caution}", file=sys.stderr, flush=True)
    if not arguments.dry_run:
        return recipe
    if os.environ.get("RANK", "0") == "0":
        said = "".join(f"# {line}\n" for line in remark(recipe, arguments).splitlines())
        print(f"{to_yaml(recipe)}\n{said}# {arithmetic}")
    return None


def quoted(path: str | Path) -> str:
    """A path as the value of an override, whatever characters it has."""
    text = str(path).replace("'", "\\'").replace("${", "\\${")
    return f"'{text}'"


def say_where(policy: Path | None) -> None:
    """Print where the exported policy is, if there is one; on the first rank."""
    if policy is not None and os.environ.get("RANK", "0") == "0":
        print(f"policy: {policy}")
