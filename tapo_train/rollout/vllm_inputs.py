"""Our token sequences and pictures as vLLM's processed engine input.

Given a prompt, vLLM would look for the placeholders, expand them, and look up and merge the
pictures of the whole history each turn. All of that is known here: placeholders are expanded
and a picture's name is its sha256. So the image processor sees each picture once, with vLLM's
own settings for it, and a turn costs a list of its ids and one lookup per picture.

(The learner's processed pixels cannot be handed over: vLLM moves the normalisation of some
models into the vision tower. And its way through a processor that also writes and tokenises a
text takes three times as long for the same pixels.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.inputs.engine import mm_input, tokens_input
from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

from tapo_train.errors import AlignmentError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.pixels import RecentlyUsed
from tapo_train.types import Image


class InputBuilder:
    """Builds engine inputs for one engine.

    Args:
        engine: vLLM's `LLMEngine`, whose renderer knows how pictures are processed.
        cache_bytes: for processed pictures; one that was thrown out is processed again.
    """

    def __init__(self, chat: ChatFormat, engine: Any, *, cache_bytes: int) -> None:
        self._chat = chat
        self._processor: Any = None
        self._options: dict[str, Any] = {}
        if chat.family.sees:
            self._processor = engine.renderer.get_mm_processor()
            self._options = self._processor.info.ctx.get_merged_mm_kwargs({})
        self._features: RecentlyUsed[tuple[Any, int]] = RecentlyUsed(limit_bytes=cache_bytes)

    def build(self, id: str, tokens: npt.NDArray[np.int32], images: Sequence[Image]) -> Any:
        """The input of request `id`: expanded ids, features, and where they belong.

        Raises:
            AlignmentError: placeholders and features of a picture differ in number.
        """
        starts, lengths = _runs(tokens == self._chat.image_token_id)
        if len(starts) != len(images):
            raise AlignmentError(
                f"request {id}: {len(starts)} runs of image placeholders for {len(images)} images"
            )
        if not images:
            return tokens_input(tokens.tolist())
        features = [self._features.get(i.sha256, partial(self._process, i)) for i in images]
        for number, (image, length) in enumerate(zip(images, lengths, strict=True)):
            if length != features[number][1]:
                raise AlignmentError(
                    f"request {id}: image {number} ({image.width}x{image.height} px) has {length} "
                    f"placeholders at position {starts[number]} and {features[number][1]} features"
                )
        places = [
            PlaceholderRange(offset=start, length=length)
            for start, length in zip(starts, lengths, strict=True)
        ]
        return mm_input(
            tokens.tolist(),
            mm_kwargs=MultiModalKwargsItems({"image": [item for item, _ in features]}),
            mm_hashes={"image": [image.sha256 for image in images]},
            mm_placeholders={"image": places},
        )

    def _process(self, image: Image) -> tuple[tuple[Any, int], int]:
        """vLLM's item for a picture with its number of placeholders; and its bytes."""
        processor = self._processor.info.get_hf_processor().image_processor
        rgb = self._chat.rgb(image)
        found, grid = self._chat.family.process(processor, rgb, **self._options)
        fields = self._processor._get_mm_fields_config(found, {})
        (item,) = MultiModalKwargsItems.from_hf_inputs(found, fields)["image"]
        features = int(grid.prod()) // self._chat.merge_size**2
        size = sum(element.data.nbytes for element in item.values())
        return (item, features), size


def _runs(mask: npt.NDArray[np.bool_]) -> tuple[list[int], list[int]]:
    """Start and length of every run of True."""
    edges = np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return starts.tolist(), (ends - starts).tolist()
