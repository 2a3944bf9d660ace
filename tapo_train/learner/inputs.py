"""A micro-batch -> what the model's forward pass takes.

The vision tower takes part in every forward pass: where no row has a picture, the
smallest possible one is appended to the last row, untrained and, as attention is
causal, seen by no other token. Without it a rank without pictures hangs or crashes
sharded training, and adding a zero-weighted vision output to the loss instead gives
wrong gradients under ZeRO-2.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tapo_train.learner.batch import MicroBatch
from tapo_train.learner.layout import ModelLayout, PixelSource


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """Packed tensors of one forward pass; S tokens, n rows."""

    input_ids: Tensor
    """[1, S]"""
    token_types: Tensor
    """[1, S] 1 at image placeholders, 0 elsewhere."""
    positions: Tensor
    """[3, 1, S] M-RoPE positions, each row's starting at 0."""
    pixel_values: Tensor
    """[patches, width]"""
    grids: Tensor
    """[pictures, 3]"""
    boundaries: tuple[int, ...]
    """[n + 1]"""


def model_inputs(
    batch: MicroBatch, *, layout: ModelLayout, pixels: PixelSource, device: torch.device
) -> ModelInputs:
    """Pixels, positions and token types of a micro-batch, on `device`.

    Raises:
        AlignmentError: image tokens and pictures of a row disagree.
    """
    rows = [batch.input_ids[start:end] for start, end in pairwise(batch.boundaries)]
    grids, pixel_values = _pictures(batch, layout, pixels)
    for name, row, row_grids in zip(batch.row_ids, rows, grids, strict=True):
        layout.check_alignment(row, row_grids, where=f"row {name}")
    if pixel_values is None:
        pixel_values, dummy_grid = layout.dummy_picture()
        rows, grids = _with_dummy(rows, grids, layout, dummy_grid)
    types = [(row == layout.image_token_id).long() for row in rows]
    positions = [
        layout.positions(row, kind, grid)
        for row, kind, grid in zip(rows, types, grids, strict=True)
    ]
    lengths = torch.tensor([0, *(len(row) for row in rows)])
    return ModelInputs(
        input_ids=torch.cat(rows)[None].to(device),
        token_types=torch.cat(types)[None].to(device),
        positions=torch.cat(positions, dim=1)[:, None].to(device),
        pixel_values=pixel_values.to(device),
        grids=torch.cat(grids).to(device),
        boundaries=tuple(lengths.cumsum(0).tolist()),
    )


def _pictures(
    batch: MicroBatch, layout: ModelLayout, pixels: PixelSource
) -> tuple[list[Tensor], Tensor | None]:
    """Grids [pictures, 3] of each row, and the patches of all; None without a picture."""
    flat = [image for row in batch.images for image in row]
    if not flat:
        return [torch.zeros(0, 3, dtype=torch.int64) for _ in batch.images], None
    made = pixels(flat)
    grids = made["image_grid_thw"].split([len(row) for row in batch.images])
    return list(grids), made["pixel_values"]


def _with_dummy(
    rows: list[Tensor], grids: list[Tensor], layout: ModelLayout, grid: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """The last row with the smallest picture appended; without rows, a row of it alone."""
    dummy = torch.tensor(layout.dummy_tokens)
    if not rows:
        return [dummy], [grid]
    return [*rows[:-1], torch.cat((rows[-1], dummy))], [*grids[:-1], grid]
