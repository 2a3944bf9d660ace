"""Milvus as a `TextStore`: a server, a cluster, or `milvus-lite server` for trials.

A row of number -1 says that the collection is whole, and of what; its words are none, so that no
search by words meets it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pymilvus import DataType, Function, FunctionType, MilvusClient, MilvusException

from tapo_train.errors import DataError, ToolDownError
from tapo_train.tools.text_store import Hits, StoredPassage

__all__ = ["MilvusStore"]

MANIFEST = -1
MAX_BYTES = 65_535
"""Of a text field."""
_BM25 = {"bm25_k1": 1.2, "bm25_b": 0.75}

# Its tracebacks say at length what is raised here in a line.
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)


class MilvusStore:
    """A collection.

    Args:
        token: "user:password" or an API key; "": none.
        timeout_s: of one request.

    Raises:
        ToolDownError: the server is down.
    """

    def __init__(self, url: str, collection: str, *, token: str, timeout_s: float) -> None:
        self._name, self._dimension = collection, 0
        with _asking():
            self._client = MilvusClient(uri=url, token=token, timeout=timeout_s)
        self._timeout_s = timeout_s

    def exists(self) -> bool:
        """Whether there is a collection of this name."""
        with _asking():
            return bool(self._client.has_collection(self._name, timeout=self._timeout_s))

    def create(self, *, dimension: int) -> None:
        """A new collection."""
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("number", DataType.INT64, is_primary=True)
        schema.add_field("passage", DataType.VARCHAR, max_length=MAX_BYTES)
        schema.add_field(
            "words",
            DataType.VARCHAR,
            max_length=MAX_BYTES,
            enable_analyzer=True,
            analyzer_params={"type": "standard"},
        )
        schema.add_field("scores", DataType.SPARSE_FLOAT_VECTOR)
        schema.add_function(
            Function(
                name="bm25",
                function_type=FunctionType.BM25,
                input_field_names=["words"],
                output_field_names=["scores"],
            )
        )
        indexes = MilvusClient.prepare_index_params()
        # One by one for a server, as one JSON for `milvus-lite`, which reads nothing else.
        bm25 = {**_BM25, "params": _BM25}
        indexes.add_index(
            "scores", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25", params=bm25
        )
        if dimension:
            schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dimension)
            # Vectors have length one: the product is the cosine.
            indexes.add_index("vector", index_type="AUTOINDEX", metric_type="IP")
        self._dimension = dimension
        with _asking():
            self._client.create_collection(
                self._name, schema=schema, index_params=indexes, consistency_level="Strong"
            )

    def add(self, rows: Sequence[StoredPassage]) -> None:
        """Write rows.

        Raises:
            DataError: one is longer than a field may be.
        """
        fields: list[dict[str, Any]] = []
        for row in rows:
            longest = max(len(row.words.encode()), len(row.passage.encode()))
            if longest > MAX_BYTES:
                raise DataError(
                    f"text store: passage {row.number} has {longest} bytes, wanted at most "
                    f"{MAX_BYTES}, which a field of Milvus holds"
                )
            own = {"number": row.number, "words": row.words, "passage": row.passage}
            fields.append(own if row.vector is None else own | {"vector": list(row.vector)})
        with _asking():
            self._client.insert(self._name, fields)

    def finish(self, manifest: str) -> None:
        """Write the row that says so."""
        vector = [0.0] * self._dimension or None
        self.add([StoredPassage(number=MANIFEST, words="", passage=manifest, vector=vector)])
        with _asking():
            self._client.flush(self._name)

    def manifest(self) -> str | None:
        """What the last row says."""
        return self.passages([MANIFEST]).get(MANIFEST)

    def by_words(self, words: str, *, limit: int) -> Hits:
        """The best by BM25."""
        # A score is positive; `milvus-lite` gives it as a distance, below 0.
        return [(number, abs(score)) for number, score in self._hits(words, "scores", limit)]

    def by_vector(self, vector: Sequence[float], *, limit: int) -> Hits:
        """The nearest by the cosine."""
        hits = self._hits(list(vector), "vector", limit + 1)
        return [hit for hit in hits if hit[0] != MANIFEST][:limit]

    def passages(self, numbers: Sequence[int]) -> Mapping[int, str]:
        """What is kept of these rows."""
        with _asking():
            rows = self._client.get(
                self._name,
                ids=list(numbers),
                output_fields=["number", "passage"],
                timeout=self._timeout_s,
            )
            return {int(row["number"]): str(row["passage"]) for row in rows}

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _hits(self, asked: Any, field: str, limit: int) -> Hits:
        with _asking():
            (found,) = self._client.search(
                self._name,
                data=[asked],
                anns_field=field,
                limit=limit,
                output_fields=["number"],
                timeout=self._timeout_s,
            )
            return [(int(hit["entity"]["number"]), float(hit["distance"])) for hit in found]


@contextmanager
def _asking() -> Iterator[None]:
    """Whatever the server or the way to it does wrong is a back end out of order."""
    try:
        yield
    except MilvusException as error:
        raise ToolDownError(f"Milvus: {str(error)[:300]}") from error
    except (KeyError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"[:200]
        raise ToolDownError(f"Milvus: its answer has another form ({problem})") from error
