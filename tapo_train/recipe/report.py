"""What a run writes down of its trajectories."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from tapo_train.recipe.custom import CustomOrPath
from tapo_train.recipe.values import STRICT, CountOrZero


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Report:
    """Dumps of trajectories: `rollouts/`, `tokens/`, `scores/` and `images/` of the run folder."""

    dump_every: CountOrZero = 1
    """[steps] Steps it divides are dumped, the first one among them; 0: none. 1024 trajectories of
    8000 tokens take some 80 MB without their pictures. In steps that are dumped the update measures
    the entropy of each trained token, which costs it a softmax."""
    dump_images: Literal["all", "roots", "none"] = "all"
    """roots leaves out what was cut from another picture: each row says which one, and where."""
    wandb_samples: CountOrZero = 4
    """Attempts of each dumped step in a table in wandb, with pictures and credit: corrected ones
    first, half of them at most; 0: no table."""
    sink: CustomOrPath | None = None
    """Where metrics go besides, by import path: (step, metrics), called on rank 0 after each step;
    its close(), if it has one, at the end."""
