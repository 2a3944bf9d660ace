"""What happens to an update whose loss or gradient is not finite.

Its micro-batches are written to the run folder, so that the trouble can be looked at and taken
up again (`read_dump` gives them back). Then the run stops, or the update is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tapo_train.algos.metrics import Metrics, pair
from tapo_train.data.images import read_image
from tapo_train.errors import DataError, NonFiniteError
from tapo_train.learner.batch import MicroBatch

__all__ = ["NonFiniteGuard", "read_dump", "write_dump"]

MOST_DUMPS = 20
"""Per rank and process: a run that goes on must not fill the disk."""

_VECTORS = (
    "input_ids", "trained_index", "targets", "trajectory", "turn", "lengths", "group",
    "advantages", "sampler_logprobs", "old_logprobs", "age", "reference_logprobs",
)  # fmt: skip
"""Tensors of a micro-batch; the last may be missing."""


class NonFiniteGuard:
    """Runs an update; dumps it if its loss or gradient is not finite.

    Args:
        folder: where the dumps go; made when the first one is written.
        rank: of this process; part of the files' names.
        skip: leave the update out and go on, instead of ending the run. Weights, optimizer and
            learning rate are then as if it had not been asked for.
    """

    def __init__(self, folder: Path, *, rank: int, skip: bool) -> None:
        self._folder = folder
        self._rank = rank
        self._skip = skip
        self._dumps = 0

    def __call__(
        self, update: Callable[[], Metrics], batches: Sequence[MicroBatch], *, name: str
    ) -> Metrics:
        """The update's metrics, with `update/skipped` where updates may be left out.

        Args:
            update: of `batches`; raises on all ranks or on none.
            name: of the update, for the dump's file.

        Raises:
            NonFiniteError: as `update` did, with the dump's path added, unless `skip`.
        """
        try:
            metrics = update()
        except NonFiniteError as error:
            text = f"{error}. Its micro-batches: {self._dump(batches, name, str(error))}"
            if not self._skip:
                raise NonFiniteError(text) from error
            print(f"rank {self._rank}: update left out: {text}", file=sys.stderr, flush=True)
            return {"update/skipped": pair(torch.ones(1))}
        return metrics | {"update/skipped": pair(torch.zeros(1))} if self._skip else metrics

    def _dump(self, batches: Sequence[MicroBatch], name: str, message: str) -> str:
        """Where the micro-batches were written, or why they were not."""
        if self._dumps >= MOST_DUMPS:
            return f"not written, as {self._folder} holds {MOST_DUMPS} of this rank already"
        self._dumps += 1
        path = self._folder / f"{name}.rank_{self._rank}.npz"
        write_dump(path, batches, message=message)
        return str(path)


def write_dump(path: Path, batches: Sequence[MicroBatch], *, message: str) -> None:
    """Write micro-batches as npz: arrays alone, which can be read without unpickling."""
    arrays: dict[str, npt.NDArray[Any]] = {"message": np.array(message)}
    for number, batch in enumerate(batches):
        for name in _VECTORS:
            value: Tensor | None = getattr(batch, name)
            if value is not None:
                arrays[f"{number}/{name}"] = value.cpu().numpy()
        arrays[f"{number}/boundaries"] = np.array(batch.boundaries, dtype=np.int64)
        arrays[f"{number}/num_turns"] = np.array(batch.num_turns)
        arrays[f"{number}/row_ids"] = np.array(batch.row_ids, dtype=np.str_)
        for row, images in enumerate(batch.images):
            for index, image in enumerate(images):
                data = np.frombuffer(image.data, dtype=np.uint8)
                arrays[f"{number}/image/{row}/{index}"] = data
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_dump(path: Path) -> tuple[str, list[MicroBatch]]:
    """What `write_dump` wrote: message and micro-batches, the pictures as their own roots.

    Raises:
        DataError: the file is no such dump.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        count = 1 + max((int(name.split("/")[0]) for name in arrays if "/" in name), default=-1)
        batches = [_batch(arrays, number, where=str(path)) for number in range(count)]
        return str(arrays["message"]), batches
    except (OSError, EOFError, KeyError, ValueError, IndexError, BadZipFile) as error:
        raise DataError(f"{path}: no dump of micro-batches: {error}") from error


def _batch(arrays: dict[str, npt.NDArray[Any]], number: int, *, where: str) -> MicroBatch:
    own = {
        name.split("/", 1)[1]: array
        for name, array in arrays.items()
        if name.startswith(f"{number}/")
    }
    row_ids = tuple(own["row_ids"].tolist())
    pictures: list[dict[int, bytes]] = [{} for _ in row_ids]
    for name, array in own.items():
        if name.startswith("image/"):
            _, row, index = name.split("/")
            pictures[int(row)][int(index)] = array.tobytes()
    vectors: dict[str, Any] = {
        name: torch.from_numpy(own[name]) if name in own else None for name in _VECTORS
    }
    return MicroBatch(
        row_ids=row_ids,
        boundaries=tuple(own["boundaries"].tolist()),
        num_turns=int(own["num_turns"]),
        max_age=int(own["age"].max(initial=0)),
        images=tuple(
            tuple(read_image(images[i], where=where) for i in sorted(images)) for images in pictures
        ),
        **vectors,
    )
