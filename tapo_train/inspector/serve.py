"""The pages of a run that goes on, on the loopback."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tapo_train.errors import ConfigError

__all__ = ["page_server", "serve"]

REFRESH_S = 5.0
"""[s] Least time between two looks for new steps."""


def serve(out: Path, port: int, refresh: Callable[[], object]) -> None:
    """Serve until interrupted; new steps are added when the first page is asked for."""
    server = page_server(out, port, refresh)
    print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    with server:
        server.serve_forever()


def page_server(out: Path, port: int, refresh: Callable[[], object]) -> ThreadingHTTPServer:
    """The server, not yet serving; port 0 takes a free one.

    Raises:
        ConfigError: the port cannot be listened on.
    """
    handler = functools.partial(_Handler, directory=str(out), refresh=_Sometimes(refresh))
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"inspect: --serve {port}: {error}; wanted a free port") from error


class _Sometimes:
    def __init__(self, refresh: Callable[[], object]) -> None:
        self._refresh, self._lock, self._last = refresh, threading.Lock(), time.monotonic()

    def __call__(self) -> None:
        with self._lock:
            if time.monotonic() - self._last >= REFRESH_S:
                self._refresh()
                self._last = time.monotonic()


class _Handler(SimpleHTTPRequestHandler):
    """Files of the folder, for a browser that was pointed at this machine by its user."""

    def __init__(self, *args: Any, refresh: _Sometimes, **kwargs: Any) -> None:
        self._refresh = refresh
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        """A file; the list of steps is brought up to date first."""
        # A page elsewhere whose name resolves to the loopback must not read the run.
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in ("127.0.0.1", "localhost"):
            self.send_error(421)
            return
        if self.path.partition("?")[0] == "/data/run.js":
            self._refresh()
        super().do_GET()

    def do_HEAD(self) -> None:
        """Not needed by the pages."""
        self.send_error(405)

    def list_directory(self, path: Any) -> None:
        """Folders are not listed."""
        self.send_error(404)

    def end_headers(self) -> None:
        """Nothing is cached: steps are added."""
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the terminal belongs to the run's user."""
