"""A judge for rehearsals: an OpenAI-compatible server whose verdict is a rule, and which fails.

    python scripts/scripted_judge.py --port 8089 --fail 0.2

It says Yes to every other response, by the digest of its words. A share of the requests fails, by
turns with an error of the server, an answer that is no chat completion, one without a verdict, and
one that breaks off.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAILURES = ("503", "no completion", "no verdict", "cut off")


def verdict_on(response: str) -> bool:
    """What is said of a response."""
    return hashlib.sha256(response.encode()).digest()[0] % 2 == 0


class ScriptedJudge(ThreadingHTTPServer):
    """The server.

    Args:
        fail: share of the requests, spread evenly.
    """

    daemon_threads = True

    def __init__(self, *, port: int = 0, fail: float = 0.2) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.fail = fail
        self.asked: list[tuple[str, str]] = []
        """(response, "yes", "no" or how the request failed), in order."""
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        """What a recipe calls it."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def outcome(self, response: str) -> str:
        """What becomes of a request."""
        with self._lock:
            number = len(self.asked)
            failed = int((number + 1) * self.fail) - int(number * self.fail)
            before = sum(said in FAILURES for _, said in self.asked)
            said = "yes" if verdict_on(response) else "no"
            self.asked.append((response, FAILURES[before % 4] if failed else said))
            return self.asked[-1][1]


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedJudge

    def do_POST(self) -> None:
        body: Any = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        response = prompt.partition("<response>\n")[2].partition("\n</response>")[0]
        said = self.server.outcome(response)
        text = "perhaps" if said == "no verdict" else f"<judge>{said}</judge> By a rule."
        answer = {"choices": [{"message": {"role": "assistant", "content": text}}]}
        data = json.dumps([] if said == "no completion" else answer).encode()
        self.send_response(503 if said == "503" else 200)
        self.send_header("Content-Length", str(len(data) + (said == "cut off")))
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = said == "cut off"

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fail", type=float, default=0.2, help="share of requests (0.2)")
    arguments = parser.parse_args()
    with ScriptedJudge(port=arguments.port, fail=arguments.fail) as server:
        print(f"judging at {server.endpoint}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
