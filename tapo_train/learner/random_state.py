"""The global random generators of this process as tensors."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tapo_train.errors import CheckpointError

_REST = "rest"


def collect() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Python's, numpy's and torch's generators, and metadata with their few scalars."""
    version, words, next_gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.array(keys, dtype=np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state().cpu()
    return tensors, {_REST: json.dumps([version, next_gauss, kind, *rest])}


def restore(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Put the generators where `collect` found them."""
    try:
        version, next_gauss, kind, *rest = json.loads(metadata[_REST])
        random.setstate((version, tuple(tensors["python"].tolist()), next_gauss))
        np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *rest))
        torch.set_rng_state(tensors["torch"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"not the state of random generators ({error})") from error
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
