"""The servers of one trainer: which are there, which hold the present weights, what goes where."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tapo_train.errors import EngineError, EngineLostError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.engine import Completion, GenerationRequest
from tapo_train.rollout.servers.answers import Expected
from tapo_train.rollout.servers.client import Body, Client
from tapo_train.rollout.servers.identity import BASE, WeightNames
from tapo_train.rollout.servers.placement import Placement
from tapo_train.rollout.servers.server import EngineServer, Seat
from tapo_train.rollout.servers.weights import WeightCarrier
from tapo_train.types import Image

MOST_LOSSES = 3
"""A request that was in flight on more servers that went away is taken for the reason."""
BEAT_S = 1.0
"""Between two greetings of a server that is there."""
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 5.0
"""Between two greetings of one that is not; doubled each time."""
POLL_S = 0.02
"""Between two looks for a server."""

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What a trainer expects of its servers."""

    secret: str = field(repr=False)
    base: str
    """Fingerprint of the model folder's weights; counts until weights are sent."""
    run: str
    """Names the weights that are sent; the same on all ranks, and new at each start."""
    timeout_s: float = 60.0
    """A server that is silent, or whose engines hang, for so long is given up."""
    patience_s: float = 120.0
    """How long to wait at the start for all servers, later for one, before the run ends."""
    agreement: float = 1e-3
    """[nat] by which scores of two engines may differ."""


