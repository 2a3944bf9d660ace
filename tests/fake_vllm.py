"""A server that speaks vLLM's routes, as far as a trainer uses them, and writes scripted turns."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from safetensors.torch import load_file

from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.servers.engine import ServerEngine
from tapo_train.rollout.servers.fleet import ServerOptions
from tapo_train.rollout.servers.gate import SERVED_PATH, authorization
from tapo_train.rollout.servers.identity import (
    BASE,
    Served,
    chat_identity,
    weights_fingerprint,
)
from tapo_train.rollout.servers.weights import ForeignWeights, WeightCarrier
from tapo_train.types import Image, ImageRef

SECRET = "sixteen-letters-"
WAIT_S = 60.0
"""[s] for what happens at once, on a machine that does other things as well."""

Script = Callable[[str], str]
"""The id of a request to what the policy writes."""


class FakeServer(ThreadingHTTPServer):
    """Serves until `die`; the log-probability of the k-th token of a turn is -(k + 1) / 1000.

    A prompt's scores are minus the sum of all weights that were loaded.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, chat: ChatFormat, script: Script, *, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.chat, self.script = chat, script
        self.served: Served | None = Served(
            identity=chat_identity(chat), base=weights_fingerprint(chat.model), max_tokens=4096
        )
        self.label, self.weights = BASE, {}
        self.asked: list[str] = []
        """Ids of requests, in order."""
        self.pictures: dict[str, bytes] = {}
        self.sent: list[str] = []
        """Names of the pictures that came in full."""
        self.posts: list[str] = []
        self.ahead: list[str] = []
        """Ids of requests that want to be answered before those that came earlier."""
        self.answers = threading.Event()
        """While it is clear, no request is answered."""
        self.answers.set()
        self.lives = threading.Event()
        """While it is clear, nothing at all is answered."""
        self.lives.set()
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.fault: Callable[[dict[str, Any]], dict[str, Any] | int | None] = lambda answer: answer
        """What becomes of an answer: another one, a status, or (None) a broken line."""
        self.refuses_weights = False
        self.on_load: Callable[[], object] = lambda: None
        """Called when weights are to be taken, before they are."""
        self._lines: list[socket.socket] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def get_request(self) -> tuple[socket.socket, Any]:
        line, address = super().get_request()
        self._lines.append(line)
        return line, address

    def version_that_samples(self) -> str:
        """The name of the weights, once they are not being replaced."""
        while True:
            self.goes_on.wait()
            label = self.label
            if self.goes_on.is_set():
                return label

    def die(self) -> None:
        """Like kill -9: nothing listens any more, and every line breaks."""
        self.shutdown()
        self.server_close()
        for line in self._lines:
            try:
                line.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    """One line to a trainer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeServer

    def do_GET(self) -> None:
        server = self.server
        server.lives.wait()
        said: dict[str, Any] = {"/weight_info": {"weight_version": server.label}, "/health": {}}
        if server.served is not None:
            said[SERVED_PATH] = asdict(server.served)
        self.say(200 if self.path in said else 404, said.get(self.path, {}))

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        server.lives.wait()
        server.posts.append(self.path)
        match self.path:
            case "/inference/v1/generate":
                self.generate(body)
            case "/pause?mode=keep&clear_cache=false":
                server.goes_on.clear()
                self.say(200, {})
            case "/resume":
                server.goes_on.set()
                self.say(200, {})
            case "/update_weight_version":
                server.label = body["new_version"]
                self.say(200, {})
            case "/collective_rpc":
                self.load(Path(body["kwargs"]["weights_path"]))
            case _:
                self.say(200, {"success": True})

    def load(self, folder: Path) -> None:
        self.server.on_load()
        if self.server.refuses_weights:
            return self.say(500, {"error": "shapes differ"})
        self.server.weights = {}
        for file in sorted(folder.glob("*.safetensors")):
            self.server.weights |= load_file(file)
        self.say(200, {})

    def generate(self, body: dict[str, Any]) -> None:
        server = self.server
        images = [self.picture(part) for part in body["content_parts"] or ()]
        if None in images:
            return self.say(500, {"error": "cache miss"})
        id = body["request_id"].rpartition("@")[0]
        parameters = body["sampling_params"]
        if body["priority"] < 0:
            server.ahead.append(id)
        if "stop_token_ids" in parameters:
            server.asked.append(id)
            server.answers.wait()
        prompt = server.chat.expand(np.array(body["token_ids"], dtype=np.int32), images)
        written = [0]
        if "stop_token_ids" in parameters:
            written = server.chat.assistant(server.script(id)).tolist()
        version = server.version_that_samples()
        tokens = written[: parameters["max_tokens"]]
        answer = {
            "choices": [
                {
                    "token_ids": tokens,
                    "finish_reason": "stop" if tokens == written else "length",
                    "logprobs": {
                        "content": [
                            {"token_id": token, "logprob": -(k + 1) / 1000}
                            for k, token in enumerate(tokens)
                        ]
                    },
                    "weight_versions": [
                        {"version": version, "start": 0, "end": len(tokens)},
                    ],
                }
            ],
            "prompt_token_ids": prompt.tolist(),
            "prompt_logprobs": self.scores(prompt.tolist()),
            "usage": {"prompt_tokens_details": {"cached_tokens": 0}},
        }
        changed = server.fault(answer) if "logit_bias" in parameters else answer
        if changed is None:
            self.close_connection = True
        elif isinstance(changed, int):
            self.say(changed, {"error": "out of order"})
        else:
            self.say(200, changed)

    def scores(self, prompt: list[int]) -> list[dict[str, Any] | None]:
        total = sum(float(tensor.float().sum()) for tensor in self.server.weights.values())
        return [None, *({str(token): {"logprob": -total}} for token in prompt[1:])]

    def picture(self, part: dict[str, Any]) -> Image | None:
        name = part["uuid"]
        if part["url"] is not None:
            self.server.sent.append(name)
            self.server.pictures[name] = base64.b64decode(part["url"].partition("base64,")[2])
        data = self.server.pictures.get(name)
        if data is None:
            return None
        assert hashlib.sha256(data).hexdigest() == name
        width, height = PIL.Image.open(io.BytesIO(data)).size
        ref = ImageRef(root=f"sha256:{name}")
        return Image(sha256=name, data=data, width=width, height=height, ref=ref)

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if self.headers.get("Authorization") != authorization(SECRET):
            self.say(401, {"error": "wrong secret"})
            return False
        return True

    def say(self, status: int, answer: object) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


@contextmanager
def serving(chat: ChatFormat, script: Script, *, port: int = 0) -> Iterator[FakeServer]:
    """A server that ends with the test."""
    server = FakeServer(chat, script, port=port)
    try:
        yield server
    finally:
        server.answers.set()
        server.lives.set()
        server.goes_on.set()
        server.die()


@contextmanager
def trainer_of(
    urls: list[str],
    chat: ChatFormat,
    *,
    carrier: WeightCarrier | None = None,
    secret: str = SECRET,
    **options: Any,
) -> Iterator[ServerEngine]:
    """An engine that asks the servers."""
    expected = {"base": weights_fingerprint(chat.model), "run": "r", "patience_s": 10.0}
    engine = ServerEngine(
        urls,
        chat=chat,
        options=ServerOptions(secret=secret, **(expected | options)),
        carrier=carrier or ForeignWeights(),
    )
    try:
        yield engine
    finally:
        engine.close()


def wait_until(condition: Callable[[], object], *, most_s: float = WAIT_S) -> None:
    """Wait for what happens soon."""
    deadline = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
