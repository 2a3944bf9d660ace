"""Save and resume: weights, optimizer, schedule, random state of every rank, the trainer's.

    step-000010/
      manifest.json      step, ranks, sha256 of every file below
      policy/            the weights as a Hugging Face folder (what `export` copies)
      engine/            DeepSpeed's own state
      random/rank0.pt    random generators of each rank
      trainer.json       what the trainer wants back (sampler position, ...)

A checkpoint appears under its name in one rename, complete or not at all. Resuming needs
the same number of ranks, the same ZeRO stage and the same precision.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tapo_train.errors import CheckpointError
from tapo_train.learner import distributed
from tapo_train.learner.manifest import POLICY, Manifest, file_sha256, folder_name, prune
from tapo_train.learner.policy import Policy

ENGINE = "engine"
RANDOM = "random"
TRAINER = "trainer.json"


def save(
    policy: Policy, root: Path, *, step: int, extra: Mapping[str, Any], keep_last: int = 0
) -> Path:
    """Write `root/step-<step>` on all ranks together (a shared folder) and prune old ones.

    Args:
        step: finished training steps.
        extra: JSON-serialisable; rank 0's is kept.
        keep_last: newest checkpoints that stay; 0 keeps all.
    """
    final = root / folder_name(step)
    partial = root / f".{final.name}.partial"
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / RANDOM).mkdir(parents=True)
        text = json.dumps(dict(extra), indent=1, sort_keys=True)
        (partial / TRAINER).write_text(text + "\n", encoding="utf-8")
    distributed.barrier()
    policy.save_engine(partial / ENGINE)
    policy.export(partial / POLICY)
    torch.save(_random_state(), partial / RANDOM / f"rank{distributed.rank()}.pt")
    distributed.barrier()
    hashes = _hashes(partial)
    if distributed.rank() == 0:
        _manifest(policy, step, hashes).write(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        prune(root, keep_last=keep_last)
    distributed.barrier()
    return final


def load(policy: Policy, folder: Path) -> dict[str, Any]:
    """Restore everything `save` wrote; the trainer's entries.

    Raises:
        CheckpointError: a file is damaged or missing, or the checkpoint is of another
            number of ranks, stage or precision. On every rank.
    """
    manifest = Manifest.read(folder)
    _check_fits(policy, manifest, folder)
    _raise_together(_damage(manifest, folder))
    policy.load_engine(folder / ENGINE)
    path = folder / RANDOM / f"rank{distributed.rank()}.pt"
    _restore_random(torch.load(path, weights_only=True))
    entries: dict[str, Any] = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
    return entries


def _hashes(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file; each rank hashes its share."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    mine = {name: file_sha256(folder / name) for name in _share(names)}
    return {
        name: value for part in distributed.all_gather_objects(mine) for name, value in part.items()
    }


def _share(names: list[str]) -> list[str]:
    return names[distributed.rank() :: distributed.world_size()]


def _manifest(policy: Policy, step: int, hashes: Mapping[str, str]) -> Manifest:
    return Manifest(
        step=step,
        world_size=distributed.world_size(),
        zero_stage=policy.settings.zero_stage,
        precision=policy.settings.precision,
        files=hashes,
    )


def _check_fits(policy: Policy, manifest: Manifest, folder: Path) -> None:
    here = _manifest(policy, manifest.step, {})
    for name in ("world_size", "zero_stage", "precision"):
        found, wanted = getattr(manifest, name), getattr(here, name)
        if found != wanted:
            raise CheckpointError(
                f"{folder}: {name} is {found}; this run has {wanted}. Resume with the same, or "
                f"start a new run from {folder / POLICY}"
            )


def _damage(manifest: Manifest, folder: Path) -> str:
    """What is wrong with this rank's share of the files; "" if nothing is."""
    try:
        manifest.verify(folder, files=_share(sorted(manifest.files)))
    except CheckpointError as error:
        return str(error)
    return ""


def _raise_together(message: str) -> None:
    """Fail on all ranks if one found damage: a rank alone would leave the others waiting."""
    found = [text for text in distributed.all_gather_objects(message) if text]
    if found:
        raise CheckpointError("; ".join(found))


def _random_state() -> dict[str, Any]:
    """Python's, numpy's and torch's global generators, as plain values and tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.array(keys)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore_random(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
