"""image_zoom_in_tool: cut a region out of a picture of the conversation."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
)

from tapo_train.errors import ToolArgumentError
from tapo_train.tools.base import ToolContext
from tapo_train.tools.images import (
    ImageDecoder,
    encode_picture,
    image_from_bytes,
    indexed_image,
    number,
    within_pixels,
)
from tapo_train.types import Box, Image, ImageRef, Observation

MAX_ASPECT = 100.0
"""Longest side over shortest; vision processors refuse thinner strips."""


def _without_counts(schema: dict[str, Any]) -> None:
    """The description shows that there are four; keywords cost tokens in every prompt."""
    del schema["minItems"], schema["maxItems"]


class ZoomArguments(BaseModel):
    """Arguments of image_zoom_in_tool."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    bbox_2d: Annotated[
        list[Annotated[float, BeforeValidator(number)]],
        Field(
            description="[x1, y1, x2, y2], 0 to 1000 of that image",
            validation_alias=AliasChoices("bbox_2d", "bbox"),
            min_length=4,
            max_length=4,
            json_schema_extra=_without_counts,
        ),
    ]
    img_idx: Annotated[
        int,
        BeforeValidator(number),
        Field(
            description="image number, from 0",
            validation_alias=AliasChoices("img_idx", "image_index"),
        ),
    ] = 0

    @field_validator("bbox_2d")
    @classmethod
    def _inside_and_not_empty(cls, box: list[float]) -> list[float]:
        x0, y0, x1, y1 = box
        if not all(0 <= value <= 1000 for value in box):
            raise ValueError("coordinates must be 0 to 1000")
        if x0 >= x1 or y0 >= y1:
            raise ValueError("x1 < x2 and y1 < y2 are required")
        return box


class ZoomTool:
    """Crop `bbox_2d` of picture `img_idx`; the result joins the conversation.

    Pixel edges are rounded to the nearest; nothing is padded or clamped, and only what has more
    than `max_pixels` is resized. The new picture's `ImageRef` is composed from the requested box,
    not from the rounded pixels, so equal requests are equal.
    """

    name = "image_zoom_in_tool"
    description = "Zoom in on a region of an image."
    reads = frozenset({"picture"})
    arguments_model: type[BaseModel] = ZoomArguments

    def __init__(
        self, decoder: ImageDecoder, *, min_side_px: int = 16, max_pixels: int | None = None
    ) -> None:
        self._decoder = decoder
        self._min_side_px = min_side_px
        self._max_pixels = max_pixels
        self.version = f"2 min_side={min_side_px} max_pixels={max_pixels}"

    async def run(self, arguments: ZoomArguments, context: ToolContext) -> Observation:
        """The crop, after "Here is the zoomed image:"."""
        parent = indexed_image(context, arguments.img_idx, tool=self.name)
        x0, y0, x1, y1 = arguments.bbox_2d
        crop = await asyncio.to_thread(self._crop, parent, (x0, y0, x1, y1))
        return Observation(text="Here is the zoomed image:", images=(crop,))

    def _crop(self, parent: Image, box: Box) -> Image:
        edges = (
            round(box[0] / 1000 * parent.width),
            round(box[1] / 1000 * parent.height),
            round(box[2] / 1000 * parent.width),
            round(box[3] / 1000 * parent.height),
        )
        width, height = edges[2] - edges[0], edges[3] - edges[1]
        if min(width, height) < self._min_side_px:
            raise ToolArgumentError(
                f"{self.name}: the region is {width} x {height} pixels, "
                f"at least {self._min_side_px} x {self._min_side_px} are needed"
            )
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ToolArgumentError(
                f"{self.name}: the region is {width} x {height} pixels, too thin a strip"
            )
        crop = self._decoder.decode(parent).crop(edges)
        if self._max_pixels is not None:
            crop = within_pixels(crop, self._max_pixels)
        ref = compose(parent.ref, box)
        return image_from_bytes(encode_picture(crop), width=crop.width, height=crop.height, ref=ref)


def compose(parent: ImageRef, box: Box) -> ImageRef:
    """The region `box` (0 to 1000 of the parent) in the frame of the parent's root."""
    x0, y0, x1, y1 = parent.box
    width, height = x1 - x0, y1 - y0
    return ImageRef(
        root=parent.root,
        box=(
            x0 + box[0] / 1000 * width,
            y0 + box[1] / 1000 * height,
            x0 + box[2] / 1000 * width,
            y0 + box[3] / 1000 * height,
        ),
    )
