"""Qwen2.5-VL, Qwen3-VL and its mixtures of experts, Qwen3.5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tapo_train.errors import ConfigError
from tapo_train.families.grid_pictures import GridPictures

PLACEHOLDER = "<|image_pad|>"
BANNED = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    PLACEHOLDER,
    "<|video_pad|>",
)
"""`<|endoftext|>` would be a second way to end a turn. The boxes of Qwen's other uses stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3Pictures(GridPictures):
    """See `Family`."""

    def check(self, config: Any) -> None:
        """See `Family.check`."""
        # transformers always divides the weights of the chosen experts by their sum. vLLM asks the
        # configuration, and does not start where it says nothing.
        text = config.get_text_config()
        if config.model_type == "qwen3_vl_moe" and not getattr(text, "norm_topk_prob", False):
            raise ConfigError(
                "text_config.norm_topk_prob in config.json: found none or false; wanted true, as "
                f"{self.name}'s experts are weighted so"
            )


QWEN2_5_VL = GridPictures(
    name="Qwen2.5-VL",
    model_types=("qwen2_5_vl",),
    end="<|im_end|>",
    banned=BANNED,
    placeholder=PLACEHOLDER,
)
QWEN3_VL = Qwen3Pictures(
    name="Qwen3-VL",
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    experts_transposed=True,
    end="<|im_end|>",
    banned=BANNED,
    placeholder=PLACEHOLDER,
)
QWEN3_5 = GridPictures(
    name="Qwen3.5",
    model_types=("qwen3_5", "qwen3_5_moe"),
    # Three of four layers carry a state from token to token and know no boundaries of rows.
    packs=False,
    end="<|im_end|>",
    banned=BANNED,
    placeholder=PLACEHOLDER,
)