class Fleet:
    """The servers, on one event loop."""

    def __init__(
        self, urls: Sequence[str], chat: ChatFormat, options: ServerOptions, carrier: WeightCarrier
    ) -> None:
        self._options = options
        self._carrier = carrier
        self._placement = Placement()
        self.names = WeightNames(options.run)
        expected = Expected(chat, self.names)
        self.servers = [
            EngineServer(
                url, Client(url, secret=options.secret, timeout_s=options.timeout_s), chat, expected
            )
            for url in urls
        ]
        self._watches = [asyncio.create_task(self._watch(server)) for server in self.servers]

    async def meet(self) -> None:
        """Wait until every server has introduced itself.

        Raises:
            EngineError: one does not, or serves another model, or wants another secret.
        """
        patience_s = self._options.patience_s
        deadline = _now() + patience_s
        while missing := [server for server in self.servers if server.served is None]:
            for server in missing:
                if server.is_forsaken:
                    raise EngineError(f"{server.url}: {server.problem}")
                if _now() > deadline:
                    raise EngineError(
                        f"{server.url} did not answer within {patience_s:.0f} s: "
                        f"{server.problem}; is it started with `serve-engine`?"
                    )
            await asyncio.sleep(POLL_S)

    @property
    def max_tokens(self) -> int:
        """[tokens] longest sequence that every server takes."""
        return min(server.served.max_tokens for server in self.servers if server.served is not None)

    async def complete(self, request: GenerationRequest) -> Completion:
        """The completion of a request, from whichever server gives one.

        Raises:
            EngineError: no server can, or it was lost too often.
        """
        losses = 0
        while True:
            seats = await self._usable(f"serve request {request.id}")
            seat = self._placement.choose(seats, request)
            seat.load += 1
            try:
                return await seat.server.generate(request, seat.replica)
            except EngineLostError as error:
                losses += 1
                if losses > MOST_LOSSES:
                    raise EngineError(
                        f"request {request.id} was lost {losses} times, at last: {error}"
                    ) from error
            finally:
                seat.load -= 1

    async def score(self, tokens: npt.NDArray[np.int32], images: Sequence[Image]) -> Scores:
        """Scores by every engine with the present weights; EngineError if they disagree."""
        while True:
            seats = await self._usable("score a sequence")
            asked = await asyncio.gather(
                *(seat.server.score(tokens, images, seat.replica) for seat in seats),
                return_exceptions=True,
            )
            scores: dict[str, Scores] = {}
            for seat, found in zip(seats, asked, strict=True):
                if isinstance(found, BaseException):
                    if not isinstance(found, EngineLostError):
                        raise found
                else:
                    scores[f"{seat.server.url} ({seat.replica})"] = found
            if scores:
                return _agreed(scores, self._options.agreement)

    async def pause(self) -> list[EngineServer]:
        """Stop every server that is there, in the middle of answers."""
        there = [server for server in self.servers if server.weights is not None]
        return await _outliving(there, lambda server: server.pause())

    async def tell(
        self, paused: list[EngineServer], path: str, body: Callable[[str], Body]
    ) -> list[EngineServer]:
        """See `weights.Tell`; the servers that took it."""
        return await _outliving(paused, lambda server: server.load(path, body(server.name)))

    async def resume(self, paused: list[EngineServer], *, version: int) -> None:
        """Have paused servers go on, and wait until one holds the weights of this version.

        Raises:
            EngineError: none does, within the patience.
        """
        self.names.advance(version)
        self._placement.forget()
        await _outliving(paused, lambda server: server.resume(self.names.present))
        # Where another rank sends, it may still be at it.
        await self._usable(f"take the weights of version {version}")

    async def close(self) -> None:
        """Hang up."""
        for watch in self._watches:
            watch.cancel()
        for server in self.servers:
            await server.close()

    async def _watch(self, server: EngineServer) -> None:
        pause_s = FIRST_PAUSE_S
        while not server.is_forsaken:
            was_there = server.weights is not None
            try:
                if not server.is_changing:
                    await server.greet()
                    if not was_there:
                        await self._bring_up(server)
                pause_s = BEAT_S
            except EngineLostError:
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s)

    async def _bring_up(self, server: EngineServer) -> None:
        """Give a server that came back the last weights, if that is possible."""
        again = self._carrier.again()
        if again is not None and server.weights not in (None, self.names.present):
            await server.pause()
            await server.load(*again)
            await server.resume(self.names.present)

    async def _usable(self, task: str) -> list[Seat]:
        """Engines that hold the present weights, once there is one.

        Raises:
            EngineError: there is none within the patience, or none can come back.
        """
        deadline = _now() + self._options.patience_s
        while not (
            seats := [s for each in self.servers if self._is_usable(each) for s in each.seats]
        ):
            if all(server.is_forsaken for server in self.servers) or _now() > deadline:
                lines = [f"  {server.url}: {self._state(server)}" for server in self.servers]
                raise EngineError("\n".join([f"no engine server is left to {task}", *lines]))
            await asyncio.sleep(POLL_S)
        return seats

    def _is_usable(self, server: EngineServer) -> bool:
        present = self.names.present
        if server.weights != present or server.served is None:
            return False
        return present != BASE or server.served.base == self._options.base

    def _state(self, server: EngineServer) -> str:
        if server.weights is None:
            return server.problem
        if server.weights != self.names.present:
            return f"its weights are {server.weights!r}; wanted {self.names.present!r}"
        return "its model folder has other weights than the recipe's"


async def _outliving(
    servers: list[EngineServer],
    ask: Callable[[EngineServer], Coroutine[Any, Any, None]],
) -> list[EngineServer]:
    """The servers that did what they were asked, all at once. Raises what is not their end."""
    results = await asyncio.gather(*map(ask, servers), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, EngineLostError):
            raise result
    return [server for server, result in zip(servers, results, strict=True) if result is None]


def _agreed(scores: dict[str, Scores], agreement: float) -> Scores:
    """The first engine's scores, if those of the others are the same."""
    (first, expected), *others = scores.items()
    for name, found in others:
        worst = float(np.abs(found - expected).max(initial=0.0))
        if not worst <= agreement:
            raise EngineError(
                f"{first} and {name} score the same tokens {worst:.2g} nat apart; wanted at most "
                f"probe.tolerance = {agreement}: one of them holds other weights or caches"
            )
    return expected


def _now() -> float:
    return asyncio.get_running_loop().time()
