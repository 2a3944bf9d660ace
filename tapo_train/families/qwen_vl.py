"""Qwen2.5-VL, Qwen3-VL and its mixtures of experts, Qwen3.5."""

from __future__ import annotations

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

QWEN2_5_VL = GridPictures(
    name="Qwen2.5-VL",
    model_types=("qwen2_5_vl",),
    end="<|im_end|>",
    banned=BANNED,
    placeholder=PLACEHOLDER,
)
QWEN3_VL = GridPictures(
    name="Qwen3-VL",
    model_types=("qwen3_vl", "qwen3_vl_moe"),
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
