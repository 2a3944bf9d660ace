"""Whole weights out of an engine that may have sharded them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from tapo_train.families import family_of
from tapo_train.learner import adapter, distributed, durable, engine
from tapo_train.learner.settings import LearnerSettings

GATHER_ELEMENTS = 64 * 2**20
"""Sharded weights are made whole in buckets of about this many elements."""
SHARD_SIZE = "50GB"
"""Of a weight file; transformers' own limit."""
HEAD = "lm_head.weight"
EXPERTS = ".experts."
"""In the name of a stack of expert weights."""
_LAYER = re.compile(r".*?\.(?:layers|blocks)\.\d+(?=\.|$)")
_REWRITTEN = ("config.json", "generation_config.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".index.json")


def named_weights(model: Any, *, settings: LearnerSettings) -> Iterator[tuple[str, Tensor]]:
    """Every weight whole, adapters merged in, under its Hugging Face name, bucket by bucket.

    A head tied to the embedding follows it under its own name, as an engine that repacks
    weights keeps a copy of the head. All ranks must iterate to the end; a tensor is valid
    until the next one is asked for. Experts, which transformers keep stacked, are given as they
    are saved.
    """
    head, layers = model.lm_head.weight, adapter.adapted_layers(model)
    for bucket in _buckets(model):
        with engine.gathered([parameter for _, parameter in bucket], settings=settings):
            for name, parameter in bucket:
                if adapter.is_factor(name):
                    continue
                is_adapted = name.endswith(".weight") and name.removesuffix(".weight") in layers
                weight = parameter.data
                if EXPERTS in name:
                    yield from _saved_experts(model, name, weight)
                    continue
                yield name, layers[name.removesuffix(".weight")].merged() if is_adapted else weight
                if parameter is head and name != HEAD:
                    yield HEAD, weight


def _saved_experts(model: Any, name: str, stack: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A stack of expert weights, as a folder has it."""
    is_transposed = family_of(model.config.model_type).experts_transposed
    for saved, weight in revert_weight_conversion(model, {name: stack}).items():
        # transformers does not turn these back: it looks at their shape alone, sees its own, and
        # leaves it.
        yield saved, weight.mT.contiguous() if is_transposed else weight


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A Hugging Face folder that has not been written yet: copies, whatever the model does."""

    tensors: Mapping[str, Tensor]
    texts: Mapping[str, bytes]
    """File name -> content: configuration, and the processor files of the source."""

    def write(self, folder: Path) -> dict[str, str]:
        """Write the files; sha256 by file name. No collectives: any thread may do it."""
        split = split_torch_state_dict_into_shards(dict(self.tensors), max_shard_size=SHARD_SIZE)
        hashes = {}
        for name, keys in split.filename_to_tensors.items():
            part = {key: self.tensors[key] for key in keys}
            hashes[name] = durable.write_tensors(folder / name, part, metadata={"format": "pt"})
        texts = dict(self.texts)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            texts["model.safetensors.index.json"] = text.encode()
        for name, content in texts.items():
            hashes[name] = durable.write_bytes(folder / name, content)
        return hashes


def model_files(model: Any, *, source: Path, settings: LearnerSettings) -> ModelFiles:
    """What `save_pretrained` would write, and the processor files of `source`.

    On all ranks together; only rank 0's has content.
    """
    names = {name for name, _ in model.named_parameters() if not adapter.is_factor(name)}
    whole = {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in named_weights(model, settings=settings)
        if (name in names or EXPERTS in name) and distributed.rank() == 0
    }
    if distributed.rank() != 0:
        return ModelFiles(tensors={}, texts={})
    experts = {name: whole.pop(name) for name in [*whole] if EXPERTS in name}
    return ModelFiles(
        tensors=revert_weight_conversion(model, whole) | experts,
        texts=_configuration(model) | _processor(source),
    )


def _configuration(model: Any) -> dict[str, bytes]:
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    with TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _processor(source: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(source.iterdir())
        if path.is_file() and not path.name.endswith(_WEIGHTS) and path.name not in _REWRITTEN
    }


def _buckets(model: nn.Module) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Named parameters in runs of about `GATHER_ELEMENTS`, none over the border of a layer.

    What belongs to one linear layer, its adapter included, is never divided.
    """
    bucket: list[tuple[str, nn.Parameter]] = []
    held, last = 0, ""
    for module, group in groupby(model.named_parameters(), key=lambda item: _owner(item[0])):
        parts = list(group)
        size = sum(engine.full_size(parameter) for _, parameter in parts)
        if bucket and (layer_of(module) != last or held + size > GATHER_ELEMENTS):
            yield bucket
            bucket, held = [], 0
        bucket += parts
        held, last = held + size, layer_of(module)
    if bucket:
        yield bucket


def layer_of(module: str) -> str:
    """The layer a module is part of: `….layers.3`; outside of layers the module itself."""
    found = _LAYER.match(module)
    return found.group() if found else module


def _owner(parameter: str) -> str:
    """The module a parameter belongs to; an adapted layer owns its factors."""
    return parameter.rpartition(".")[0]
