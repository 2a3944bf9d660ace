"""Where DeepSpeed keeps the float32 master of every parameter, by ZeRO stage.

The masters of many parameters are laid end to end and the row is dealt out to the ranks; how
depends on the stage, the number of ranks and DeepSpeed's version. This file alone knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """Elements [start, start + length) of a flattened parameter on this rank."""

    name: str
    start: int
    length: int
    master: Tensor
    """What torch's optimizer steps; its state is filed under this tensor."""
    offset: int
    """Of the fragment in the flattened master."""
    is_replicated: bool
    """Whether every rank holds the same."""

    def of(self, tensor: Tensor) -> Tensor:
        """The fragment's part of a tensor laid out like the master, as a view [length]."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters that are updated."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def fragments_of(engine: Any, model: nn.Module) -> list[Fragment]:
    """This rank's fragments of all trained parameters of `model`."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        find = _in_stage_3
    elif hasattr(wrapper, "fp32_groups"):
        find = _in_unfused
    elif isinstance(wrapper, torch.optim.Optimizer):
        find = _in_plain
    else:
        find = _in_flat_groups
    return [f for name, p in trained(model) for f in find(wrapper, name, p) if f.length]


def refresh_model(engine: Any) -> None:
    """Make the model's weights those of the masters, on all ranks together."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        wrapper.checkpoint_event_prologue()
        for group in range(len(wrapper.fp16_groups)):
            wrapper._reassign_or_swap_out_partitioned_parameters(group)
        wrapper.checkpoint_event_epilogue()
    elif hasattr(wrapper, "fp32_groups"):
        for group, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for parameter, master in zip(group, masters, strict=True):
                parameter.data.copy_(master.data)
    elif hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()


def _in_plain(wrapper: Any, name: str, parameter: nn.Parameter) -> list[Fragment]:
    """ZeRO-0 in float32: torch's optimizer steps the model's own parameters."""
    return [_whole(name, parameter, parameter)]


def _in_unfused(wrapper: Any, name: str, parameter: nn.Parameter) -> list[Fragment]:
    """ZeRO-0 in bfloat16: a float32 copy of every parameter."""
    pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
    return [
        _whole(name, parameter, master)
        for group, masters in pairs
        for candidate, master in zip(group, masters, strict=True)
        if candidate is parameter
    ]


def _in_flat_groups(wrapper: Any, name: str, parameter: Any) -> list[Fragment]:
    """ZeRO-1 and 2: the flattened groups, cut into equal parts wherever that falls."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return []
    flat = getattr(wrapper, "single_partition_of_fp32_groups", None)
    masters = wrapper.fp32_groups_flat_partition if flat is None else flat
    return [
        Fragment(
            name=name,
            start=mapping.lp_fragment_address.start,
            length=mapping.lp_fragment_address.numel,
            master=masters[mapping.param_group_index],
            offset=mapping.hp_fragment_address.start,
            is_replicated=False,
        )
    ]


def _in_stage_3(wrapper: Any, name: str, parameter: Any) -> list[Fragment]:
    """ZeRO-3: every parameter in equal parts, the last one padded."""
    group, offset, part = wrapper.grad_position[wrapper.get_param_id(parameter)]
    start = part * wrapper._get_param_partition_rank(parameter)
    return [
        Fragment(
            name=name,
            start=start,
            length=max(0, min(part, parameter.ds_numel - start)),
            master=wrapper.fp32_partitioned_groups_flat[group],
            offset=offset,
            is_replicated=False,
        )
    ]


def _whole(name: str, parameter: nn.Parameter, master: Tensor) -> Fragment:
    return Fragment(
        name=name,
        start=0,
        length=parameter.numel(),
        master=master,
        offset=0,
        is_replicated=True,
    )
