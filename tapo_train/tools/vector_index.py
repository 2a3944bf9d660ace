"""The nearest of many unit vectors, in memory or in a file that all ranks map (FAISS).

Up to FLAT_ROWS vectors every one is looked at. Beyond that they are kept in cells around the
centres of a sample, in 8 bits a number, and a search looks into the PROBED nearest cells: some of
the true neighbours are then missed. A FAISS file is read by FAISS: open only what you trust.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tapo_train.errors import DataError

# At INFO it tells on every start which of its builds it found.
logging.getLogger("faiss.loader").setLevel(logging.WARNING)
import faiss  # noqa: E402

__all__ = ["Floats", "VectorIndex", "write_vectors"]

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
