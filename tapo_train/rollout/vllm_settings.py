"""What vLLM is told in this process (`vllm_engine.py`) and as a server (`servers/`) alike."""

from __future__ import annotations

from typing import Any

from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.engine import GenerationRequest

BAN_BIAS = -100.0
"""vLLM's lowest logit bias: e^-100 of a competitor's probability is zero in float32."""
CPU_CACHE_BLOCK = 32
"""[tokens] unit in which keys and values are reused on CPU; the default of 128 loses a third of the
reusable keys of short turns."""
MIN_PREFILL = 4096
"""[tokens] prefilled in one step at least, where prefills are not chunked."""


def bans(chat: ChatFormat) -> dict[int, float]:
    """Bias of the ids that a policy never samples."""
    return dict.fromkeys(chat.banned_token_ids, BAN_BIAS)


def sampling_parameters(
    request: GenerationRequest, *, end: int, bias: dict[int, float]
) -> dict[str, Any]:
    """Of vLLM, for one request; `end` is the only token that ends a turn."""
    return {
        "temperature": request.sampling.temperature,
        "top_p": request.sampling.top_p,
        "top_k": request.sampling.top_k,
        "seed": request.sampling.request_seed(request.id),
        "max_tokens": request.max_tokens,
        "stop_token_ids": [end],
        "ignore_eos": True,
        "logit_bias": bias,
        "logprobs": 0,
        "detokenize": False,
    }
