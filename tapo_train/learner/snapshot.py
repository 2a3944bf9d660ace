"""Checkpoints on their way to the disk: a copy of the state, written beside the training."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tapo_train.errors import CheckpointError
from tapo_train.learner import distributed, durable, random_state
from tapo_train.learner.manifest import MANIFEST, POLICY, Manifest, folder_name, prune
from tapo_train.learner.policy import Policy
from tapo_train.learner.weights import ModelFiles

LEARNER = "learner"
RANDOM = "random"
TRAINER = "trainer"
PEERS_TIMEOUT_S = 3600.0
"""How long rank 0 waits for the files of the other ranks."""
_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything a rank writes, copied: training may go on."""

    root: Path
    step: int
    updates: int
    settings: Mapping[str, Any]
    score: float | None
    rank: int
    ranks: int
    model: ModelFiles
    texts: Mapping[str, str]
    """Further files by path within the folder; rank 0's."""
    extra: Mapping[str, Any]
    learner: tuple[dict[str, Tensor], dict[str, str]]
    random: tuple[dict[str, Tensor], dict[str, str]]

    @property
    def final(self) -> Path:
        """Where the checkpoint will be."""
        return self.root / folder_name(self.step)

    @property
    def partial(self) -> Path:
        """Where it is written."""
        return self.root / f".{self.final.name}.partial"


def take(
    policy: Policy,
    root: Path,
    *,
    step: int,
    extra: Mapping[str, Any],
    score: float | None = None,
    texts: Mapping[str, str] | None = None,
) -> Snapshot:
    """Copy the state as of now, on all ranks together; nothing of a checkpoint is there yet.

    Args:
        step: finished training steps.
        extra: JSON-serialisable; every rank's own is kept.
        score: validation accuracy; rank 0's counts.
        texts: further files, path within the folder -> content; rank 0's count.
    """
    snapshot = Snapshot(
        root=root,
        step=step,
        updates=policy.updates,
        settings=asdict(policy.settings),
        score=score,
        rank=distributed.rank(),
        ranks=distributed.world_size(),
        model=policy.model_files(),
        texts=dict(texts or {}),
        extra=extra,
        learner=policy.learner_state(),
        random=random_state.collect(),
    )
    if snapshot.rank == 0:
        shutil.rmtree(snapshot.partial, ignore_errors=True)
        snapshot.partial.mkdir(parents=True)
    distributed.barrier()
    return snapshot


def write(snapshot: Snapshot, *, keep_last: int = 0, keep_best: int = 0) -> Path:
    """Write this rank's files; rank 0 waits for the others', gives the name and prunes.

    Without collectives, so that it may run beside the training; ranks meet in the folder.

    Raises:
        CheckpointError: another rank could not write its files.
        OSError: this one could not.
    """
    done = False
    try:
        hashes = _write_files(snapshot)
        done = True
    finally:
        if not done:
            (snapshot.partial / f".failed.rank{snapshot.rank}").touch()
    marker = snapshot.partial / f".written.rank{snapshot.rank}"
    unnamed = marker.with_name(f"{marker.name}.partial")
    unnamed.write_text(json.dumps(hashes), encoding="utf-8")
    unnamed.rename(marker)
    if snapshot.rank == 0:
        _complete(snapshot, _hashes_of_ranks(snapshot))
        prune(snapshot.root, keep_last=keep_last, keep_best=keep_best)
    return snapshot.final


class Background:
    """Writes one snapshot at a time beside the training."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[Path] | None = None

    def start(self, snapshot: Snapshot, *, keep_last: int, keep_best: int) -> None:
        """Begin to write; waits for the one before and raises what that one died of."""
        self.wait()
        self._running = self._threads.submit(
            write, snapshot, keep_last=keep_last, keep_best=keep_best
        )

    @property
    def has_failed(self) -> bool:
        """Whether a write came to an error that `wait` will raise."""
        running = self._running
        return running is not None and running.done() and running.exception() is not None

    def wait(self) -> None:
        """Until nothing is being written; raises what the write died of."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


def _write_files(snapshot: Snapshot) -> dict[str, str]:
    """Path within the folder -> sha256 of what this rank wrote."""
    partial, name = snapshot.partial, f"rank{snapshot.rank}"
    hashes = {}
    for kind, (tensors, metadata) in ((LEARNER, snapshot.learner), (RANDOM, snapshot.random)):
        path = f"{kind}/{name}.safetensors"
        hashes[path] = durable.write_tensors(partial / path, tensors, metadata=metadata)
    texts = {f"{TRAINER}/{name}.json": json.dumps(dict(snapshot.extra), indent=1) + "\n"}
    if snapshot.rank == 0:
        model = snapshot.model.write(partial / POLICY)
        hashes |= {f"{POLICY}/{file}": digest for file, digest in model.items()}
        texts |= snapshot.texts
    for path, text in texts.items():
        hashes[path] = durable.write_bytes(partial / path, text.encode())
    return hashes


def _hashes_of_ranks(snapshot: Snapshot) -> dict[str, str]:
    """Wait for every rank's marker and take it away; the hashes of all files."""
    hashes: dict[str, str] = {}
    end = time.monotonic() + PEERS_TIMEOUT_S
    for rank in range(snapshot.ranks):
        marker = snapshot.partial / f".written.rank{rank}"
        while not marker.exists():
            failed = sorted(path.name for path in snapshot.partial.glob(".failed.*"))
            if failed or time.monotonic() > end:
                raise CheckpointError(
                    f"{snapshot.partial}: rank {rank} has not written its files "
                    f"({', '.join(failed) or f'waited {PEERS_TIMEOUT_S:.0f} s'})"
                )
            time.sleep(_POLL_S)
        hashes |= json.loads(marker.read_text(encoding="utf-8"))
        marker.unlink()
    return hashes


def _complete(snapshot: Snapshot, hashes: Mapping[str, str]) -> None:
    """Write the manifest and give the folder its name, everything on the disk before."""
    manifest = Manifest(
        step=snapshot.step,
        updates=snapshot.updates,
        ranks=snapshot.ranks,
        settings=snapshot.settings,
        score=snapshot.score,
        files=hashes,
    )
    partial, final = snapshot.partial, snapshot.final
    durable.write_bytes(partial / MANIFEST, manifest.text().encode())
    for folder in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        durable.sync_folder(folder)
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        # Killed before the next rename, the run goes on from it: see `discard_remains`.
        final.rename(replaced)
    partial.rename(final)
    durable.sync_folder(snapshot.root)
    shutil.rmtree(replaced, ignore_errors=True)
