"""Encoded pictures → what the vision tower eats, each picture once.

The cache is bounded and keyed by the picture's sha256, so a picture that is shared
by the trajectories of a group, or re-sent every turn, is decoded and processed once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import PIL.Image
import torch

from tapo_train.errors import AlignmentError, DataError, ToolError
from tapo_train.families import Family
from tapo_train.tools.images import ImageDecoder
from tapo_train.types import Image

Value = TypeVar("Value")


class RecentlyUsed(Generic[Value]):
    """A least-recently-used cache bounded by the bytes of its values."""

    def __init__(self, *, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._held = 0
        self._entries: OrderedDict[str, tuple[Value, int]] = OrderedDict()

    def get(self, key: str, make: Callable[[], tuple[Value, int]]) -> Value:
        """The value of `key`; `make` returns a missing one with its size in bytes."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key][0]
        value, size = make()
        self._entries[key] = (value, size)
        self._held += size
        while self._held > self._limit and len(self._entries) > 1:
            self._held -= self._entries.popitem(last=False)[1][1]
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._held = 0

    def __len__(self) -> int:
        return len(self._entries)


class Pixels:
    """Decodes and processes pictures with the model's own image processor.

    Args:
        family: how the processor is asked.
        image_processor: of the model folder; its size limits decide the grid. None: a model
            without pictures.
        merge_size: patches per side that become one token.
        decoder: the one of this process, which the tools use as well.
        cache_bytes: for processed pictures.
    """

    def __init__(
        self,
        family: Family,
        image_processor: Any,
        decoder: ImageDecoder,
        *,
        merge_size: int,
        cache_bytes: int,
    ) -> None:
        self._family = family
        self._processor = image_processor
        self._merge = merge_size**2
        self._decoder = decoder
        self._processed: RecentlyUsed[tuple[torch.Tensor, torch.Tensor]] = RecentlyUsed(
            limit_bytes=cache_bytes
        )

    def num_tokens(self, image: Image) -> int:
        """Placeholders of a picture, computed from its size alone.

        Raises:
            AlignmentError: the model takes no picture of this shape, or none at all.
        """
        try:
            return self._family.num_tokens(self._processor, height=image.height, width=image.width)
        except AlignmentError as error:
            size = f"{image.width}x{image.height} px"
            raise AlignmentError(f"image {image.sha256[:12]} of {size}: {error}") from error

    def rgb(self, image: Image) -> PIL.Image.Image:
        """The decoded picture; transparency becomes white."""
        try:
            rgb = self._decoder.decode(image)
        except ToolError as error:
            raise DataError(str(error)) from error
        if rgb.size != (image.width, image.height):
            raise AlignmentError(
                f"image {image.sha256[:12]} decodes to {rgb.width}x{rgb.height} px; "
                f"its record says {image.width}x{image.height}"
            )
        return rgb

    def process(self, images: Sequence[Image]) -> dict[str, torch.Tensor]:
        """`pixel_values` [sum of rows, ...] and `image_grid_thw` [N, 3]; {} without pictures.

        Raises:
            AlignmentError: a picture's features differ in number from its placeholders.
        """
        if not images:
            return {}
        parts = [self._processed.get(i.sha256, partial(self._process, i)) for i in images]
        return {
            "pixel_values": torch.cat([values for values, _ in parts]),
            "image_grid_thw": torch.cat([grid for _, grid in parts]),
        }

    def _process(self, image: Image) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:
        batch, grid = self._family.process(self._processor, self.rgb(image))
        values = batch["pixel_values"]
        found, wanted = int(grid.prod()) // self._merge, self.num_tokens(image)
        if found != wanted:
            raise AlignmentError(
                f"image {image.sha256[:12]} of {image.width}x{image.height} px has {found} "
                f"features (grid {grid[0].tolist()}); its size promises {wanted}"
            )
        return (values, grid), values.numel() * values.element_size()
