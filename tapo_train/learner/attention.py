"""Attention for packed sequences: each trajectory sees only itself.

Registered with transformers under `PACKED`. The model's own code runs unchanged on
one concatenated sequence; only the attention call looks at the boundaries. The
linear layers work on all tokens at once, and no [S, S] mask is ever built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tapo_train.learner.sequence import ALONE, SequenceGroup

PACKED = "packed"
"""Name of the attention implementation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundaries:
    """Row i of a packed sequence stands in [ends[i], ends[i + 1]); made once per forward pass.

    A copy to the device in every layer would make the host wait for the layer before.
    """

    ends: tuple[int, ...]
    """[n + 1] 0, ..., S; ascending, on the host."""
    on_device: Tensor
    """The same, int32."""
    longest: int
    """[tokens] of a row."""

    @classmethod
    def of(cls, ends: Sequence[int], device: torch.device) -> Boundaries:
        """From `ends` on the host."""
        return cls(
            ends=tuple(ends),
            on_device=torch.tensor(ends, dtype=torch.int32, device=device),
            longest=max(end - start for start, end in pairwise(ends)),
        )


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    boundaries: Boundaries,
    sequence: SequenceGroup = ALONE,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each row of a packed sequence within itself.

    Args:
        query: [1, heads, S, d]; key and value [1, kv heads, S, d]; of S / P tokens in a
            sequence group of P ranks.

    Returns:
        [1, S, heads, d] of the same tokens, and None for the weights nobody asks for.
    """
    query, key, value = sequence.to_heads(query, key, value)
    grouped = query.shape[1] != key.shape[1]
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        mixed = _flash(query, key, value, boundaries, scaling, grouped)
        return sequence.to_tokens(mixed.transpose(1, 2)).transpose(1, 2), None
    pieces = [
        scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=grouped,
        )
        for start, end in pairwise(boundaries.ends)
    ]
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
    return sequence.to_tokens(joined).transpose(1, 2), None


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Boundaries,
    scaling: float | None,
    grouped: bool,
) -> Tensor:
    """The same in one variable-length kernel (half precision on a GPU only)."""
    mixed = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        boundaries.on_device,
        boundaries.on_device,
        boundaries.longest,
        boundaries.longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=grouped,
    )
    assert isinstance(mixed, Tensor)
    return mixed[None]


AttentionInterface.register(PACKED, packed_attention)
