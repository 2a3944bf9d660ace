"""Whether a recipe fits this machine, before anything large is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoConfig

from tapo_train.build.device import DEVICE
from tapo_train.errors import ConfigError
from tapo_train.learner import distributed
from tapo_train.learner.shape import ModelShape
from tapo_train.recipe.compose import Recipe
from tapo_train.recipe.memory_fit import describe, misfits
from tapo_train.recipe.memory_plan import Device


def this_device() -> Device:
    """A rank's device; without a GPU its share of the host's memory."""
    count = distributed.world_size()
    if DEVICE == "cuda":
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return Device(memory_bytes=float(total), count=count)
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Device(memory_bytes=host / beside, count=count, is_gpu=False)


def require_memory(recipe: Recipe) -> None:
    """Print the plan of every phase, on the first rank.

    Raises:
        ConfigError: a phase does not fit; which field to change.
    """
    shape, device = (
        ModelShape.of(AutoConfig.from_pretrained(Path(recipe.model.path))),
        this_device(),
    )
    if distributed.rank() == 0:
        print(describe(recipe, shape, device), flush=True)
    if problems := misfits(recipe, shape, device):
        raise ConfigError("\n  ".join(["the recipe does not fit:", *problems]))
