"""InternVL in the form of transformers (`…-hf`): pictures are cut into square tiles.

A tile of 448 pixels is 256 placeholders, whatever it shows. A picture of several tiles is followed
by a small one of itself, which is one tile more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tapo_train.errors import ConfigError
from tapo_train.families.family import Family, PackedInputs, PictureIds, Place
from tapo_train.families.vision_shape import VisionShape

if TYPE_CHECKING:
    import PIL.Image
    from torch import Tensor

PATCH = 14
"""[pixels] side of a patch."""
MERGE = 2
"""Patches per side that become one token."""
TEXT_MODELS = ("qwen2", "qwen3")
TILED = {"crop_to_patches": True}
"""As InternVL's processor asks its image processor, which does not cut of its own accord."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles(Family):
    """See `Family`."""

    auto_class: Literal["AutoModelForCausalLM", "AutoModelForImageTextToText"] = (
        "AutoModelForImageTextToText"
    )
    language: str = "language_model."
    tower: tuple[str, ...] = ("vision_tower", "multi_modal_projector")

    def check(self, config: Any) -> None:
        """See `Family.check`."""
        said = (
            ("vision_config.patch_size", _side(config.vision_config.patch_size), (PATCH,)),
            ("downsample_ratio", config.downsample_ratio, (1 / MERGE,)),
            # vLLM has no others.
            ("vision_feature_layer", config.vision_feature_layer, (-1,)),
            ("vision_feature_select_strategy", config.vision_feature_select_strategy, ("default",)),
            ("text_config.model_type", config.text_config.model_type, TEXT_MODELS),
        )
        for name, found, wanted in said:
            if found not in wanted:
                choice = " or ".join(map(repr, wanted))
                raise ConfigError(f"{name} in config.json: found {found!r}; wanted {choice}")

    def picture_ids(self, config: Any) -> PictureIds:
        """See `Family.picture_ids`."""
        side = _side(config.vision_config.image_size)
        patches = side // PATCH
        return PictureIds(
            image=config.image_token_id,
            video=None,
            opening=(),
            closing=(),
            merge_size=MERGE,
            smallest=((1, config.vision_config.num_channels, side, side), (1, patches, patches)),
        )

    def vision_shape(self, config: Any) -> VisionShape:
        """See `Family.vision_shape`."""
        vision = config.vision_config
        tile = (_side(vision.image_size) // PATCH) ** 2
        return VisionShape(
            layers=vision.num_hidden_layers,
            hidden=vision.hidden_size,
            intermediate=vision.intermediate_size,
            mlp_matrices=2,
            patch_width=vision.num_channels * PATCH**2,
            merge_size=MERGE,
            out=config.get_text_config().hidden_size,
            mergers=1,
            window=tile,
            full_layers=0,
            positions=tile + 1,
        )

    def num_tokens(self, processor: Any, *, height: int, width: int) -> int:
        """See `Family.num_tokens`."""
        tiles, side = processor.get_number_of_image_patches(height, width, TILED), processor.size
        return int(tiles * (side["height"] // (PATCH * MERGE)) ** 2)

    def process(self, processor: Any, rgb: PIL.Image.Image, **options: Any) -> tuple[Any, Tensor]:
        """See `Family.process`."""
        batch = processor(images=[rgb], return_tensors="pt", **TILED | options)
        tiles = batch["image_num_patches"] = batch.pop("num_patches")
        # vLLM wants it, keeps it, and reads it nowhere.
        batch["image_token_id"] = tiles.new_zeros(())
        _, _, height, width = batch["pixel_values"].shape
        return batch, tiles.new_tensor([[int(tiles), height // PATCH, width // PATCH]])

    def body_inputs(
        self, body: Any, inputs: PackedInputs, part: slice, place: Place
    ) -> dict[str, Any]:
        """See `Family.body_inputs`."""
        import torch  # not above: shapes of models are read without it

        seen = body.get_image_features(inputs.pixel_values, return_dict=True)
        tiles = seen.pooler_output.split(inputs.grids[:, 0].tolist())
        seen.pooler_output = torch.cat(place([picture.flatten(0, 1) for picture in tiles]))
        return {"mm_encoder_outputs": {"image": seen}}

    def prompt_inputs(
        self, body: Any, tokens: Tensor, types: Tensor, pixels: dict[str, Tensor]
    ) -> dict[str, Any]:
        """See `Family.prompt_inputs`."""
        return {"pixel_values": pixels["pixel_values"]} if pixels else {}


def _side(size: Any) -> int:
    """Of a square, which a configuration writes as one number or as two."""
    return int(size) if isinstance(size, int) else int(size[0])


INTERN_VL = Tiles(
    name="InternVL",
    model_types=("internvl",),
    placeholder="<IMG_CONTEXT>",
    around=("<img>", "</img>"),
)
