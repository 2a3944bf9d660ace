"""Tiny random models of every family, with the demo's tokenizer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tapo_train.demo.tiny.chat_template import CHAT_TEMPLATE
from tapo_train.demo.tiny.corpus import tokenizer_texts
from tapo_train.demo.tiny.model import NUM_MERGES, VOCABULARY
from tapo_train.demo.tiny.tokenizer import SPECIAL_TOKENS, build_tokenizer
from tapo_train.demo.world.lexicon import SYLLABLES

TEXT = {
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


@cache
def tokenizer() -> Any:
    """The demo's, with the ids of its control tokens."""
    return build_tokenizer(tokenizer_texts(), syllables=SYLLABLES, num_merges=NUM_MERGES)


def control_ids() -> dict[str, int]:
    """Of the tokenizer's control tokens."""
    return {token: tokenizer().convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}


def text_model(kind: str) -> Any:
    """A causal language model of `kind`."""
    made = {
        "llama": (LlamaForCausalLM, LlamaConfig),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    }
    model, config = made[kind]
    ids = {"eos_token_id": control_ids()["<|im_end|>"], "bos_token_id": None}
    return model(config(**TEXT, **ids))


BUILDERS = {kind: (lambda kind=kind: text_model(kind)) for kind in ("llama", "qwen2", "qwen3")}


def build(kind: str, out: Path) -> Path:
    """Write the folder of a tiny random model."""
    torch.manual_seed(0)
    BUILDERS[kind]().save_pretrained(out)
    own = tokenizer()
    own.chat_template = CHAT_TEMPLATE
    own.save_pretrained(out)
    return out
