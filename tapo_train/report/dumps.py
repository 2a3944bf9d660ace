"""Trajectories of every step, written so that a killed run leaves whole files or none.

Three files per step and rank: `rollouts/` for the offline analyser, `tokens/` with the
token-level view, `scores/` with what the learner thought of the tokens it learned from, which are
those of another rank where rows were dealt out anew. Rank 0's file is `step_000012.jsonl`,
another rank's `step_000012.rank_1.jsonl`. Pictures are stored once for the whole run.
Trajectories that failed outside the policy are in `tokens/` alone: they take no part in loss and
credit.
Steps may be left out, and pictures: a crop can be cut again from its root.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tapo_train.credit.result import CreditResult
from tapo_train.errors import TapoError
from tapo_train.report.files import write_atomically
from tapo_train.report.rollout_row import rollout_row
from tapo_train.report.token_scores import TokenScores
from tapo_train.report.token_view import (
    Decode,
    StoredImages,
    credit_view,
    store_images,
    token_view,
)
from tapo_train.types import Trajectory

__all__ = ["TrajectoryDump", "write_trajectories"]

_STEP = re.compile(r"step_(\d+)(\.rank_\d+)?\.jsonl")


class TrajectoryDump:
    """Dumps the trajectories of one rank below the run folder `path`.

    Args:
        path: The run folder.
        rank: Of this process.
        decode: Tokens to text for the view's `text`; without it the view has none.
        placeholder: Id of a picture's tokens, which are written as runs.
        every: [steps] The steps it divides are dumped; 0: none.
        images: Which pictures are stored.
    """

    def __init__(
        self,
        path: Path,
        *,
        rank: int = 0,
        decode: Decode | None = None,
        placeholder: int | None = None,
        every: int = 1,
        images: StoredImages = "all",
    ) -> None:
        self._path = path
        self._suffix = "" if rank == 0 else f".rank_{rank}"
        self._decode = decode
        self._placeholder = placeholder
        self._every = every
        self._images = images
        self._scores: dict[int, TokenScores] = {}

    def observer(self, step: int) -> TokenScores | None:
        """What has to see the updates of 0-based `step`; None if the step is not dumped."""
        return self._scores.setdefault(step, TokenScores()) if self._is_due(step) else None

    def _is_due(self, step: int) -> bool:
        return self._every > 0 and step % self._every == 0

    def write(
        self,
        step: int,
        trajectories: Sequence[Trajectory],
        advantages: Sequence[float],
        credit: CreditResult,
        turn_advantages: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """Dump 0-based `step` if it is due; the three sequences run over the same rows.

        Args:
            step: 0-based.
            trajectories: As sampled, with their rewards.
            advantages: The scalar advantage of each, before the credit stage.
            credit: What the credit stage made of them.
            turn_advantages: Those of the turns of each, before the credit stage, if they differ.
        """
        if not len(trajectories) == len(advantages) == len(credit.step_advantages):
            raise TapoError(
                f"dump of step {step}: {len(trajectories)} trajectories, {len(advantages)} "
                f"advantages, {len(credit.step_advantages)} credit rows; wanted equal numbers"
            )
        if not self._is_due(step):
            return
        store_images(self._path / "images", trajectories, which=self._images)
        views = [
            credit_view(
                token_view(
                    trajectory,
                    decode=self._decode,
                    placeholder=self._placeholder,
                    images=self._images,
                ),
                advantage=advantages[row],
                credit=credit,
                row=row,
            )
            for row, trajectory in enumerate(trajectories)
        ]
        name = f"step_{step:06d}{self._suffix}.jsonl"
        _write_lines(self._path / "tokens" / name, views)
        scores = self._scores.pop(step, TokenScores())
        _write_lines(self._path / "scores" / name, scores.rows())
        by_turn = turn_advantages or [()] * len(trajectories)
        rows = [
            rollout_row(trajectory, advantage, turns)
            for trajectory, advantage, turns in zip(trajectories, advantages, by_turn, strict=True)
            if not trajectory.failed_outside_policy
        ]
        _write_lines(self._path / "rollouts" / name, rows)

    def discard_from(self, step: int) -> None:
        """Delete every rank's dumps of `step` and later: a resumed run makes them again.

        All ranks may call this at once, before any of them writes.
        """
        for folder in ("rollouts", "tokens", "scores"):
            for path in sorted((self._path / folder).glob("step_*.jsonl")):
                match = _STEP.fullmatch(path.name)
                if match is not None and int(match[1]) >= step:
                    path.unlink(missing_ok=True)


def write_trajectories(
    path: Path,
    trajectories: Sequence[Trajectory],
    *,
    decode: Decode | None = None,
    placeholder: int | None = None,
) -> None:
    """Token-level views without advantages (of an evaluation); pictures go to `images/` beside."""
    store_images(path.parent / "images", trajectories)
    views = [token_view(held, decode=decode, placeholder=placeholder) for held in trajectories]
    _write_lines(path, views)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
