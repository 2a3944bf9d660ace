"""Metrics to Weights & Biases; the only door to that library.

The run's id is kept in the run folder, so that a resumed run goes on in the same
dashboard. Offline runs lie in `RUN/wandb/` until `wandb sync` sends them; a run that
was resumed has one folder per process, of which the later ones are sent with `--append`.

After a step with a dump a table of some of its attempts is logged: pictures with the regions that
were looked at, what was written, the advantage of each turn before and after the credit stage.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

# Read when wandb is imported; advertisements for other products are not progress.
os.environ.setdefault("WANDB_SILENT", "true")

import wandb

from tapo_train.errors import ConfigError
from tapo_train.report.catalogue import SUMMARIES
from tapo_train.report.files import write_atomically
from tapo_train.report.samples import Sample, read_samples

__all__ = ["REFUSED", "WandbSink", "default_entity", "require_login", "resolve_mode"]

_DATA_DIR = os.environ.get("WANDB_DATA_DIR")
"""Where the user wants artifacts to wait until they are sent."""

Wanted = Literal["auto", "online", "offline"]
Mode = Literal["online", "offline"]

REFUSED = (wandb.Error, ValueError)
"""What wandb raises at a key it does not take and a server it does not reach."""


def resolve_mode(mode: Wanted) -> Mode | None:
    """`auto` is online if the user is logged in, else offline; asks nothing, needs no network.

    None leaves it to the environment variable WANDB_MODE, which `auto` obeys.
    """
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE"):
        return None
    return "offline" if _why_not_logged_in() else "online"


def require_login(mode: Wanted) -> None:
    """Find out before anything is loaded whether a run could log as the recipe says.

    Raises:
        ConfigError: online is wanted (also by WANDB_MODE), but nobody is logged in.
    """
    wanted = os.environ.get("WANDB_MODE") if mode == "auto" else mode
    if wanted == "online" and (reason := _why_not_logged_in()):
        raise ConfigError(_refusal(reason))


def default_entity() -> str:
    """Of the user who is logged in.

    Raises:
        ConfigError: nobody is, or the server is not reached.
    """
    reason = _why_not_logged_in()
    try:
        entity = None if reason else wandb.Api().default_entity
    except REFUSED as error:
        reason, entity = _first_line(error), None
    if not entity:
        raise ConfigError(f"wandb: {reason or 'no entity'}; wanted a login (`wandb login`)")
    return str(entity)


def _why_not_logged_in() -> str:
    """Empty if somebody is."""
    try:
        return "" if wandb.login(prompt=False, verify=False) else "nobody is logged in"
    except REFUSED as error:
        return _first_line(error)


def _refusal(reason: str) -> str:
    return (
        f"run.wandb: found online, but {reason}; wanted a login (`wandb login`, or WANDB_API_KEY), "
        "or run.wandb=offline"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class WandbSink:
    """A sink that logs to one wandb run.

    Args:
        folder: The run folder; holds `wandb_id` and `wandb/`.
        name: Shown in the dashboard.
        mode: As in the recipe.
        config: The resolved recipe.
        samples: Attempts in the table of a dumped step; 0: no table.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        mode: Wanted,
        config: Mapping[str, Any],
        project: str = "tapo_train",
        samples: int = 0,
    ) -> None:
        """Raises `ConfigError` where `online` cannot be had; `auto` goes on offline and says so."""
        self._folder, self._name = folder, name
        self._config, self._project, self._samples = dict(config), project, samples
        # Not in the user's home: what an offline run has to send stays with the run.
        os.environ["WANDB_DATA_DIR"] = _DATA_DIR or str((folder / "wandb" / "data").resolve())
        chosen = resolve_mode(mode)
        try:
            self._run = self._init(chosen)
        except REFUSED as error:
            if mode != "auto" or chosen is None:
                raise ConfigError(_refusal(_first_line(error))) from error
            print(
                f"wandb: {_first_line(error)}; logging offline to {folder / 'wandb'} "
                "(`wandb sync` sends it later)",
                file=sys.stderr,
            )
            # Its service still holds the id of the run that did not begin.
            wandb.teardown()
            self._run = self._init("offline")
        for metric, summary in SUMMARIES.items():
            self._run.define_metric(metric, summary=summary)

    def _init(self, mode: Mode | None) -> wandb.Run:
        return wandb.init(
            project=self._project,
            dir=str(self._folder),
            id=_run_id(self._folder / "wandb_id"),
            name=self._name,
            mode=mode,
            resume="allow",
            config=self._config,
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
        """Log one row under wandb's own step counter, and a table if the step was dumped."""
        row: dict[str, Any] = dict(metrics)
        if samples := read_samples(self._folder, step, self._samples):
            row["samples"] = _table(samples)
        self._run.log(row, step=step)

    def close(self) -> None:
        """Flush and end the run."""
        self._run.finish()


_COLUMNS = ("question", "picture", "accepted", "answer", "accuracy", "reward", "advantage")


def _table(samples: Sequence[Sample]) -> wandb.Table:
    rows = [
        [
            _image(sample) if name == "picture" else getattr(sample, name)
            for name in (*_COLUMNS, "corrected", "turns")
        ]
        for sample in samples
    ]
    return wandb.Table(columns=[*_COLUMNS, "corrected", "turns"], data=rows)


def _image(sample: Sample) -> wandb.Image | None:
    """With the regions that were looked at drawn on it."""
    if sample.picture is None or not sample.picture.is_file():
        return None
    boxes = [
        {
            "position": {"minX": x0, "minY": y0, "maxX": x1, "maxY": y1},
            "class_id": 0,
            "box_caption": f"cut {number + 1}",
        }
        for number, (x0, y0, x1, y1) in enumerate(sample.cuts)
    ]
    drawn = {"cuts": {"box_data": boxes, "class_labels": {0: "cut"}}} if boxes else None
    return wandb.Image(str(sample.picture), boxes=drawn)


def _run_id(path: Path) -> str:
    if not path.exists():
        write_atomically(path, secrets.token_hex(8) + "\n")
    return path.read_text().strip()
