"""The nearest of many unit vectors, in memory or in a file that all ranks map (FAISS).

Up to FLAT_ROWS vectors every one is looked at. Beyond that they are kept in cells around the
centres of a sample, in 8 bits a number, and a search looks into the PROBED nearest cells: some of
the true neighbours are then missed. A FAISS file is read by FAISS: open only what you trust.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tapo_train.errors import DataError

# At INFO it tells on every start which of its builds it found.
logging.getLogger("faiss.loader").setLevel(logging.WARNING)
import faiss  # noqa: E402

__all__ = ["Floats", "VectorIndex", "load_beside", "write_vectors", "writing_beside"]

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

FLAT_ROWS = 200_000
CELLS = 4096
PROBED = 32
_SAMPLE_PER_CELL = 40
_ADDED_ROWS = 100_000


class VectorIndex:
    """Inner products with the rows of an index."""

    def __init__(self, index: faiss.Index) -> None:
        self._index = index

    @classmethod
    def of(cls, vectors: Floats) -> VectorIndex:
        """Exact, in memory: [N, D]."""
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(np.ascontiguousarray(vectors, dtype=np.float32))
        return cls(index)

    @classmethod
    def load(cls, path: Path) -> VectorIndex:
        """Map a file that `write_vectors` wrote.

        Raises:
            DataError: it is none.
        """
        try:
            return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY))
        except RuntimeError as error:
            raise DataError(f"{path}: {str(error)[:200]}; wanted a FAISS index") from error

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def dimensions(self) -> int:
        """Numbers of a vector."""
        return int(self._index.d)

    def search(self, vectors: Floats, k: int) -> tuple[Floats, Rows]:
        """Inner products and row numbers, [Q, k] each, greatest first; -1 where there are fewer."""
        asked = np.ascontiguousarray(vectors, dtype=np.float32)
        scores, rows = self._index.search(asked, k)
        return scores, rows


def write_vectors(path: Path, vectors: npt.NDArray[np.floating]) -> None:
    """An index of unit vectors [N, D], which may lie on disk: a part is read at a time."""
    count, dimensions = vectors.shape
    index: Any
    if count <= FLAT_ROWS:
        index = faiss.index_factory(dimensions, "SQ8", faiss.METRIC_INNER_PRODUCT)
        sample = vectors
    else:
        index = faiss.index_factory(dimensions, f"IVF{CELLS},SQ8", faiss.METRIC_INNER_PRODUCT)
        index.nprobe = PROBED
        chosen = np.random.default_rng(0).choice(count, CELLS * _SAMPLE_PER_CELL, replace=False)
        sample = vectors[np.sort(chosen)]
    index.train(np.ascontiguousarray(sample, dtype=np.float32))
    for start in range(0, count, _ADDED_ROWS):
        part = vectors[start : start + _ADDED_ROWS]
        index.add(np.ascontiguousarray(part, dtype=np.float32))
    faiss.write_index(index, str(path))


@contextmanager
def writing_beside(
    folder: Path, name: str, *, made_by: str, of: object
) -> Iterator[Callable[[Floats], None]]:
    """Takes unit vectors of an index's entries, in their order, part by part; they are beside it
    (NAME.faiss, and NAME.json with what made them and of what) once all have come.

    Args:
        made_by: version of the embedder.
        of: what tells the index from others, in JSON.
    """
    spool, manifest, count = folder / f"{name}.f16", folder / f"{name}.json", 0
    try:
        with spool.open("wb") as file:

            def add(vectors: Floats) -> None:
                nonlocal count
                count += len(vectors)
                file.write(vectors.astype(np.float16).tobytes())

            yield add
        fresh = folder / f"{name}.faiss.new"
        write_vectors(fresh, np.memmap(spool, np.float16, "r").reshape(count, -1))
        # A write that is cut off here leaves vectors of nobody, and not of the wrong one.
        manifest.unlink(missing_ok=True)
        # In one step: ranks of a run may have the old file mapped.
        fresh.replace(folder / f"{name}.faiss")
    finally:
        spool.unlink(missing_ok=True)
    manifest.write_text(json.dumps({"embedder": made_by, "of": of}))


def load_beside(
    folder: Path, name: str, *, made_by: str, of: object, entries: tuple[int, str], wanted: str
) -> VectorIndex:
    """Map what `writing_beside` wrote.

    Args:
        entries: how many the index has, and what they are.
        wanted: what writes them.

    Raises:
        DataError: there are none, or they are another embedder's or another index's.
    """
    path = folder / f"{name}.json"
    try:
        manifest = json.loads(path.read_bytes())
        maker, source = manifest["embedder"], manifest["of"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: {type(error).__name__}: {error}; wanted {wanted}") from error
    if maker != made_by:
        raise DataError(f"{path}: found vectors of {maker}, wanted those of {made_by}")
    vectors, (count, what) = VectorIndex.load(folder / f"{name}.faiss"), entries
    if source != of or len(vectors) != count:
        raise DataError(f"{path}: found vectors of other {what}; wanted {wanted}")
    return vectors
