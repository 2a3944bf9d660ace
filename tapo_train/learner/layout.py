"""What batching must know of a model: special ids, patch sizes, positions.

Read once from a loaded model, so that batching needs neither the model's class nor
its processor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tapo_train.errors import AlignmentError
from tapo_train.families import family_of
from tapo_train.families.family import NO_ID
from tapo_train.types import Image

PixelSource = Callable[[Sequence[Image]], Mapping[str, Tensor]]
"""Pictures in order -> {"pixel_values": [rows, ...], "image_grid_thw": [pictures, 3]}."""

PositionIndex = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(token ids [T], token types [T], grids [pictures, 3]) -> positions [T] or, of M-RoPE, [3, T]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLayout:
    """The facts about a model that batches are built from."""

    positions: PositionIndex
    packs: bool = True
    """Whether several rows may share a forward pass."""
    image_token_id: int = NO_ID
    """Placeholder; one per feature."""
    video_token_id: int | None = None
    """Never trained on; a token list that holds it is refused."""
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    """Ids before and after a picture's placeholders."""
    merge_size: int = 1
    """Patches per side that become one token."""
    dummy_shape: tuple[int, ...] = (0,)
    """Of the smallest picture's pixels."""
    dummy_grid: tuple[int, int, int] | None = None
    """[patches] t, h, w of the smallest picture; None: the model takes no pictures."""
    padding_token_id: int = 0
    """Fills a row that nobody sees."""

    @classmethod
    def of(cls, model: Any) -> ModelLayout:
        """Read the layout of a model.

        Raises:
            ConfigError: it is of no known family.
        """
        config, body = model.config, model.model
        family = family_of(config.model_type)

        def positions(tokens: Tensor, token_types: Tensor, grids: Tensor) -> Tensor:
            return family.positions(body, tokens, token_types, grids)

        ids = family.picture_ids(config)
        if ids is None:
            return cls(positions=positions, packs=family.packs)
        shape, grid = ids.smallest
        return cls(
            positions=positions,
            packs=family.packs,
            image_token_id=ids.image,
            video_token_id=ids.video,
            opening=ids.opening,
            closing=ids.closing,
            merge_size=ids.merge_size,
            dummy_shape=shape,
            dummy_grid=grid,
            padding_token_id=(0, *ids.closing)[-1],
        )

    @property
    def dummy_tokens(self) -> tuple[int, ...]:
        """The smallest picture there is; empty where there are none."""
        if self.dummy_grid is None:
            return ()
        placeholders = math.prod(self.dummy_grid) // self.merge_size**2
        return (*self.opening, *[self.image_token_id] * placeholders, *self.closing)

    def dummy_picture(self) -> tuple[Tensor, Tensor]:
        """Pixels of zeros and grid [1, 3] of the smallest picture; nothing where there are none."""
        grids = [] if self.dummy_grid is None else [self.dummy_grid]
        return torch.zeros(self.dummy_shape), torch.tensor(grids, dtype=torch.int64).view(-1, 3)

    def check_alignment(self, tokens: Tensor, grids: Tensor, *, where: str) -> None:
        """Stop unless every run of placeholders is as long as its picture has features.

        Args:
            tokens: [T] of one trajectory; `grids`: [pictures, 3], patches in t, h, w.

        Raises:
            AlignmentError: runs and pictures differ in number or length.
        """
        if self.video_token_id is not None and bool((tokens == self.video_token_id).any()):
            raise AlignmentError(f"{where}: the tokens hold a video placeholder; wanted none")
        is_image = torch.nn.functional.pad(tokens == self.image_token_id, (1, 1)).int()
        edges = is_image.diff()
        runs = (edges == -1).nonzero().flatten() - (edges == 1).nonzero().flatten()
        features = grids.prod(dim=1) // self.merge_size**2
        if runs.tolist() != features.tolist():
            raise AlignmentError(
                f"{where}: runs of image tokens have lengths {runs.tolist()}, the pictures have "
                f"{features.tolist()} features; wanted the same, in order"
            )
