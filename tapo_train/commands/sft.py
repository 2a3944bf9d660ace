"""`sft`: the supervised warm start."""

from __future__ import annotations

from collections.abc import Sequence

from tapo_train.commands.recipe_arguments import read_recipe, recipe_parser, say_where
from tapo_train.recipe.compose import warm_start_updates

DESCRIPTION = """\
Train a policy to imitate scripted demonstrations in search worlds of its own, or those that
`collect` wrote (section sft of the recipe), with the same learner and the same batches as `train`,
so that reinforcement learning starts from one that knows the format.
"""


def main(argv: Sequence[str]) -> None:
    """Train on demonstrations, unless it is a dry run."""
    recipe = read_recipe(recipe_parser("sft", DESCRIPTION), argv, updates=warm_start_updates)
    if recipe is not None:
        from tapo_train import imitating  # loads torch and deepspeed

        say_where(imitating.sft(recipe))
