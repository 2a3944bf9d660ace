"""Search-R1's `/retrieve` over a corpus index.

    POST /retrieve {"queries": ["…"], "topk": 3, "return_scores": true}
    → {"result": [[{"document": {"id": "…", "contents": "\\"Title\\"\\ntext"}, "score": 1.5}]]}

Without scores the documents themselves stand in the lists. What is malformed or too large gets 400
or 413 with a sentence; connections beyond MAX_CONNECTIONS are closed unanswered.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tapo_train.tools.corpus import contents_of
from tapo_train.tools.corpus_index import CorpusIndex

__all__ = ["SearchServer"]

MAX_BODY_BYTES = 1 << 20
MAX_QUERIES = 256
MAX_TOP_K = 100
MAX_CONNECTIONS = 128
IDLE_S = 60.0
"""[s] a connection may stay silent, also within a request."""


class RetrieveRequest(BaseModel):
    """What a client asks."""

    model_config = ConfigDict(extra="ignore", strict=True)

    queries: Annotated[list[str], Field(max_length=MAX_QUERIES)]
    topk: Annotated[int, Field(ge=1, le=MAX_TOP_K)] | None = None
    return_scores: bool = False


class SearchServer(ThreadingHTTPServer):
    """Answers `/retrieve`, a thread for each connection.

    Args:
        top_k: documents for a query whose request says nothing.
    """

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, index: CorpusIndex, *, host: str, port: int, top_k: int = 3) -> None:
        self._index = index
        self._top_k = top_k
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__((host, port), _Handler)

    def answer(self, asked: RetrieveRequest) -> dict[str, object]:
        """The documents of each query, best first."""
        return {"result": [self._found(query, asked) for query in asked.queries]}

    def _found(self, query: str, asked: RetrieveRequest) -> list[dict[str, object]]:
        ranked = self._index.ranked(query, top_k=asked.topk or self._top_k)
        documents = [
            ({"id": passage.id, "contents": contents_of(passage)}, score)
            for passage, score in ranked
        ]
        if asked.return_scores:
            return [{"document": document, "score": score} for document, score in documents]
        return [dict(document) for document, _ in documents]

    def process_request(self, request: socket | tuple[bytes, socket], client_address: str) -> None:
        """A thread, if there is one left."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(
        self, request: socket | tuple[bytes, socket], client_address: str
    ) -> None:
        """The whole life of a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()


class _Handler(BaseHTTPRequestHandler):
    server: SearchServer
    protocol_version = "HTTP/1.1"
    server_version = "tapo_train"
    sys_version = ""
    timeout = IDLE_S
    # Head and body are two writes: without this the second waits for the client's ACK.
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._refuse(411, "wanted a Content-Length")
        elif len(length) > 12 or int(length) > MAX_BODY_BYTES:
            self._refuse(413, f"found {length[:12]} bytes, wanted at most {MAX_BODY_BYTES}")
        else:
            body = self.rfile.read(int(length))
            if self.path.partition("?")[0] != "/retrieve":
                self._say(404, {"detail": "wanted POST /retrieve"})
            else:
                self._retrieve(body)

    def _retrieve(self, body: bytes) -> None:
        try:
            asked = RetrieveRequest.model_validate_json(body)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, problem["loc"])) or "body"
            self._say(400, {"detail": f"{place}: {problem['msg']}"})
        else:
            self._say(200, self.server.answer(asked))

    def _refuse(self, status: int, detail: str) -> None:
        # The body stays unread, so nothing else can follow on this connection.
        self.close_connection = True
        self._say(status, {"detail": detail})

    def _say(self, status: int, answer: dict[str, object]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Queries are nobody's business, and a line per request would fill a disk."""
