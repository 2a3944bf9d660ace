"""Save and resume: weights, optimizer, random state of every rank, the trainer's.

    step-000010/
      manifest.json               step, settings, score, sha256 of every file below and its own
      policy/                     the weights as a Hugging Face folder (what `export` copies)
      learner/rank0.safetensors   each rank's share of master weights and optimizer state
      random/rank0.safetensors    random generators of each rank
      trainer/rank0.json          what the trainer wants back (sampler position, ...)

A checkpoint appears under its name in one rename, complete or not at all, and on the disk
before it does. Any number of ranks, any ZeRO stage and either precision can go on from it;
learning rate, betas, schedule and the like are the new run's. No file needs unpickling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tapo_train.errors import CheckpointError
from tapo_train.learner import distributed, random_state
from tapo_train.learner.manifest import POLICY, Manifest
from tapo_train.learner.policy import Policy
from tapo_train.learner.snapshot import LEARNER, RANDOM, TRAINER, take, write

_SAME = ("optimizer", "adapter")
"""Settings without which the stored weights and optimizer state mean something else."""


def save(
    policy: Policy,
    root: Path,
    *,
    step: int,
    extra: Mapping[str, Any],
    score: float | None = None,
    keep_last: int = 0,
    keep_best: int = 0,
) -> Path:
    """Write `root/step-<step>` on all ranks together and wait for it; see `take` and `prune`."""
    snapshot = take(policy, root, step=step, extra=extra, score=score)
    final = write(snapshot, keep_last=keep_last, keep_best=keep_best)
    distributed.barrier()
    return final


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What a load found besides what it put back into the policy."""

    extra: dict[str, Any]
    """As given to `take` on the rank of the same number (modulo the ranks that wrote)."""
    changes: list[str]
    """What the run has otherwise than the checkpoint: `learning_rate 1e-06, was 2e-06`."""


def load(policy: Policy, folder: Path, *, manifest: Manifest | None = None) -> Restored:
    """Restore what `save` wrote.

    Args:
        manifest: of a folder that has passed `check`; None: it is checked here.

    Raises:
        CheckpointError: a file is damaged or missing, or the checkpoint is of other
            parameters or another optimizer. On every rank.
    """
    manifest = manifest or check(folder)
    changes = _changes(manifest, asdict(policy.settings), folder)
    policy.restore(_paths(manifest, folder, LEARNER), updates=manifest.updates)
    rank = distributed.rank()
    if rank < manifest.ranks:
        _restore_random(folder / RANDOM / f"rank{rank}.safetensors")
    path = folder / TRAINER / f"rank{rank % manifest.ranks}.json"
    return Restored(extra=json.loads(path.read_text(encoding="utf-8")), changes=changes)


def check(folder: Path) -> Manifest:
    """The manifest of an undamaged checkpoint; each rank hashes its share of the files.

    Raises:
        CheckpointError: on every rank, naming each damaged file.
    """
    manifest: Manifest | None = None
    message = ""
    try:
        manifest = Manifest.read(folder)
        share = sorted(manifest.files)[distributed.rank() :: distributed.world_size()]
        manifest.verify(folder, files=share)
    except CheckpointError as error:
        message = str(error)
    found = dict.fromkeys(text for text in distributed.all_gather_objects(message) if text)
    if found or manifest is None:
        raise CheckpointError("; ".join(found))
    return manifest


def _paths(manifest: Manifest, folder: Path, kind: str) -> list[Path]:
    return [folder / name for name in sorted(manifest.files) if name.startswith(f"{kind}/")]


def _changes(manifest: Manifest, settings: Mapping[str, Any], folder: Path) -> list[str]:
    """Settings in which the run differs from the checkpoint.

    Raises:
        CheckpointError: one of those that must not.
    """
    here: dict[str, Any] = json.loads(json.dumps({**settings, "ranks": distributed.world_size()}))
    there = {**manifest.settings, "ranks": manifest.ranks}
    changed = [name for name in here if here[name] != there.get(name)]
    for name in _SAME:
        if name in changed:
            raise CheckpointError(
                f"{folder}: {name} is {there.get(name)}; this run has {here[name]}. Go on with "
                f"the same, or start a new run from {folder / POLICY}"
            )
    return [f"{name} {here[name]}, was {there.get(name)}" for name in changed]


def _restore_random(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not readable ({error})") from error
    random_state.restore(tensors, metadata)
