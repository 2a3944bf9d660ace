"""What batching must know of a model: special ids, patch sizes, positions.

Read once from a loaded model, so that batching needs neither the model's class nor
its processor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tapo_train.errors import AlignmentError, LearnerError
from tapo_train.rollout.model_folder import FAMILIES
from tapo_train.types import Image

PixelSource = Callable[[Sequence[Image]], Mapping[str, Tensor]]
"""Pictures in order -> {"pixel_values": [patches, width], "image_grid_thw": [pictures, 3]}."""

PositionIndex = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(token ids [T], token types [T], grids [pictures, 3]) -> M-RoPE positions [3, T]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLayout:
    """The facts about a Qwen-VL model that batches are built from."""

    image_token_id: int
    """Placeholder; one per merged patch."""
    video_token_id: int | None
    """Never trained on; a token list that holds it is refused."""
    vision_start_token_id: int
    vision_end_token_id: int
    merge_size: int
    """Patches per side that become one token."""
    patch_width: int
    """Numbers per patch row of `pixel_values`."""
    positions: PositionIndex

    @classmethod
    def of(cls, model: Any) -> ModelLayout:
        """Read the layout of a Qwen2.5-VL or Qwen3-VL model.

        Raises:
            LearnerError: the model lacks M-RoPE or the ids of its vision tokens.
        """
        config = model.config
        body = model.model
        if config.model_type not in FAMILIES:
            raise LearnerError(
                f"model type is {config.model_type!r}; wanted one of {', '.join(FAMILIES)}, whose "
                "packed rows are known not to see each other"
            )
        vision = config.vision_config
        channels = getattr(vision, "in_channels", None) or vision.in_chans
        return cls(
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            vision_start_token_id=config.vision_start_token_id,
            vision_end_token_id=config.vision_end_token_id,
            merge_size=vision.spatial_merge_size,
            patch_width=channels * vision.temporal_patch_size * vision.patch_size**2,
            positions=_position_index(body),
        )

    @property
    def dummy_tokens(self) -> tuple[int, ...]:
        """Start, one placeholder, end: the smallest picture there is."""
        return (self.vision_start_token_id, self.image_token_id, self.vision_end_token_id)

    def dummy_picture(self) -> tuple[Tensor, Tensor]:
        """Pixels [merge^2, width] of zeros and grid [1, 3] of the smallest picture."""
        side = self.merge_size
        pixels = torch.zeros(side * side, self.patch_width)
        return pixels, torch.tensor([[1, side, side]])

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


def _position_index(body: Any) -> PositionIndex:
    """The model's own position function, for one trajectory."""

    def positions(tokens: Tensor, token_types: Tensor, grids: Tensor) -> Tensor:
        answer: Tensor = body.get_rope_index(
            tokens[None], token_types[None], image_grid_thw=grids if len(grids) else None
        )[0]
        return answer[:, 0]

    return positions
