"""Sequence parallelism (Ulysses, 2309.14509): neighbouring ranks share each micro-batch.

The P ranks of a group hold an equal slice of the packed sequence each. Whatever is done per
token (embeddings, norms, linear layers, the head at trained tokens) a rank does for its slice.
Attention needs all tokens but goes head by head, so ranks swap before and after it:

    [all heads, S / P tokens] -> [heads / P, S tokens] -> attention -> [all heads, S / P tokens]

Every rank encodes all pictures of the micro-batch and takes the features of its slice. The
log-probabilities are gathered, so that every rank sees all [K] and computes the same loss;
each follows the gradient of its own slice's only, and the sum over ranks, which the learner
takes anyway, is the gradient: the factor of data parallelism stays as it is.

A rank sends (P - 1) / P of its [S / P] queries, keys, values and outputs per layer and forward
pass, as much again in the backward pass, and once more with recomputed activations: it pays
between cards with a fast link, where a trajectory does not fit on one. Where there are fewer
key heads than ranks these are repeated before they are sent. The vision tower is not divided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from tapo_train.errors import LearnerError
from tapo_train.learner import distributed


class SequenceGroup:
    """Groups of `size` neighbouring ranks; this is the one of this rank.

    Made by all ranks together. Ranks of a group make the same calls with the same micro-batch.
    A group of one communicates nothing and changes nothing.
    """

    def __init__(self, size: int = 1) -> None:
        ranks = distributed.world_size()
        if size < 1 or ranks % size:
            raise LearnerError(
                f"sequence_parallel is {size} on {ranks} ranks; wanted a divisor of {ranks}"
            )
        self.size = size
        self.index = distributed.rank() % size
        """This rank's place in its group."""
        self.number = distributed.rank() // size
        """Of the group among all."""
        self.count = ranks // size
        """Of groups."""
        self._group: Any = distributed.neighbours(size) if size > 1 else None

    def check_heads(self, heads: int) -> None:
        """Stop unless the query heads can be dealt out evenly."""
        if heads % self.size:
            raise LearnerError(
                f"sequence_parallel is {self.size} for {heads} attention heads; wanted a divisor "
                f"of {heads}"
            )

    def part(self, length: int) -> slice:
        """This rank's tokens of `length`, a multiple of the size."""
        share = length // self.size
        return slice(self.index * share, (self.index + 1) * share)

    def entries(self, trained_index: Tensor, part: slice) -> Tensor | slice:
        """Which entries of [K] positions stand in `part`."""
        if self.size == 1:
            return slice(None)
        is_here = (trained_index >= part.start) & (trained_index < part.stop)
        places: Tensor = is_here.nonzero().flatten()
        return places

    def features(self, pictures: Sequence[Tensor], is_image: Tensor, part: slice) -> list[Tensor]:
        """The features [n, width] of the placeholders in `part`, in order.

        Args:
            pictures: features of each picture, in the order of the placeholders.
            is_image: [S] 1 at placeholders.
        """
        if self.size == 1:
            return list(pictures)
        first, number = int(is_image[: part.start].sum()), int(is_image[part].sum())
        return [torch.cat(tuple(pictures))[first : first + number]]

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All heads of S / P tokens to the heads / P of S tokens; three [1, heads, tokens, d].

        Keys and values are repeated until each rank gets as many as any; query heads meet the
        same ones as before.
        """
        if self.size == 1:
            return query, key, value
        repeats = math.lcm(key.shape[1], self.size) // key.shape[1]
        whole = [query, *(x.repeat_interleave(repeats, dim=1) for x in (key, value))]
        # One message for all three: rank r gets the r-th part of the heads of each.
        parts = torch.cat([x[0].unflatten(0, (self.size, -1)) for x in whole], dim=1)
        tokens = self._swap(parts).transpose(0, 1).flatten(1, 2)
        counts = [x.shape[1] // self.size for x in whole]
        mine, keys, values = tokens[None].split(counts, dim=1)
        return mine, keys, values

    def to_tokens(self, mixed: Tensor) -> Tensor:
        """The heads / P of S tokens to all heads of S / P tokens; [1, heads, tokens, d]."""
        if self.size == 1:
            return mixed
        parts = mixed[0].unflatten(1, (self.size, -1)).transpose(0, 1)
        return self._swap(parts).flatten(0, 1)[None]

    def all_entries(self, own: Tensor, entries: Tensor | slice, count: int) -> Tensor:
        """[2, own] values of each rank's `entries` to [2, count] of all, on every rank.

        The gradient goes back to the rank whose value it is; each rank is expected to compute
        the same loss.
        """
        if self.size == 1:
            return own
        gathered: Tensor = _Gather.apply(own, entries, count, self._group)
        return gathered

    def objects(self, value: Any) -> list[Any]:
        """The values of the group's ranks, in order, on each of them. Pickled."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def _swap(self, parts: Tensor) -> Tensor:
        swapped: Tensor = _Swap.apply(parts, self._group)
        return swapped


ALONE = SequenceGroup()
"""Every rank for itself."""


class _Swap(torch.autograd.Function):
    """[P, ...] parts for each rank to the parts from each rank, which is its own transpose."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _swapped(parts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _swapped(grads[0], ctx.group), None


def _swapped(parts: Tensor, group: Any) -> Tensor:
    sent = parts.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received


class _Gather(torch.autograd.Function):
    """Values at `entries` of [2, count] from each rank; backward, the own ones."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, entries: Tensor, count: int, group: Any) -> Tensor:
        ctx.save_for_backward(entries)
        whole = own.new_zeros(2, count)
        whole[:, entries] = own
        if count:
            dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (entries,) = ctx.saved_tensors
        return grads[0][:, entries], None, None, None
