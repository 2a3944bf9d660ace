"""Change the number type of the weights in a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from tapo_train.learner import durable


def convert_weights(folder: Path, *, dtype: str) -> None:
    """Rewrite every safetensors file and the configuration's `dtype` in place.

    Args:
        dtype: "float32", "bfloat16" or "float16".
    """
    kind: torch.dtype = getattr(torch, dtype)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            names = file.keys()
            # Copies: what the file gives is a view of it, and it is written over.
            tensors = {name: file.get_tensor(name).to(kind, copy=True) for name in names}
        durable.write_tensors(path, tensors, metadata=metadata)
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    _set_dtype(config, dtype)
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _set_dtype(config: dict[str, object], dtype: str) -> None:
    """Set `dtype` here and in every nested configuration that has one."""
    config["dtype"] = dtype
    for value in config.values():
        if isinstance(value, dict) and "dtype" in value:
            _set_dtype(value, dtype)
