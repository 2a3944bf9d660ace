"""propose_regions_tool: boxes that are worth a look, by any object detector of transformers.

    tools.extra:
      - path: tapo_train.systems.regions:ProposeRegionsTool
        arguments: {model: DIR, top_k: 5}

What UN-DETR (unknown objects) could be to an agent: class-agnostic boxes, the best first, in the
frame of image_zoom_in_tool. The folder holds a model that `AutoModelForObjectDetection` loads, and
its processor; nothing is fetched. It computes on the CPU, one picture at a time.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from tapo_train.tools.base import ToolContext
from tapo_train.tools.images import ImageDecoder, indexed_image, number
from tapo_train.types import Image, Observation

__all__ = ["ProposeRegionsTool", "best_boxes"]


class RegionArguments(BaseModel):
    """Arguments of propose_regions_tool."""

    model_config = ConfigDict(extra="forbid")

    img_idx: Annotated[int, BeforeValidator(number), Field(description="image number, from 0")] = 0


class ProposeRegionsTool:
    """Name the regions of a picture that hold something.

    Args:
        model: a local folder.
        top_k: boxes that are named.
    """

    name = "propose_regions_tool"
    description = "Find regions of an image that hold objects, to zoom in on."
    reads = frozenset({"picture"})
    arguments_model: type[BaseModel] = RegionArguments

    def __init__(self, model: str, top_k: int = 5) -> None:
        self._processor: Any = AutoImageProcessor.from_pretrained(model, local_files_only=True)
        self._model: Any = AutoModelForObjectDetection.from_pretrained(
            model, local_files_only=True
        ).eval()
        self._top_k = top_k
        self._decoder = ImageDecoder()
        self._one_at_a_time = threading.Lock()
        self.version = f"1 {Path(model).name} top_k={top_k}"

    async def run(self, arguments: RegionArguments, context: ToolContext) -> Observation:
        """A box per line, [x1, y1, x2, y2] in 0..1000; ToolArgumentError without such a picture."""
        image = indexed_image(context, arguments.img_idx, tool=self.name)
        boxes = await asyncio.to_thread(self._boxes, image)
        lines = [f"{rank}. {box}" for rank, box in enumerate(boxes, start=1)]
        return Observation(text="\n".join(["Regions, the most likely first:", *lines]))

    @torch.no_grad()
    def _boxes(self, image: Image) -> list[list[int]]:
        with self._one_at_a_time:
            inputs = self._processor(images=self._decoder.decode(image), return_tensors="pt")
            found = self._model(**inputs)
        return best_boxes(found.logits[0], found.pred_boxes[0], top_k=self._top_k)


def best_boxes(logits: torch.Tensor, boxes: torch.Tensor, *, top_k: int) -> list[list[int]]:
    """The boxes that most likely hold an object of any class, best first, without empty ones.

    Args:
        logits: [queries, classes + 1], the last for "no object".
        boxes: [queries, 4] centre x, centre y, width, height in [0, 1] of the picture.

    Returns:
        [x1, y1, x2, y2] in 0..1000.
    """
    objectness = 1 - logits.softmax(dim=-1)[:, -1]
    order = objectness.argsort(descending=True, stable=True)
    centre, size = boxes[order, :2], boxes[order, 2:]
    corners = torch.cat([centre - size / 2, centre + size / 2], dim=1).clamp(0, 1)
    rounded: list[list[int]] = (corners * 1000).round().long().tolist()
    whole = [box for box in rounded if box[0] < box[2] and box[1] < box[3]]
    return whole[:top_k]
