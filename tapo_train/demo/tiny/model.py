"""Build a tiny random Qwen3-VL or Qwen2.5-VL folder that loads like a downloaded model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tapo_train.demo.tiny.chat_template import CHAT_TEMPLATE
from tapo_train.demo.tiny.corpus import tokenizer_texts
from tapo_train.demo.tiny.tokenizer import SPECIAL_TOKENS, build_tokenizer
from tapo_train.demo.world.lexicon import SYLLABLES

Family = Literal["qwen3_vl", "qwen2_5_vl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of the language model and its vision tower; heads are 32 wide."""

    hidden: int
    layers: int
    vision_hidden: int
    vision_layers: int


SIZES = {
    "tiny": Size(hidden=128, layers=4, vision_hidden=96, vision_layers=2),
    "mini": Size(hidden=64, layers=3, vision_hidden=32, vision_layers=1),
}
"""The demo's, of about 1.6 M parameters; and one of 0.3 M for studies without pictures."""
HEAD_DIM = 32
"""The smallest that vLLM's attention knows on a CPU."""
NUM_MERGES = 700
VOCABULARY = 1280
"""Rows of the embedding; a little more than the tokenizer has."""
MAX_POSITIONS = 4096
MIN_PIXELS = 32 * 32
MAX_PIXELS = 128 * 128


def build_tiny_policy(
    out_dir: Path, *, family: Family = "qwen3_vl", seed: int = 0, size: Size = SIZES["tiny"]
) -> Path:
    """Write config, random weights (float32), tokenizer, processor and chat template."""
    tokenizer = build_tokenizer(tokenizer_texts(), syllables=SYLLABLES, num_merges=NUM_MERGES)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    if len(tokenizer) > VOCABULARY:
        raise ValueError(f"tokenizer has {len(tokenizer)} tokens, the model only {VOCABULARY}")
    torch.manual_seed(seed)
    model = _qwen3_vl(ids, size) if family == "qwen3_vl" else _qwen2_5_vl(ids, size)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    out_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out_dir)
    _processor(family, tokenizer).save_pretrained(out_dir)
    return out_dir


def _special_ids(ids: dict[str, int]) -> dict[str, int]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _text_config(ids: dict[str, int], size: Size) -> dict[str, object]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": size.hidden,
        "intermediate_size": 3 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // HEAD_DIM,
        "num_key_value_heads": size.hidden // HEAD_DIM // 2,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }


def _vision_config(size: Size, *, patch_size: int) -> dict[str, object]:
    return {
        "depth": size.vision_layers,
        "hidden_size": size.vision_hidden,
        "intermediate_size": 2 * size.vision_hidden,
        "num_heads": 4,
        "out_hidden_size": size.hidden,
        "patch_size": patch_size,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }


def _qwen3_vl(ids: dict[str, int], size: Size) -> PreTrainedModel:
    text = _text_config(ids, size) | {
        "head_dim": HEAD_DIM,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [8, 4, 4],
            "mrope_interleaved": True,
        },
    }
    vision = _vision_config(size, patch_size=16) | {
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **_special_ids(ids)
    )
    return Qwen3VLForConditionalGeneration(config)


def _qwen2_5_vl(ids: dict[str, int], size: Size) -> PreTrainedModel:
    text = _text_config(ids, size) | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    }
    vision = _vision_config(size, patch_size=14) | {
        "window_size": 56,
        "fullatt_block_indexes": [size.vision_layers - 1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **_special_ids(ids)
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _processor(family: Family, tokenizer: object) -> Qwen3VLProcessor | Qwen2_5_VLProcessor:
    patch = 16 if family == "qwen3_vl" else 14
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    options = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    images = Qwen2VLImageProcessor(**options)
    if family == "qwen3_vl":
        return Qwen3VLProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            video_processor=Qwen3VLVideoProcessor(**options),
            chat_template=CHAT_TEMPLATE,
        )
    return Qwen2_5_VLProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**options),
        chat_template=CHAT_TEMPLATE,
    )


def main(argv: Sequence[str]) -> None:
    """`python -m tapo_train.demo.tiny.model --out DIR`."""
    parser = argparse.ArgumentParser(
        prog="python -m tapo_train.demo.tiny.model",
        description="Write a small random policy as a Hugging Face folder.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--family", choices=get_args(Family), default="qwen3_vl")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    arguments = parser.parse_args(argv)
    size = SIZES[arguments.size]
    build_tiny_policy(arguments.out, family=arguments.family, seed=arguments.seed, size=size)


if __name__ == "__main__":
    main(sys.argv[1:])
