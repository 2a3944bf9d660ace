"""`collect`: what a policy did right, as demonstrations for `sft`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tapo_train.commands.recipe_arguments import OVERRIDES_HELP, quoted
from tapo_train.recipe.compose import load_recipe
from tapo_train.report.files import require_writable

DESCRIPTION = """\
Let a policy try the training questions of a recipe, and write the attempts that were right and of
the agreed form as demonstrations (rejection sampling): one of each course of calls and answer, the
shortest first. `sft` with sft.demonstrations=[FILE] imitates them.
"""


def main(argv: Sequence[str]) -> None:
    """Play and write."""
    arguments = _parser().parse_intermixed_args(argv)
    model = [f"model.path={quoted(arguments.model)}"] if arguments.model else []
    recipe = load_recipe(arguments.recipe, [*model, *arguments.overrides])
    require_writable(arguments.out.parent, field="collect: --out")

    from tapo_train import build, collecting  # loads torch and vllm
    from tapo_train.learner import distributed

    if "WORLD_SIZE" in os.environ:
        distributed.init(device=build.DEVICE)
    found = collecting.collect_demonstrations(
        replace(recipe, rollout=replace(recipe.rollout, oversample=1.0)),
        out=arguments.out,
        rollouts=arguments.rollouts,
        per_question=arguments.per_question,
        num_questions=arguments.questions,
    )
    if os.environ.get("RANK", "0") == "0":
        print(f"{found} -> {arguments.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tapo_train collect",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    parser.add_argument("--model", metavar="DIR", help="Hugging Face folder; default model.path")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument(
        "--rollouts", type=_count, default=8, metavar="N", help="attempts at each question (8)"
    )
    parser.add_argument(
        "--per-question", type=_count, default=2, metavar="M", help="most demonstrations of one (2)"
    )
    parser.add_argument(
        "--questions", type=int, default=0, metavar="N", help="only the first N; 0: all"
    )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text}, wanted a number from 1 on")
    return int(text)
