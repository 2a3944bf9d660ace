"""OpenSearch as a `TextStore`, by its own client.

Words are matched by any server of this family, Elasticsearch's too; vectors want OpenSearch's k-NN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from opensearchpy import OpenSearch, OpenSearchException
from opensearchpy.helpers import bulk

from tapo_train.errors import ToolDownError
from tapo_train.tools.text_store import Hits, StoredPassage

__all__ = ["OpenSearchStore"]

_META = "tapo_train"
_BM25 = {"type": "BM25", "k1": 1.2, "b": 0.75}
_CONNECTIONS = 64


class OpenSearchStore:
    """An index.

    Args:
        key: "user:password"; "": none.
        timeout_s: of one request.
    """

    def __init__(self, url: str, index: str, *, key: str, timeout_s: float) -> None:
        self._name = index
        self._client = OpenSearch(
            url,
            http_auth=tuple(key.split(":", 1)) if key else None,
            timeout=timeout_s,
            max_retries=0,  # the tool's own retries are counted and paid for
            maxsize=_CONNECTIONS,
        )

    def exists(self) -> bool:
        """Whether there is an index of this name."""
        with _asking():
            return bool(self._client.indices.exists(index=self._name))

    def create(self, *, dimension: int) -> None:
        """A new index; one of vectors by HNSW and the cosine."""
        fields: dict[str, Any] = {
            "words": {"type": "text", "analyzer": "whitespace"},
            "passage": {"type": "text", "index": False},
        }
        settings: dict[str, Any] = {"similarity": {"default": _BM25}}
        if dimension:
            method = {"name": "hnsw", "engine": "lucene", "space_type": "cosinesimil"}
            fields["vector"] = {"type": "knn_vector", "dimension": dimension, "method": method}
            settings["knn"] = True
        mappings = {"dynamic": False, "properties": fields}
        body = {"settings": {"index": settings}, "mappings": mappings}
        with _asking():
            self._client.indices.create(index=self._name, body=body)

    def add(self, rows: Sequence[StoredPassage]) -> None:
        """Write rows."""
        actions = []
        for row in rows:
            source: dict[str, Any] = {"words": row.words, "passage": row.passage}
            if row.vector is not None:
                source["vector"] = list(row.vector)
            actions.append({"_index": self._name, "_id": str(row.number), "_source": source})
        with _asking():
            bulk(self._client, actions)

    def finish(self, manifest: str) -> None:
        """Show the rows to searches, then say so beside the mapping."""
        with _asking():
            self._client.indices.refresh(index=self._name)
            meta = {"_meta": {_META: manifest}}
            self._client.indices.put_mapping(index=self._name, body=meta)

    def manifest(self) -> str | None:
        """What stands beside the mapping."""
        with _asking():
            # Under the name of the index, which may be another where ours is an alias.
            (found,) = self._client.indices.get_mapping(index=self._name).values()
            said = found["mappings"].get("_meta", {}).get(_META)
            return None if said is None else str(said)

    def by_words(self, words: str, *, limit: int) -> Hits:
        """The best by BM25, whose statistics are those of all shards together."""
        return self._hits({"match": {"words": {"query": words}}}, limit)

    def by_vector(self, vector: Sequence[float], *, limit: int) -> Hits:
        """The nearest; scores are (1 + cosine) / 2."""
        return self._hits({"knn": {"vector": {"vector": list(vector), "k": limit}}}, limit)

    def passages(self, numbers: Sequence[int]) -> Mapping[int, str]:
        """What is kept of these rows."""
        body = {"ids": [str(number) for number in numbers]}
        with _asking():
            found = self._client.mget(index=self._name, body=body, _source_includes="passage")
            rows = [row for row in found["docs"] if row.get("found")]
            return {int(row["_id"]): str(row["_source"]["passage"]) for row in rows}

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _hits(self, query: Mapping[str, Any], limit: int) -> Hits:
        body = {"size": limit, "_source": False, "query": query}
        with _asking():
            found = self._client.search(
                index=self._name, body=body, search_type="dfs_query_then_fetch"
            )
            return [(int(hit["_id"]), float(hit["_score"])) for hit in found["hits"]["hits"]]


@contextmanager
def _asking() -> Iterator[None]:
    """Whatever the server or the way to it does wrong is a back end out of order."""
    try:
        yield
    except OpenSearchException as error:
        raise ToolDownError(f"OpenSearch: {str(error)[:300]}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"[:200]
        raise ToolDownError(f"OpenSearch: its answer has another form ({problem})") from error
