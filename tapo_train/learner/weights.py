"""Whole weights out of an engine that may have sharded them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tapo_train.learner import adapter, distributed, engine
from tapo_train.learner.settings import LearnerSettings

GATHER_ELEMENTS = 64 * 2**20
"""Sharded weights are made whole in buckets of about this many elements."""
HEAD = "lm_head.weight"
_REWRITTEN = ("config.json", "generation_config.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".index.json")


def named_weights(model: Any, *, settings: LearnerSettings) -> Iterator[tuple[str, Tensor]]:
    """Every weight whole, adapters merged in, under its Hugging Face name, bucket by bucket.

    A head tied to the embedding follows it under its own name, as an engine that repacks
    weights keeps a copy of the head. All ranks must iterate to the end; a tensor is valid
    until the next one is asked for.
    """
    head, layers = model.lm_head.weight, adapter.adapted_layers(model)
    for bucket in _buckets(model):
        with engine.gathered([parameter for _, parameter in bucket], settings=settings):
            for name, parameter in bucket:
                if adapter.is_factor(name):
                    continue
                name, weight = adapter.original_name(name), parameter.data
                layer = layers.get(name.removesuffix(".weight"))
                yield name, weight if layer is None else adapter.merged(weight, layer)
                if parameter is head and name != HEAD:
                    yield HEAD, weight


def write_folder(model: Any, folder: Path, *, source: Path, settings: LearnerSettings) -> None:
    """Write weights, configuration and the processor files of `source` as one folder.

    On all ranks together; rank 0 writes.
    """
    names = {adapter.original_name(name) for name, _ in model.named_parameters()}
    whole = {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in named_weights(model, settings=settings)
        if name in names and distributed.rank() == 0
    }
    if distributed.rank() == 0:
        model.save_pretrained(folder, state_dict=whole)
        for path in source.iterdir():
            is_weight = path.name.endswith(_WEIGHTS)
            if path.is_file() and not is_weight and path.name not in _REWRITTEN:
                shutil.copyfile(path, folder / path.name)
    distributed.barrier()


def _buckets(model: nn.Module) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Named parameters in runs of about `GATHER_ELEMENTS`."""
    bucket: list[tuple[str, nn.Parameter]] = []
    held = 0
    for name, parameter in model.named_parameters():
        size = engine.full_size(parameter)
        if bucket and held + size > GATHER_ELEMENTS:
            yield bucket
            bucket, held = [], 0
        bucket.append((name, parameter))
        held += size
    if bucket:
        yield bucket
