"""Encoded pictures → what the vision tower eats, each picture once.

Both caches are bounded and keyed by the picture's sha256, so a picture that is shared
by the trajectories of a group, or re-sent every turn, is decoded and processed once.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import PIL.Image
import torch

from tapo_train.data.images import FORMATS
from tapo_train.errors import AlignmentError, DataError
from tapo_train.tools.images import on_white
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

    def __len__(self) -> int:
        return len(self._entries)


class Pixels:
    """Decodes and processes pictures with the model's own image processor.

    Args:
        image_processor: of the model folder; its size limits decide the grid.
        cache_bytes: for decoded pictures and for processed ones, each.
    """

    def __init__(self, image_processor: Any, *, cache_bytes: int = 512 * 2**20) -> None:
        self._processor = image_processor
        self._merge = int(image_processor.merge_size) ** 2
        self._decoded: RecentlyUsed[PIL.Image.Image] = RecentlyUsed(limit_bytes=cache_bytes)
        self._processed: RecentlyUsed[tuple[torch.Tensor, torch.Tensor]] = RecentlyUsed(
            limit_bytes=cache_bytes
        )

    def num_tokens(self, image: Image) -> int:
        """Placeholders of a picture, computed from its size alone.

        Raises:
            AlignmentError: the processor takes no picture of this shape.
        """
        try:
            patches = self._processor.get_number_of_image_patches(image.height, image.width, {})
        except (ValueError, ZeroDivisionError) as error:
            size = f"{image.width}x{image.height} px"
            raise AlignmentError(f"image {image.sha256[:12]} of {size}: {error}") from error
        return int(patches) // self._merge

    def rgb(self, image: Image) -> PIL.Image.Image:
        """The decoded picture; transparency becomes white."""
        return self._decoded.get(image.sha256, partial(_decode, image))

    def process(self, images: Sequence[Image]) -> dict[str, torch.Tensor]:
        """`pixel_values` [sum of patches, D] and `image_grid_thw` [N, 3]; {} without pictures.

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
        batch = self._processor(images=[self.rgb(image)], return_tensors="pt")
        values, grid = batch["pixel_values"], batch["image_grid_thw"]
        found, wanted = int(grid.prod()) // self._merge, self.num_tokens(image)
        if found != wanted:
            raise AlignmentError(
                f"image {image.sha256[:12]} of {image.width}x{image.height} px has {found} "
                f"features (grid {grid[0].tolist()}); its size promises {wanted}"
            )
        return (values, grid), values.numel() * values.element_size()


def _decode(image: Image) -> tuple[PIL.Image.Image, int]:
    name = f"image {image.sha256[:12]}"
    try:
        with PIL.Image.open(io.BytesIO(image.data), formats=FORMATS) as opened:
            rgb = on_white(opened)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise DataError(f"{name} cannot be decoded: {error}") from error
    if rgb.size != (image.width, image.height):
        raise AlignmentError(
            f"{name} decodes to {rgb.width}x{rgb.height} px; "
            f"its record says {image.width}x{image.height}"
        )
    return rgb, rgb.width * rgb.height * 3
