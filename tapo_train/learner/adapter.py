"""Low-rank adapters (LoRA, Hu et al. 2021) that act through the weight they are merged into.

An adapted linear layer computes with W' = round(W + s B A) and a frozen W; only A [rank, in]
and B [out, rank] are trained, s = alpha / rank, and B starts at zero. The gradient is LoRA's:
rounding is taken for the identity.

Engines and exports never see adapters: they are given W' under the weight's own name, the very
tensor the learner computed with. Where s B A x is added beside W x instead, a learner in bf16
follows changes that the merged weight rounds away (99 % of the first update at a rate of 1e-5),
and samples come from another policy than the one that is trained. Here what has not yet reached
half a step of W waits in A and B, as it does in the float32 master weights of full training.
Merging costs out x in x rank once per pass, less than the product with a few thousand tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from tapo_train.errors import LearnerError
from tapo_train.learner.settings import AdapterSettings

_FACTORS = (".lora_A", ".lora_B")


class AdaptedLinear(nn.Linear):
    """A linear layer with a frozen weight and a low-rank change to it.

    It takes over weight and bias of the layer it replaces, so that names and files stay what
    they are, and owns all its tensors itself: sharded training gathers them together.
    """

    @classmethod
    def around(cls, layer: nn.Linear, *, settings: AdapterSettings) -> AdaptedLinear:
        """An adapted layer in the place of `layer`; A is drawn, B is zero."""
        adapted = cls(1, 1, bias=False, device="meta")
        adapted.in_features, adapted.out_features = layer.in_features, layer.out_features
        adapted.weight, adapted.bias = layer.weight, layer.bias
        # Uniform within 1 / sqrt(in), as LoRA's authors and peft draw it.
        first = torch.empty(settings.rank, layer.in_features)
        nn.init.kaiming_uniform_(first, a=math.sqrt(5))
        adapted.lora_A = nn.Parameter(first.to(layer.weight))
        adapted.lora_B = nn.Parameter(
            torch.zeros(layer.out_features, settings.rank).to(layer.weight)
        )
        adapted.scale = settings.alpha / settings.rank
        return adapted

    lora_A: nn.Parameter
    """[rank, in]"""
    lora_B: nn.Parameter
    """[out, rank]"""
    scale: float
    """s; 0 while the adapter is switched off."""

    def merged(self) -> Tensor:
        """[out, in] W' in the type of W."""
        return _merged(self.weight.data, self.lora_A.data, self.lora_B.data, self.scale)

    def forward(self, states: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        answer: Tensor = _ThroughMerged.apply(
            states, self.weight, self.bias, self.lora_A, self.lora_B, self.scale
        )
        return answer


class _ThroughMerged(torch.autograd.Function):
    """states @ W'.T + bias; W' is made again in the backward pass and never kept."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        first: Tensor,
        second: Tensor,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(states, weight, first, second)
        ctx.scale = scale
        return linear(states, _merged(weight, first, second, scale), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, first, second = ctx.saved_tensors
        grad_states = None
        if ctx.needs_input_grad[0]:
            grad_states = grads[0] @ _merged(weight, first, second, ctx.scale)
        # dL/dW' = grad.T @ states is never made: each factor meets it through the other.
        grad, rows = grads[0].flatten(0, -2), states.flatten(0, -2)
        grad_first = (grad @ second).mul_(ctx.scale).t() @ rows
        grad_second = grad.t() @ (rows @ first.t()).mul_(ctx.scale)
        return grad_states, None, None, grad_first, grad_second, None


def _merged(weight: Tensor, first: Tensor, second: Tensor, scale: float) -> Tensor:
    """W + s B A in float32, then in the type of W; W itself is not changed."""
    change = second.float() @ first.float()
    return change.mul_(scale).add_(weight).to(weight.dtype)


def add(model: nn.Module, *, settings: AdapterSettings, places: str) -> None:
    """Freeze `model` and give the linear layers that `settings` names an adapter, in place.

    A is drawn from `settings.seed` alone, so that all ranks and a resumed run have the same.

    Args:
        places: beginning of the names of layers that may get one.

    Raises:
        LearnerError: a target names no linear layer, or only ones that stay frozen or the LM head.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    reachable = [name for name in layers if name.startswith(places)]
    for target in settings.targets:
        if not any(name.endswith(f".{target}") for name in reachable):
            is_frozen = any(f".{name}".endswith(f".{target}") for name in layers)
            raise LearnerError(
                f"model.lora.targets: found {target!r}, which names "
                f"{'only layers that stay frozen' if is_frozen else 'no linear layer'}; wanted of "
                f"{', '.join(sorted({name.rpartition('.')[2] for name in reachable}))}"
            )
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        for name in reachable:
            # Whole names, as other modules end in the same ones.
            if name.endswith(tuple(f".{target}" for target in settings.targets)):
                adapted = AdaptedLinear.around(layers[name], settings=settings)
                model.set_submodule(name, adapted)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapters, exactly: their products are scaled by zero.

    They still run: sharded training expects the same modules in the same order as ever.
    """
    layers = list(adapted_layers(model).values())
    scales = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Name -> layer with an adapter."""
    return {n: module for n, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def is_factor(name: str) -> bool:
    """Whether this is the name of an A or B, which no engine knows."""
    return name.endswith(_FACTORS)
