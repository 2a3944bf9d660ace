"""`train`: a recipe in, a run folder out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from tapo_train.commands.recipe_arguments import read_recipe, recipe_parser, say_where
from tapo_train.errors import ConfigError
from tapo_train.recipe.compose import Recipe, training_updates
from tapo_train.recipe.memory_fit import describe, misfits, shape_of
from tapo_train.recipe.memory_plan import GB, Device

DESCRIPTION = """\
Train a policy with a recipe. Every field of a recipe is described in docs/recipe.md.

The run folder (run.dir) then holds the resolved recipe, a manifest, metrics.jsonl, trajectory
dumps, checkpoints and the exported policy. The same command goes on where a stopped run was.
Under torchrun each rank has its own sampler and its share of the learner.
"""


def main(argv: Sequence[str]) -> None:
    """Train, unless it is a dry run."""
    parser = recipe_parser("train", DESCRIPTION)
    parser.add_argument(
        "--device-gb",
        type=float,
        metavar="GB",
        help="with --dry-run: plan the memory of devices of this size, a phase at a time",
    )
    parser.add_argument(
        "--devices", type=int, metavar="N", help="how many of them; default the ranks of torchrun"
    )
    recipe = read_recipe(parser, argv, updates=training_updates, remark=_memory)
    if recipe is not None:
        from tapo_train import runs  # loads torch, vllm and deepspeed

        say_where(runs.train(recipe))


def _memory(recipe: Recipe, arguments: argparse.Namespace) -> str:
    """The plan of the devices that were asked for.

    Raises:
        ConfigError: it does not fit.
    """
    if arguments.device_gb is None:
        return ""
    count = arguments.devices or int(os.environ.get("WORLD_SIZE", "1"))
    device = Device(memory_bytes=arguments.device_gb * GB, count=count)
    shape, remark = shape_of(recipe)
    plan = f"{remark}{describe(recipe, shape, device)}"
    if problems := misfits(recipe, shape, device):
        raise ConfigError("\n  ".join([plan, *problems]))
    return plan
