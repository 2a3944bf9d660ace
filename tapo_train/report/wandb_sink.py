"""Metrics to Weights & Biases; the only door to that library.

The run's id is kept in the run folder, so that a resumed run goes on in the same
dashboard. Offline runs lie in `RUN/wandb/` until `wandb sync` sends them; a run that
was resumed has one folder per process, of which the later ones are sent with `--append`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

# Read when wandb is imported; advertisements for other products are not progress.
os.environ.setdefault("WANDB_SILENT", "true")

import wandb

from tapo_train.report.files import write_atomically

__all__ = ["WandbSink", "resolve_mode"]

Mode = Literal["online", "offline"]


def resolve_mode(mode: Literal["auto", "online", "offline"]) -> Mode | None:
    """`auto` is online if the user is logged in, else offline; asks nothing, needs no network.

    None leaves it to the environment variable WANDB_MODE, which `auto` obeys.
    """
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE"):
        return None
    return "online" if wandb.login(prompt=False, verify=False) else "offline"


class WandbSink:
    """A sink that logs to one wandb run.

    Args:
        folder: The run folder; holds `wandb_id` and `wandb/`.
        name: Shown in the dashboard.
        mode: As in the recipe.
        config: The resolved recipe.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        mode: Literal["auto", "online", "offline"],
        config: Mapping[str, Any],
        project: str = "tapo_train",
    ) -> None:
        self._run = wandb.init(
            project=project,
            dir=str(folder),
            id=_run_id(folder / "wandb_id"),
            name=name,
            mode=resolve_mode(mode),
            resume="allow",
            config=dict(config),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                # Its metadata hold the command line, and that the keys of endpoints.
                x_disable_meta=True,
            ),
        )

    @property
    def mode(self) -> str:
        """`online`, `offline` or `disabled`: what it came to."""
        return cast(str, self._run.settings.mode)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one row under wandb's own step counter."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Flush and end the run."""
        self._run.finish()


def _run_id(path: Path) -> str:
    if not path.exists():
        write_atomically(path, secrets.token_hex(8) + "\n")
    return path.read_text().strip()
