"""New weights for the experts of vLLM 0.32's CPU build."""

from __future__ import annotations

from typing import Any


def forget_expert_kernels(model: Any) -> None:
    """Let vLLM pad and pack the expert weights that come next: it does so for a new kernel only.

    Into the kernel that there is it would copy them as they come, and compute something else.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None
