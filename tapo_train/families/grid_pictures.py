"""Families whose pictures are a grid of patches of any size, with positions in three dimensions.

Qwen's image processor and its many heirs: `pixel_values` are rows of patches, all pictures one
after the other, and `image_grid_thw` says how many each has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tapo_train.errors import AlignmentError, LearnerError
from tapo_train.families.family import Family, PackedInputs, PictureIds, Place
from tapo_train.families.vision_shape import VisionShape

if TYPE_CHECKING:
    import PIL.Image
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GridPictures(Family):
    """See `Family`."""

    auto_class: Literal["AutoModelForCausalLM", "AutoModelForImageTextToText"] = (
        "AutoModelForImageTextToText"
    )
    language: str = "language_model."
    tower: tuple[str, ...] = ("visual",)
    patch_projection: str | None = "visual.patch_embed.proj"
    opening: str = "vision_start_token_id"
    closing: str = "vision_end_token_id"
    """Names in the configuration of the ids around a picture."""

    def picture_ids(self, config: Any) -> PictureIds:
        """See `Family.picture_ids`."""
        vision = self.vision_shape(config)
        side = vision.merge_size
        return PictureIds(
            image=config.image_token_id,
            video=config.video_token_id,
            opening=(getattr(config, self.opening),),
            closing=(getattr(config, self.closing),),
            merge_size=side,
            smallest=((side * side, vision.patch_width), (1, side, side)),
        )

    def vision_shape(self, config: Any) -> VisionShape:
        """See `Family.vision_shape`."""
        vision = config.vision_config
        channels = getattr(vision, "in_channels", None) or vision.in_chans
        windowed = getattr(vision, "fullatt_block_indexes", None)
        deep = getattr(vision, "deepstack_visual_indexes", None) or ()
        side = vision.window_size // vision.patch_size if windowed is not None else 0
        return VisionShape(
            layers=vision.depth,
            hidden=vision.hidden_size,
            intermediate=vision.intermediate_size,
            mlp_matrices=2 if windowed is None else 3,
            patch_width=channels * vision.temporal_patch_size * vision.patch_size**2,
            merge_size=vision.spatial_merge_size,
            out=vision.out_hidden_size,
            mergers=1 + len(deep),
            window=None if windowed is None else side * side,
            full_layers=vision.depth if windowed is None else len(windowed),
            positions=getattr(vision, "num_position_embeddings", 0),
        )

    def num_tokens(self, processor: Any, *, height: int, width: int) -> int:
        """See `Family.num_tokens`."""
        try:
            patches = processor.get_number_of_image_patches(height, width, {})
        except (ValueError, ZeroDivisionError) as error:
            raise AlignmentError(str(error)) from error
        return int(patches) // int(processor.merge_size) ** 2

    def process(self, processor: Any, rgb: PIL.Image.Image, **options: Any) -> tuple[Any, Tensor]:
        """See `Family.process`."""
        batch = processor(images=[rgb], return_tensors="pt", **options)
        return batch, batch["image_grid_thw"]

    def positions(self, body: Any, tokens: Tensor, types: Tensor, grids: Tensor) -> Tensor:
        """[3, T]; see `Family.positions`."""
        try:
            index = body.get_rope_index
        except AttributeError as error:
            raise LearnerError(f"{type(body).__name__} has no get_rope_index") from error
        answer: Tensor = index(
            tokens[None], types[None], image_grid_thw=grids if len(grids) else None
        )[0]
        return answer[:, 0]

    def body_inputs(
        self, body: Any, inputs: PackedInputs, part: slice, place: Place
    ) -> dict[str, Any]:
        """See `Family.body_inputs`."""
        seen = body.get_image_features(inputs.pixel_values, inputs.grids, return_dict=True)
        seen.pooler_output = place(seen.pooler_output)
        if hasattr(seen, "deepstack_features"):
            seen.deepstack_features = [place(layer) for layer in seen.deepstack_features]
        return {
            "mm_token_type_ids": inputs.token_types[:, part],
            "mm_encoder_outputs": {"image": seen},
        }

    def prompt_inputs(
        self, body: Any, tokens: Tensor, types: Tensor, pixels: dict[str, Tensor]
    ) -> dict[str, Any]:
        """See `Family.prompt_inputs`."""
        # The model keeps the position offset of its last pictures on itself and would
        # apply it to a sequence without pictures.
        body.rope_deltas = None
        return {"mm_token_type_ids": types.int(), **pixels}
