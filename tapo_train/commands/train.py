"""`train`: a recipe in, a run folder out."""

from __future__ import annotations

from collections.abc import Sequence

from tapo_train.commands.recipe_arguments import read_recipe, recipe_parser, say_where
from tapo_train.recipe.compose import training_updates

DESCRIPTION = """\
Train a policy with a recipe. Every field of a recipe is described in docs/recipe.md.

The run folder (run.dir) then holds the resolved recipe, a manifest, metrics.jsonl, trajectory
dumps, checkpoints and the exported policy. The same command goes on where a stopped run was.
Under torchrun each rank has its own sampler and its share of the learner.
"""


def main(argv: Sequence[str]) -> None:
    """Train, unless it is a dry run."""
    recipe = read_recipe(recipe_parser("train", DESCRIPTION), argv, updates=training_updates)
    if recipe is not None:
        from tapo_train import runs  # loads torch, vllm and deepspeed

        say_where(runs.train(recipe))
