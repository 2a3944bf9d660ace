"""Tools served by an MCP server process. The only door to `mcp`.

The server is started with the run and lives as long; its session has a thread and an event loop
of its own, because every rollout has another loop. What it lists at the start becomes tools: its
schema is what the policy reads and what arguments are checked against. A server that dies is
started again, at most RESTARTS times in a row without an answer in between; calls under way fail.
One that leaves a call unanswered is asked for its tools; if it is silent again, it is killed.
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import anyio
import mcp
from mcp.shared.exceptions import MCPError
from mcp.types import CallToolResult
from pydantic import BaseModel, ValidationError

from tapo_train.errors import ConfigError, ToolArgumentError, ToolDownError, ToolError
from tapo_train.tools.base import ToolContext
from tapo_train.tools.json_schema import arguments_model_of
from tapo_train.tools.mcp_answer import read_answer
from tapo_train.tools.page_text import CUT, readable
from tapo_train.tools.sandbox import Sandbox
from tapo_train.tools.search_answer import bytes_of_base64
from tapo_train.types import Image, Observation

__all__ = ["RESTARTS", "McpServer", "McpTool"]

RESTARTS = 3
START_S = 60.0
"""[s] until a server must have listed its tools."""
CLOSE_S = 10.0
"""[s] a server has to end after its input was closed; then it is killed."""
ALIVE_S = 10.0
"""[s] a server has to list its tools after a call was given up; then it hangs and is killed."""
LONGEST_PX = 1024
"""[px] longest side of a returned picture; larger ones are reduced."""

_INVALID_PARAMS = -32602


class _Session:
    """One life of a server: its process, and the thread that speaks with it."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._parameters = mcp.StdioServerParameters(
            command=command[0], args=list(command[1:]), env=dict(env)
        )
        self.ready: Future[tuple[list[Any], str]] = Future()
        """The listed tools, and name and version of the server."""
        self.problem = "it ended by itself"
        """Why it is over, once it is."""
        self._loop = asyncio.new_event_loop()
        self._life: anyio.CancelScope | None = None
        self._question: asyncio.Task[None] | None = None
        self._client: mcp.Client | None = None
        self._thread = threading.Thread(target=self._live, name="mcp", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._client is not None and self._thread.is_alive()

    def submit(self, name: str, arguments: dict[str, Any]) -> Future[CallToolResult]:
        """Call a tool; ToolDownError if the session ended meanwhile."""
        client = self._client
        if client is None or self._loop.is_closed():
            raise ToolDownError("the MCP server is gone")
        return asyncio.run_coroutine_threadsafe(client.call_tool(name, arguments), self._loop)

    def close(self) -> None:
        """End the process; waits for it, but not for ever."""
        self.give_up()
        self._thread.join(CLOSE_S)

    def give_up(self) -> None:
        """What a failed call does: no further call uses this session."""
        self._client = None
        if self._life is not None:
            self._later(self._life.cancel)

    def suspect(self) -> None:
        """What a call that was given up does: end the server unless it shows that it lives."""
        self._later(self._begin_to_ask)

    def _later(self, work: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop is closed: it is over already
            self._loop.call_soon_threadsafe(work)

    def _begin_to_ask(self) -> None:
        if self._client is not None and (self._question is None or self._question.done()):
            self._question = self._loop.create_task(self._ask(self._client))

    async def _ask(self, client: mcp.Client) -> None:
        with anyio.move_on_after(ALIVE_S) as waiting, suppress(MCPError, ValidationError):
            await client.list_tools(cache_mode="bypass")
        if waiting.cancelled_caught:
            self.problem = f"it left a call without an answer and then gave none in {ALIVE_S:g} s"
            self.give_up()

    def _live(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._speak())

    async def _speak(self) -> None:
        try:
            with anyio.CancelScope() as self._life:
                async with mcp.Client(self._parameters) as client:
                    await self._serve(client)
        except (OSError, ValueError, MCPError, ValidationError, ExceptionGroup) as error:
            if not self.ready.done():
                self.ready.set_exception(error)
        finally:
            self._client = None
            if not self.ready.done():
                self.ready.set_exception(OSError("it ended before it listed its tools"))

    async def _serve(self, client: mcp.Client) -> None:
        """Make the client available until the session is over."""
        info = client.server_info
        about = f"{info.name} {info.version}" if info else ""
        listed = await _all_tools(client)
        self._client = client
        self.ready.set_result((listed, " ".join(readable(about, max_chars=80).split())))
        await anyio.sleep_forever()


async def _all_tools(client: mcp.Client) -> list[Any]:
    listed, cursor = [], None
    for _ in range(100):
        page = await client.list_tools(cursor=cursor)
        listed += page.tools
        cursor = page.next_cursor
        if cursor is None:
            break
    return listed


class McpServer:
    """A server process and its tools.

    Args:
        command: program and arguments; it speaks MCP over its standard input and output.
        env: added to the few variables it inherits (PATH, HOME, USER and their like).
        only: names of the tools to take, in this order; empty: all.
        max_chars: characters of text one answer may hold.

    Raises:
        ConfigError: it cannot be started, lists no such tool, or one with an unusable schema.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        only: Sequence[str] = (),
        max_chars: int = 8192,
    ) -> None:
        self._command, self._env = tuple(command), dict(env or {})
        self.setup = self.setup_of(self._command, self._env)
        self._guard = threading.Lock()
        self._restarts = 0
        self._session = _Session(self._command, self._env)
        try:
            listed, about = self._session.ready.result(START_S)
        except (OSError, ValueError, MCPError, ExceptionGroup, TimeoutError) as error:
            self._session.close()
            raise ConfigError(
                f"tools.mcp: {' '.join(command)} did not start ({type(error).__name__}: {error}); "
                "wanted an MCP server on standard input and output"
            ) from error
        atexit.register(self.close)
        by_name = {tool.name: tool for tool in listed}
        if missing := sorted(set(only) - set(by_name)):
            raise ConfigError(
                f"tools.mcp: {' '.join(command)} has no tool {missing[0]}; "
                f"it has {', '.join(by_name)}"
            )
        sandbox = Sandbox()
        self.tools = tuple(
            McpTool(self, by_name[name], about=about, sandbox=sandbox, max_chars=max_chars)
            for name in (only or by_name)
        )

    @staticmethod
    def setup_of(command: Sequence[str], env: Mapping[str, str]) -> str:
        """What of its start is in the tools' versions; values of variables may be secrets."""
        return json.dumps([list(command), sorted(env)])

    async def call(self, name: str, arguments: dict[str, Any]) -> CallToolResult:
        """The server's answer.

        Raises:
            ToolArgumentError: the server refuses the arguments.
            ToolDownError: it is gone, or answers nonsense.
        """
        session = await asyncio.to_thread(self._living)
        future = session.submit(name, arguments)
        try:
            result = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if future.cancelled() and not (task and task.cancelling()):
                raise ToolDownError("the MCP server went away during the call") from None
            session.suspect()
            raise
        except MCPError as error:
            if error.code == _INVALID_PARAMS:
                raise ToolArgumentError(f"{name}: {error.message}") from error
            gone = error.code == mcp.types.CONNECTION_CLOSED
            if gone:
                session.give_up()
            raise ToolDownError(f"the MCP server: {error.message}", retryable=gone) from error
        except ValidationError as error:
            raise ToolDownError("the MCP server's answer is not MCP", retryable=False) from error
        self._restarts = 0
        return result

    def close(self) -> None:
        """End the server."""
        atexit.unregister(self.close)
        self._session.close()

    def _living(self) -> _Session:
        """The session, started anew if it is gone. Blocks."""
        with self._guard:
            if self._session.is_alive:
                return self._session
            if self._restarts >= RESTARTS:
                raise ToolDownError(
                    f"the MCP server died {self._restarts + 1} times in a row, at last because "
                    f"{self._session.problem}",
                    retryable=False,
                )
            self._restarts += 1
            self._session.close()
            self._session = _Session(self._command, self._env)
            try:
                self._session.ready.result(START_S)
            except (OSError, ValueError, MCPError, ExceptionGroup, TimeoutError) as error:
                raise ToolDownError(f"the MCP server does not start again: {error}") from error
            return self._session


class McpTool:
    """A tool of a server. It is told its arguments and nothing else of the conversation."""

    reads: frozenset[str] = frozenset()

    def __init__(
        self, server: McpServer, listed: Any, *, about: str, sandbox: Sandbox, max_chars: int
    ) -> None:
        self.name: str = listed.name
        self.description: str = (listed.description or listed.name).strip()
        schema = listed.input_schema
        text = json.dumps([2, server.setup, self.description, schema, max_chars], sort_keys=True)
        self.version = f"mcp {about} {hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.arguments_model: type[BaseModel] = arguments_model_of(self.name, schema)
        self._server = server
        self._sandbox = sandbox
        self._max_chars = max_chars

    async def run(self, arguments: BaseModel, context: ToolContext) -> Observation:
        """Text and pictures of the answer; one marked as an error is a ToolError."""
        result = await self._server.call(self.name, arguments.model_dump())
        said = read_answer(result.content, result.structured_content)
        is_long = len(said.text) > self._max_chars
        text = said.text[: self._max_chars] + CUT if is_long else said.text
        if result.is_error:
            raise ToolError(text or "the server says no more")
        shown = [await asyncio.to_thread(self._picture, data) for data in said.pictures]
        return Observation(text=text, images=tuple(shown))

    def close(self) -> None:
        """End the server, with all its tools, and the sandbox of their pictures."""
        self._server.close()
        self._sandbox.close()

    def _picture(self, encoded: str) -> Image:
        return self._sandbox.picture(bytes_of_base64(encoded), longest_px=LONGEST_PX)
