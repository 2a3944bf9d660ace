"""What of OpenSearch's REST interface a text index needs, written from its documentation.

Words are ranked by Lucene's BM25 (k1 1.2, b 0.75), vectors by (1 + cosine) / 2.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import numpy as np

Row = dict[str, Any]


class FakeOpenSearch(ThreadingHTTPServer):
    """Indexes by name: mappings, and documents by id."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.indexes: dict[str, Row] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        """(method, path with query, key) of every request."""
        self.broken: tuple[int, bytes] | None = None
        """What every request is answered instead."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeOpenSearch
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self.server.asked.append((self.command, self.path, self.headers.get("Authorization")))
        index, _, action = urlsplit(self.path).path.lstrip("/").partition("/")
        if self.server.broken is not None:
            self.say(*self.server.broken)
        elif index == "_bulk":
            self.say(200, self.bulk(body.splitlines()))
        elif (self.command, action) == ("PUT", ""):
            is_new = index not in self.server.indexes
            if is_new:
                asked = json.loads(body)
                self.server.indexes[index] = {**asked["mappings"], "documents": {}, "asked": asked}
            self.say(200 if is_new else 400, {"acknowledged": is_new})
        elif index not in self.server.indexes:
            self.say(404, {"error": {"type": "index_not_found_exception"}, "status": 404})
        else:
            held = self.server.indexes[index]
            self.say(200, getattr(self, f"do{action or '_head'}")(index, held, body))

    do_GET = do_PUT = do_POST = do_HEAD = answer

    def do_head(self, index: str, held: Row, body: bytes) -> Row:
        return {}

    def do_refresh(self, index: str, held: Row, body: bytes) -> Row:
        return {"_shards": {"failed": 0}}

    def do_mapping(self, index: str, held: Row, body: bytes) -> Row:
        if self.command == "PUT":
            held |= json.loads(body)
            return {"acknowledged": True}
        kept = {name: held[name] for name in ("_meta", "properties") if name in held}
        return {f"{index}-000001": {"mappings": kept}}

    def do_mget(self, index: str, held: Row, body: bytes) -> Row:
        documents = held["documents"]
        return {
            "docs": [
                {"_id": name, "found": True, "_source": {"passage": documents[name]["passage"]}}
                if name in documents
                else {"_id": name, "found": False}
                for name in json.loads(body)["ids"]
            ]
        }

    def do_search(self, index: str, held: Row, body: bytes) -> Row:
        asked = json.loads(body)
        ((kind, query),) = asked["query"].items()
        if kind == "match":
            scores = bm25(held["documents"], query["words"]["query"].split())
        else:
            scores = cosines(held["documents"], query["vector"]["vector"])
        best = sorted(scores, key=lambda name: (-scores[name], int(name)))[: asked["size"]]
        hits = [{"_id": name, "_score": scores[name]} for name in best]
        return {"took": 1, "timed_out": False, "hits": {"hits": hits}}

    def bulk(self, lines: list[bytes]) -> Row:
        for action, source in zip(lines[::2], lines[1::2], strict=True):
            named = json.loads(action)["index"]
            row = json.loads(source)
            self.server.indexes[named["_index"]]["documents"][named["_id"]] = row
        return {"errors": False, "items": [{"index": {"status": 201}}] * (len(lines) // 2)}

    def say(self, status: int, body: Row | bytes) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def bm25(documents: dict[str, Row], query: list[str]) -> dict[str, float]:
    """Score of every document that holds one of the words."""
    counts = {name: Counter(row["words"].split()) for name, row in documents.items()}
    lengths = {name: count.total() for name, count in counts.items()}
    mean = sum(lengths.values()) / len(lengths)
    scores: Counter[str] = Counter()
    for word in query:
        holding = [name for name, count in counts.items() if word in count]
        rarity = math.log(1 + (len(counts) - len(holding) + 0.5) / (len(holding) + 0.5))
        for name in holding:
            often, norm = counts[name][word], 1.2 * (0.25 + 0.75 * lengths[name] / mean)
            scores[name] += rarity * often / (often + norm)
    return dict(scores)


def cosines(documents: dict[str, Row], vector: list[float]) -> dict[str, float]:
    """(1 + cosine) / 2 of every document."""
    asked = np.array(vector) / np.linalg.norm(vector)
    return {
        name: float((1 + np.dot(row["vector"], asked) / np.linalg.norm(row["vector"])) / 2)
        for name, row in documents.items()
    }
