"""Causal language models without pictures: Llama's architecture and its many heirs."""

from __future__ import annotations

from tapo_train.families.family import Family

LLAMA = Family(name="Llama (and SmolLM2)", model_types=("llama",))
QWEN2 = Family(name="Qwen2.5", model_types=("qwen2",))
QWEN3 = Family(name="Qwen3", model_types=("qwen3", "qwen3_moe"))
