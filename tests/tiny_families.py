"""Tiny random models of every family, with the demo's tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

from tapo_train.demo.tiny.chat_template import CHAT_TEMPLATE
from tapo_train.demo.tiny.corpus import tokenizer_texts
from tapo_train.demo.tiny.model import MAX_PIXELS, MIN_PIXELS, NUM_MERGES, VOCABULARY
from tapo_train.demo.tiny.tokenizer import build_tokenizer
from tapo_train.demo.world.lexicon import SYLLABLES

TEXT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
EXPERTS: Mapping[str, int] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
}
TOWER: Mapping[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
GLM_PICTURE = "<|begin_of_image|><|image|><|end_of_image|>"
GLM_TOKENS = (
    *("begin_of_image", "image", "end_of_image"),
    *("begin_of_video", "video", "end_of_video"),
)
TILE = 56
"""[pixels] side of a tile of InternVL: four placeholders."""
SIZE = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}


@cache
def tokenizer() -> Any:
    """The demo's, and GLM's names of the tokens around a picture."""
    made = build_tokenizer(tokenizer_texts(), syllables=SYLLABLES, num_merges=NUM_MERGES)
    glm = [f"<|{name}|>" for name in GLM_TOKENS]
    made.add_tokens([AddedToken(token, special=True) for token in glm])
    return made


def _id(token: str) -> int:
    return int(tokenizer().convert_tokens_to_ids(token))


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **more}}


def text_model(kind: str, **more: Any) -> Any:
    """A causal language model, `kind` as in `KindForCausalLM`."""
    config = getattr(transformers, f"{kind}Config")(**TEXT, **_rope(), **more)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def _seeing(kind: str, text: Mapping[str, Any], vision: Mapping[str, Any], **ids: int) -> Any:
    """A model with a tower, `kind` as in `KindForConditionalGeneration`."""
    config = getattr(transformers, f"{kind}Config")(
        text_config={**TEXT, **text},
        vision_config={**TOWER, **vision},
        tie_word_embeddings=True,
        **ids,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def _qwen_ids() -> dict[str, int]:
    return {
        "image_token_id": _id("<|image_pad|>"),
        "video_token_id": _id("<|video_pad|>"),
        "vision_start_token_id": _id("<|vision_start|>"),
        "vision_end_token_id": _id("<|vision_end|>"),
    }


def _qwen3_vl_moe() -> Any:
    text = {
        **_rope(mrope_section=[8, 4, 4], mrope_interleaved=True),
        **EXPERTS,
        "decoder_sparse_step": 1,
        # So in any case; vLLM does not start unless this is said.
        "norm_topk_prob": True,
    }
    vision = {
        "intermediate_size": 64,
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    return _seeing("Qwen3VLMoe", text, vision, **_qwen_ids())


def _qwen3_5(kind: str, **more: int) -> Any:
    text = {
        **more,
        **_rope(mrope_section=[4, 2, 2], mrope_interleaved=True, partial_rotary_factor=0.5),
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        # What vLLM's kernel for CPUs takes.
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    }
    vision = {"intermediate_size": 64, "patch_size": 16, "num_position_embeddings": 64}
    return _seeing(kind, text, vision, **_qwen_ids())


def _glm4v() -> Any:
    ids = {
        "image_token_id": _id("<|image|>"),
        "video_token_id": _id("<|video|>"),
        "image_start_token_id": _id("<|begin_of_image|>"),
        "image_end_token_id": _id("<|end_of_image|>"),
    }
    # The biases are there in any case; vLLM leaves them out unless this is said.
    text = {
        **_rope(mrope_section=[4, 2, 2], partial_rotary_factor=0.5),
        "attention_bias": True,
    }
    vision = {"intermediate_size": 64, "patch_size": 14, "image_size": 112}
    return _seeing("Glm4v", text, vision, **ids)


def _internvl() -> Any:
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT, **_rope()},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": 14,
        },
        image_token_id=_intern_tokenizer().context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=True,
    )
    return transformers.InternVLForConditionalGeneration(config)


def _qwen_processor(patch: int) -> Any:
    options = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2, "size": SIZE}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**options),
        tokenizer=tokenizer(),
        video_processor=Qwen3VLVideoProcessor(**options),
        chat_template=CHAT_TEMPLATE,
    )


def _glm_processor() -> Any:
    options = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "size": SIZE}
    return transformers.Glm4vProcessor(
        image_processor=transformers.Glm4vImageProcessor(**options),
        tokenizer=tokenizer(),
        video_processor=transformers.Glm4vVideoProcessor(**options),
        chat_template=CHAT_TEMPLATE.replace(QWEN_PICTURE, GLM_PICTURE),
    )


def _intern_tokenizer() -> Any:
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=deepcopy(tokenizer().backend_tokenizer),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=names,
    )


def _intern_processor() -> Any:
    size = {"height": TILE, "width": TILE}
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=size, max_patches=4),
        tokenizer=_intern_tokenizer(),
        video_processor=transformers.InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=CHAT_TEMPLATE.replace(QWEN_PICTURE, "<IMG_CONTEXT>\\n"),
    )


BUILDERS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "llama": (partial(text_model, "Llama"), tokenizer),
    "qwen2": (partial(text_model, "Qwen2"), tokenizer),
    "qwen3": (partial(text_model, "Qwen3"), tokenizer),
    "qwen3_moe": (partial(text_model, "Qwen3Moe", **EXPERTS), tokenizer),
    "qwen3_vl_moe": (_qwen3_vl_moe, partial(_qwen_processor, 16)),
    "qwen3_5": (partial(_qwen3_5, "Qwen3_5"), partial(_qwen_processor, 16)),
    "qwen3_5_moe": (
        partial(_qwen3_5, "Qwen3_5Moe", **EXPERTS, shared_expert_intermediate_size=40),
        partial(_qwen_processor, 16),
    ),
    "glm4v": (_glm4v, _glm_processor),
    "internvl": (_internvl, _intern_processor),
}
"""Model type -> how its model and its processor are made."""


def _turn_experts(file: Path) -> None:
    """As published models have them, and `save_pretrained` does not."""
    tensors = {
        name: tensor.mT.contiguous() if ".experts." in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


def build(kind: str, out: Path) -> Path:
    """Write the folder of a tiny random model."""
    torch.manual_seed(0)
    model, processor = BUILDERS[kind]
    made = model()
    made.generation_config.eos_token_id = _id("<|im_end|>")
    made.save_pretrained(out)
    if kind == "qwen3_vl_moe":
        _turn_experts(out / "model.safetensors")
    own = processor()
    own.chat_template = own.chat_template or CHAT_TEMPLATE
    own.save_pretrained(out)
    return out
