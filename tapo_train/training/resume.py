"""The checkpoints of a run: when one is due, which stay, which one a resumption takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tapo_train.errors import CheckpointError, ConfigError
from tapo_train.learner import checkpoint, distributed, snapshot
from tapo_train.learner.manifest import POLICY, Manifest, checkpoints, discard_remains, set_aside
from tapo_train.learner.policy import Policy
from tapo_train.recipe.compose import Recipe, to_yaml
from tapo_train.report.run_folder import RunFolder

RECIPE = "recipe.yaml"
"""Beside exported weights: prompt, tools and limits the policy acts by."""


class CheckpointFolder:
    """The checkpoints of one run; all ranks save and load together.

    Args:
        keep_last: newest ones that stay.
        keep_best: ones with the best validation that stay besides.
        previous_good: go back to an older one where the newest is damaged.
        texts: files that every checkpoint gets, path within it -> content.
    """

    def __init__(
        self,
        root: Path,
        policy: Policy,
        *,
        keep_last: int,
        keep_best: int = 0,
        previous_good: bool = False,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        self._root = root
        self._policy = policy
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._previous_good = previous_good
        self._texts = texts
        self._background = snapshot.Background()

    def save(self, step: int, state: Mapping[str, Any], score: float | None = None) -> None:
        """Keep everything as of the end of 0-based `step`; it is written while training goes on.

        Raises:
            CheckpointError, OSError: the one before could not be written.
        """
        # Before the copy, so that there is never a second one in memory.
        self._background.wait()
        taken = snapshot.take(
            self._policy, self._root, step=step + 1, extra=state, score=score, texts=self._texts
        )
        self._background.start(taken, keep_last=self._keep_last, keep_best=self._keep_best)

    @property
    def has_failed(self) -> bool:
        """Whether this rank could not write the last one; `wait` says why."""
        return self._background.has_failed

    def wait(self) -> None:
        """Until this rank's part of the last checkpoint is on the disk; on rank 0, all of it.

        Raises:
            CheckpointError, OSError: it could not be written.
        """
        self._background.wait()

    def load_latest(self) -> Mapping[str, Any] | None:
        """Restore the newest checkpoint; what was saved with it, or None if there is none.

        Raises:
            CheckpointError: it is damaged (all are, with `previous_good`) or of other parameters.
        """
        if distributed.rank() == 0:
            discard_remains(self._root)
        names = distributed.broadcast_object([path.name for path in checkpoints(self._root)])
        found = self._newest_good([self._root / name for name in names])
        if found is None:
            return None
        folder, manifest = found
        restored = checkpoint.load(self._policy, folder, manifest=manifest)
        if distributed.rank() == 0:
            changed = "".join(f"\n  {line}" for line in restored.changes)
            print(f"going on after step {manifest.step}{changed and ', now with'}{changed}")
        return restored.extra

    def _newest_good(self, folders: list[Path]) -> tuple[Path, Manifest] | None:
        """The newest undamaged checkpoint; damaged newer ones lose their names."""
        damaged: list[tuple[Path, CheckpointError]] = []
        for folder in reversed(folders):
            try:
                manifest = checkpoint.check(folder)
            except CheckpointError as error:
                if not self._previous_good:
                    raise CheckpointError(
                        f"{error}. run.resume=previous_good goes back to the last good checkpoint"
                    ) from error
                damaged.append((folder, error))
                continue
            if distributed.rank() == 0:
                for path, damage in damaged:
                    print(f"{damage}; moved to {set_aside(path)}")
            distributed.barrier()
            return folder, manifest
        if damaged:
            raise CheckpointError("; ".join(str(damage) for _, damage in damaged))
        return None


def checkpoints_of(recipe: Recipe, folder: RunFolder, policy: Policy) -> CheckpointFolder:
    """The checkpoints of a recipe's run; each has the recipe beside the exported policy."""
    return CheckpointFolder(
        folder.checkpoints,
        policy,
        keep_last=recipe.run.keep_last,
        keep_best=recipe.run.keep_best,
        previous_good=recipe.run.resume == "previous_good",
        texts={f"{POLICY}/{RECIPE}": to_yaml(recipe)},
    )


def check_resumption(recipe: Recipe, folder: RunFolder) -> None:
    """Hold `run.resume` against what the run folder holds.

    Raises:
        ConfigError: a folder in use under `never`, an empty one under `must`; one of somebody
            else, or that cannot be written.
    """
    folder.require_own()
    if recipe.run.resume == "never" and folder.holds_run:
        raise ConfigError(
            f"run.resume: found never, but run.dir {folder.path} holds a run; "
            "wanted another run.dir, or run.resume=auto to go on with it"
        )
    if recipe.run.resume == "must" and not folder.holds_run:
        raise ConfigError(f"run.resume: found must, but run.dir {folder.path} holds no run")
    folder.require_writable()
