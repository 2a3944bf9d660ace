"""Low-rank adapters (LoRA, Hu et al. 2021): the door to peft.

An adapted linear layer computes W x + s B A x with a frozen W; only A [rank, in] and
B [out, rank] are trained, s = alpha / rank, and B starts at zero. Engines and exports never
see adapters: they are given W + s B A under the weight's own name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tapo_train.errors import LearnerError
from tapo_train.learner.settings import AdapterSettings

_NAME = "default"
_BASE = ".base_layer"
_FACTOR = re.compile(rf"\.lora_[AB]\.{_NAME}\.weight$")


def add(model: nn.Module, *, settings: AdapterSettings, in_vision: bool) -> None:
    """Freeze `model` and give the linear layers that `settings` names an adapter, in place.

    A is drawn from `settings.seed` alone, so that all ranks and a resumed run have the same.

    Raises:
        LearnerError: a target names no linear layer, or only ones that stay frozen or the LM head.
    """
    import peft  # here, as it takes seconds and most runs have no adapter

    places = "model." if in_vision else "model.language_model."
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    reachable = [name for name in layers if name.startswith(places)]
    for target in settings.targets:
        if not any(name.endswith(f".{target}") for name in reachable):
            is_frozen = any(f".{name}".endswith(f".{target}") for name in layers)
            raise LearnerError(
                f"model.lora.targets: found {target!r}, which names "
                f"{'only layers that stay frozen' if is_frozen else 'no linear layer'}; wanted of "
                f"{', '.join(sorted({name.rpartition('.')[2] for name in reachable}))}"
            )
    # Whole names, as other modules end in the same ones.
    targets = [n for n in reachable if n.endswith(tuple(f".{t}" for t in settings.targets))]
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        target_modules=targets,
        lora_dropout=0.0,
    )
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        peft.inject_adapter_in_model(config, model, adapter_name=_NAME)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapters, exactly: their products are scaled by zero.

    They still run: sharded training expects the same modules in the same order as ever.
    """
    layers = list(adapted_layers(model).values())
    for layer in layers:
        layer.set_scale(_NAME, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(_NAME, 1.0)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Name in the model without adapters -> layer with one."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def is_factor(name: str) -> bool:
    """Whether this is the name of an A or B, which no engine knows."""
    return _FACTOR.search(name) is not None


def adapted_module(parameter: str) -> str | None:
    """The adapted layer that a parameter of this name is part of; None if it is of no such."""
    module, found, _ = parameter.partition(_BASE)
    if not found and is_factor(parameter):
        module, found = _FACTOR.sub("", parameter), "yes"
    return module if found else None


def original_name(name: str) -> str:
    """The name of a parameter in the model without adapters."""
    return name.replace(_BASE, "")


def merged(weight: Tensor, layer: Any) -> Tensor:
    """W + s B A in float32, then in the type of W; W itself is not changed."""
    first, second = layer.lora_A[_NAME].weight.data, layer.lora_B[_NAME].weight.data
    change: Tensor = second.float() @ first.float()
    return change.mul_(layer.scaling[_NAME]).add_(weight).to(weight.dtype)
