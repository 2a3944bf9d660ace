"""The folder of a run: where everything lies, and what it was made from.

RUN/
  recipe.yaml            the resolved recipe; running it again is the same run
  manifest.json          code, versions, model and data hashes, seed; every resumption
  metrics.jsonl          one row per step
  tool_spending/         what tool calls have cost, if they cost anything; each rank's own
  curves.png             reward, accuracy and others over the steps
  wandb/, wandb_id       the dashboard's files
  rollouts/step_000012.jsonl   trajectories as the offline analyser reads them
  tokens/step_000012.jsonl     the same with tokens, spans, log-probs, advantages
  scores/step_000012.jsonl     the learner's log-prob, ratio, entropy of each token it learned from
  images/<sha256>.png    pictures of the dumps, each once
  checkpoints/           to resume from
  weights/               the newest ones, for engine servers; only while the run goes on
  export/                the policy in Hugging Face format
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tapo_train.data.rows import parse_json, read_file
from tapo_train.errors import ConfigError, DataError
from tapo_train.report.files import require_writable, write_atomically

__all__ = ["RunFolder"]

_SAME = ("model", "data", "seed")
"""Entries of the manifest that a resumed run must share with the one it goes on with; of the data
only the validation, whose accuracies would not compare. Tasks to train on may be mended."""

_OWN = ("recipe.yaml", "metrics.jsonl", "rollouts", "tokens", "scores", "checkpoints", "wandb_id")
"""Names that only a run may have made, after its manifest."""


class RunFolder:
    """Paths of a run and its two descriptions. Only rank 0 writes."""

    def __init__(self, path: str | Path) -> None:
        """Raises `ConfigError` where a file stands in the way."""
        self.path = Path(path)
        there = next((part for part in (self.path, *self.path.parents) if part.exists()), None)
        if there is not None and not there.is_dir():
            raise ConfigError(f"run.dir: found {self.path}, but {there} is a file; wanted a folder")

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        """What the run was made from."""
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        """One JSON row per step."""
        return self.path / "metrics.jsonl"

    @property
    def spending(self) -> Path:
        """What tool calls have cost so far, all processes that ever worked on the run."""
        return self.path / "tool_spending"

    @property
    def curves(self) -> Path:
        """A picture of the metrics."""
        return self.path / "curves.png"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        """Where engine servers find the newest weights, unless the recipe names another place."""
        return self.path / "weights"

    @property
    def nonfinite(self) -> Path:
        """Micro-batches whose loss or gradient was not finite; there only if there were any."""
        return self.path / "nonfinite"

    @property
    def export(self) -> Path:
        """The trained policy in Hugging Face format."""
        return self.path / "export"

    @property
    def holds_run(self) -> bool:
        """True if a run was started here."""
        return self.manifest.exists()

    def require_own(self) -> None:
        """Raises `ConfigError` if the folder holds what a run would overwrite, but is of no run."""
        foreign = [name for name in _OWN if (self.path / name).exists()]
        if foreign and not self.holds_run:
            raise ConfigError(
                f"run.dir: found {self.path}, which holds {', '.join(foreign)} and is of no run "
                f"(it has no {self.manifest.name}); wanted a new folder, or that of a run"
            )

    def require_writable(self) -> None:
        """Make the folder. Raises `ConfigError` if nothing can be written there."""
        require_writable(self.path, field="run.dir")

    def begin(self, *, recipe: str, manifest: Mapping[str, Any], step: int) -> str:
        """Write recipe and manifest, or note that the run goes on from `step`.

        Weights for servers that a killed process left behind go.

        Args:
            recipe: YAML of the resolved recipe. If a resumed run has another one, the
                old is kept as `recipe.before_step_<step>.yaml`.
            manifest: `describe_process()` and the entries model, data and seed.
            step: First step this process will do; a run that holds no manifest yet is
                new whatever the step.

        Returns:
            How the tasks to train on differ from those of before; "" if they do not.

        Raises:
            DataError: the folder's run had another model, another validation or another seed.
            ConfigError: the folder is of no run, but holds files that this would overwrite.
        """
        self.require_own()
        changed = ""
        if not self.holds_run:
            self._write_manifest({**manifest, "resumed": []})
        else:
            changed = self._note_resumption(manifest, step)
            if self.recipe.exists() and self.recipe.read_text(encoding="utf-8") != recipe:
                self.recipe.replace(self.path / f"recipe.before_step_{step}.yaml")
        write_atomically(self.recipe, recipe)
        if self.weights.exists():
            shutil.rmtree(self.weights)
        return changed

    def _note_resumption(self, manifest: Mapping[str, Any], step: int) -> str:
        first = parse_json(read_file(self.manifest), where=str(self.manifest))
        if not isinstance(first, dict) or not isinstance(first.get("resumed"), list):
            raise DataError(f"{self.manifest}: not a manifest of this program")
        for name in _SAME:
            old, new = _without_training(first.get(name)), _without_training(manifest.get(name))
            if old != new:
                where, old, new = _first_difference(name, old, new)
                raise DataError(
                    f"{self.manifest}: the run was started with {where} {old} but is resumed with "
                    f"{new}; give the same, or another run.dir"
                )
        again = {key: value for key, value in manifest.items() if key not in _SAME}
        versions = [first, *first["resumed"]]
        old = next(held["data"] for held in reversed(versions) if "data" in held)
        changed = old != manifest["data"]
        if changed:
            again["data"] = manifest["data"]
        self._write_manifest({**first, "resumed": [*first["resumed"], {"step": step, **again}]})
        if not changed:
            return ""
        where, was, now = _first_difference("data", old, manifest["data"])
        return f"{where} is {now}, was {was}"

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        write_atomically(self.manifest, json.dumps(manifest, indent=2) + "\n")


def _without_training(entry: Any) -> Any:
    """An entry of the manifest but for the tasks to train on."""
    is_data = isinstance(entry, Mapping) and "train" in entry
    return {key: entry[key] for key in entry if key != "train"} if is_data else entry


def _first_difference(where: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """(dotted path, old, new) of the first entry in which two descriptions differ."""
    while isinstance(old, Mapping) and isinstance(new, Mapping):
        key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
        where, old, new = f"{where}.{key}", old.get(key), new.get(key)
    return where, old, new
