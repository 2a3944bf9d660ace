"""A micro-batch -> what the model's forward pass takes.

A vision tower takes part in every forward pass: where no row has a picture, the
smallest possible one is appended to the last row, untrained and, as attention is
causal, seen by no other token. Without it a rank without pictures hangs or crashes
sharded training, and adding a zero-weighted vision output to the loss instead gives
wrong gradients under ZeRO-2.

A picture that several rows share (the attempts at one task) goes through the tower once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from tapo_train.errors import LearnerError
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
    """[1, S], or [3, 1, S] of M-RoPE; each row's start at 0."""
    pixel_values: Tensor
    """[rows, ...] of the distinct pictures."""
    grids: Tensor
    """[distinct, 3]"""
    pictures: tuple[int, ...]
    """Which of the distinct pictures stands at each place, in the order of the tokens."""
    boundaries: tuple[int, ...]
    """[n + 1]"""

    def to(self, device: torch.device) -> ModelInputs:
        """A copy whose tensors are on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


def model_inputs(
    batch: MicroBatch,
    *,
    layout: ModelLayout,
    pixels: PixelSource,
    multiple_of: int = 1,
) -> ModelInputs:
    """Pixels, positions and token types of a micro-batch, on the CPU as the micro-batch is.

    Args:
        multiple_of: a row of padding, untrained and seen by no other, makes S one.

    Raises:
        AlignmentError: image tokens and pictures of a row disagree.
        LearnerError: several rows, of a model that takes one at a time.
    """
    if len(batch.row_ids) > 1 and not layout.packs:
        raise LearnerError(f"{len(batch.row_ids)} rows are packed; wanted one at a time")
    rows = [batch.input_ids[start:end] for start, end in pairwise(batch.boundaries)]
    distinct = {image.sha256: image for row in batch.images for image in row}
    place = {sha256: i for i, sha256 in enumerate(distinct)}
    shown = [[place[image.sha256] for image in row] for row in batch.images]
    if distinct:
        made = pixels(list(distinct.values()))
        pixel_values, grids = made["pixel_values"], made["image_grid_thw"]
    else:
        pixel_values, grids = layout.dummy_picture()
    for name, row, pictures in zip(batch.row_ids, rows, shown, strict=True):
        layout.check_alignment(row, grids[pictures], where=f"row {name}")
    if not distinct:
        rows, shown = _with_dummy(rows, shown, layout)
    if missing := -sum(map(len, rows)) % multiple_of:
        rows = [*rows, torch.full((missing,), layout.padding_token_id)]
        shown = [*shown, []]
    types = [(row == layout.image_token_id).long() for row in rows]
    positions = [
        layout.positions(row, kind, grids[pictures])
        for row, kind, pictures in zip(rows, types, shown, strict=True)
    ]
    return ModelInputs(
        input_ids=torch.cat(rows)[None],
        token_types=torch.cat(types)[None],
        positions=torch.cat(positions, dim=-1).unsqueeze(-2),
        pixel_values=pixel_values,
        grids=grids,
        pictures=tuple(i for row in shown for i in row),
        boundaries=(0, *accumulate(len(row) for row in rows)),
    )


def _with_dummy(
    rows: list[Tensor], shown: list[list[int]], layout: ModelLayout
) -> tuple[list[Tensor], list[list[int]]]:
    """The last row with the smallest picture appended; without rows, a row of it alone."""
    if layout.dummy_grid is None:
        return rows or [torch.tensor([layout.padding_token_id])], shown or [[]]
    dummy = torch.tensor(layout.dummy_tokens)
    if not rows:
        return [dummy], [[0]]
    return [*rows[:-1], torch.cat((rows[-1], dummy))], [*shown[:-1], [0]]
