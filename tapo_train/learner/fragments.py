"""The optimizer's state by parameter name, whatever the sharding: what a checkpoint keeps.

Written as (kind, parameter, first element) -> values, the state has no trace of how it was
sharded: another number of ranks or another ZeRO stage reads it. Each rank writes and reads
only what is its own, so nothing is gathered.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tapo_train.errors import CheckpointError
from tapo_train.learner import distributed
from tapo_train.learner.sharding import Fragment, fragments_of, refresh_model, trained

WEIGHT = "weight"
SCALAR = "scalar-"
"""Begins the kind of what is one number for all elements, as the count of updates."""
_SHAPES = "shapes"


def collect(engine: Any, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copies on the CPU of this rank's share of weights and optimizer state, and metadata.

    Raises:
        CheckpointError: the optimizer keeps something that does not belong to single elements.
    """
    world, rank = distributed.world_size(), distributed.rank()
    tensors: dict[str, Tensor] = {}
    for number, fragment in enumerate(fragments_of(engine, model)):
        if fragment.is_replicated and number % world != rank:
            continue
        tensors[_key(WEIGHT, fragment)] = fragment.of(fragment.master).to("cpu", copy=True)
        for kind, value in engine.basic_optimizer.state.get(fragment.master, {}).items():
            if isinstance(value, Tensor) and value.shape == fragment.master.shape:
                tensors[_key(kind, fragment)] = fragment.of(value).to("cpu", copy=True)
            else:
                tensors[_key(SCALAR + kind, fragment)] = _number(kind, value)
    shapes = {name: _shape(parameter) for name, parameter in trained(model)}
    return tensors, {_SHAPES: json.dumps(shapes)}


def restore(engine: Any, model: nn.Module, paths: Iterable[Path]) -> None:
    """Fill master weights and optimizer state from files that `collect` filled, then the model.

    Raises:
        CheckpointError: the files hold other parameters, or not all of them.
    """
    with ExitStack() as stack, torch.no_grad():
        stored = StoredFragments(paths, stack)
        stored.require({name: _shape(parameter) for name, parameter in trained(model)})
        for fragment in fragments_of(engine, model):
            fragment.of(fragment.master).copy_(stored.read(WEIGHT, fragment))
            for kind in stored.kinds(fragment.name):
                _fill(engine.basic_optimizer, fragment, kind, stored.read(kind, fragment))
    refresh_model(engine)


class StoredFragments:
    """The fragments in the files of all ranks of a checkpoint.

    Args:
        paths: safetensors files.
        stack: closes them.
    """

    def __init__(self, paths: Iterable[Path], stack: ExitStack) -> None:
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        self._shapes: dict[str, list[int]] = {}
        self._where = ""
        for path in paths:
            self._where = str(path.parent)
            try:
                self._index(stack.enter_context(safe_open(path, framework="pt")))
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path}: not a file of fragments ({error})") from error

    def _index(self, file: Any) -> None:
        self._shapes |= json.loads(file.metadata()[_SHAPES])
        for key in file.keys():  # noqa: SIM118
            kind, name, start = key.split("/")
            (length,) = file.get_slice(key).get_shape()
            piece = (int(start), int(start) + length, file, key)
            self._pieces.setdefault((kind, name), []).append(piece)

    def require(self, shapes: Mapping[str, list[int]]) -> None:
        """Raise unless the files hold these parameters and no others."""
        for name in sorted(shapes.keys() | self._shapes.keys()):
            found, wanted = self._shapes.get(name), shapes.get(name)
            if found != wanted:
                raise CheckpointError(
                    f"{self._where}: trained parameter {name}: the checkpoint has "
                    f"{_shown(found)}, this run {_shown(wanted)}; wanted the same model with "
                    "the same parameters frozen or adapted"
                )

    def kinds(self, name: str) -> list[str]:
        """What the optimizer keeps about a parameter."""
        return sorted(kind for kind, owner in self._pieces if owner == name and kind != WEIGHT)

    def read(self, kind: str, fragment: Fragment) -> Tensor:
        """[length] values, or [1] if there is one value for all elements."""
        pieces = self._pieces.get((kind, fragment.name), [])
        if kind.startswith(SCALAR):
            # A rank without a gradient for its part counted fewer updates.
            return torch.stack([file.get_tensor(key) for _, _, file, key in pieces]).amax(0)
        begin, end = fragment.start, fragment.start + fragment.length
        parts: list[Tensor] = []
        for start, stop, file, key in sorted(pieces, key=lambda piece: piece[:2]):
            if start <= begin < min(end, stop):
                parts.append(file.get_slice(key)[begin - start : min(end, stop) - start])
                begin = min(end, stop)
        if begin < end:
            raise CheckpointError(
                f"{self._where}: elements {begin} to {end} of {kind} of {fragment.name} are in "
                "none of the files"
            )
        return torch.cat(parts)


def _key(kind: str, fragment: Fragment) -> str:
    return f"{kind}/{fragment.name}/{fragment.start}"


def _shape(parameter: nn.Parameter) -> list[int]:
    """Of the whole parameter, sharded or not."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def _shown(shape: list[int] | None) -> str:
    return "none" if shape is None else f"one of shape {shape}"


def _number(kind: str, value: Any) -> Tensor:
    """One number of the optimizer's state as [1] float64."""
    if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
        return torch.tensor([float(value)], dtype=torch.float64)
    raise CheckpointError(
        f"the optimizer keeps {kind!r} as {type(value).__name__} of another shape than the "
        "weights; only optimizers with one value per element can be saved"
    )


def _fill(optimizer: torch.optim.Optimizer, fragment: Fragment, kind: str, values: Tensor) -> None:
    """Set one kind of state of a fragment, in place where the optimizer has it already."""
    master, state = fragment.master, optimizer.state[fragment.master]
    if not kind.startswith(SCALAR):
        if kind not in state:
            state[kind] = torch.zeros_like(master)
        fragment.of(state[kind]).copy_(values)
        return
    kind, number = kind.removeprefix(SCALAR), float(values)
    present = state.get(kind)
    if isinstance(present, Tensor):
        present.fill_(number)
    elif isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        # Where torch's own first step would put it.
        is_on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
        device = master.device if is_on_device else torch.device("cpu")
        state[kind] = torch.tensor(number, dtype=torch.float32, device=device)
    else:
        state[kind] = type(present)(number) if present is not None else int(number)
