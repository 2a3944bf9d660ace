"""The servers of one trainer: which are there, which hold the present weights, what goes where."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

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
"""Between two greetings of a server."""
POLL_S = 0.02
"""Between two looks for a server."""

Scores = npt.NDArray[np.float32]
K = TypeVar("K")
T = TypeVar("T")


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
        self._watches: list[asyncio.Task[None]] = []

    async def meet(self) -> None:
        """Watch the servers from now on, and wait until every one has introduced itself.

        Raises:
            EngineError: one does not, or serves another model, or wants another secret.
        """
        self._watches = [asyncio.create_task(self._watch(server)) for server in self.servers]
        await self._until(
            lambda: all(server.served is not None for server in self.servers),
            "not every engine server is there; are they started with `serve-engine`?",
            is_over=any,
        )

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
        scores: dict[str, Scores] = {}
        while not scores:
            seats = await self._usable("score a sequence")
            scores = await _outliving(
                {
                    f"{seat.server.url} ({seat.replica})": seat.server.score(
                        tokens, images, seat.replica
                    )
                    for seat in seats
                }
            )
        spread = float(np.ptp(list(scores.values()), axis=0).max(initial=0.0))
        if not spread <= self._options.agreement:
            raise EngineError(
                f"{' and '.join(scores)} score the same tokens {spread:.2g} nat apart; wanted at "
                f"most probe.tolerance = {self._options.agreement}: one of them holds other "
                "weights or caches"
            )
        return next(iter(scores.values()))

    async def pause(self) -> list[EngineServer]:
        """Stop every server that is there, in the middle of answers."""
        there = [server for server in self.servers if server.weights is not None]
        return list(await _outliving({server: server.pause() for server in there}))

    async def tell(
        self, paused: list[EngineServer], path: str, body: Callable[[str], Body]
    ) -> list[EngineServer]:
        """See `weights.Tell`; the servers that took it."""
        asked = {server: server.load(path, body(server.name)) for server in paused}
        return list(await _outliving(asked))

    async def resume(self, paused: list[EngineServer], *, version: int) -> None:
        """Have paused servers go on, and wait until one holds the weights of this version.

        Raises:
            EngineError: none does, within the patience.
        """
        self.names.advance(version)
        self._placement.forget()
        await _outliving({server: server.resume(self.names.present) for server in paused})
        # Where another rank sends, it may still be at it.
        await self._usable(f"take the weights of version {version}")

    async def close(self) -> None:
        """Hang up."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        for server in self.servers:
            await server.close()

    async def _watch(self, server: EngineServer) -> None:
        while not server.is_forsaken:
            if not server.is_changing:
                with suppress(EngineError):  # the server knows its problem
                    was_there = server.weights is not None
                    await server.greet()
                    has_ours = server.weights == self.names.present and server.weights != BASE
                    if has_ours and not was_there:
                        await server.go_on()  # it was lost as it got them, perhaps before that
                    elif not (was_there and self.names.are_others(server.weights)):
                        await self._bring_up(server)
            await asyncio.sleep(BEAT_S)

    async def _bring_up(self, server: EngineServer) -> None:
        """Give a server that holds others the last weights, if they are this rank's to give.

        It came back, perhaps so soon that nobody saw it go.
        """
        stored = self._carrier.again()
        if stored is not None and server.weights not in (None, self.names.present):
            # Newer ones may be meant before it has these.
            version, path, body = stored
            await server.pause()
            await server.load(path, body)
            await server.resume(self.names.name(version))

    async def _usable(self, task: str) -> list[Seat]:
        """Engines that hold the present weights, once there is one.

        Raises:
            EngineError: there is none within the patience, or none can come back.
        """

        def usable() -> list[Seat]:
            return [s for each in self.servers if not self._problem(each) for s in each.seats]

        return await self._until(usable, f"no engine server is left to {task}", is_over=all)

    async def _until(
        self, found: Callable[[], T], problem: str, *, is_over: Callable[[Iterable[bool]], bool]
    ) -> T:
        """What `found` gives, once it gives something.

        Raises:
            EngineError: not within the patience; or all servers are forsaken, or any.
        """
        deadline = _now() + self._options.patience_s
        while not (it := found()):
            if is_over(server.is_forsaken for server in self.servers) or _now() > deadline:
                lines = [f"  {server.url}: {self._problem(server)}" for server in self.servers]
                raise EngineError("\n".join([problem, *lines]))
            await asyncio.sleep(POLL_S)
        return it

    def _problem(self, server: EngineServer) -> str:
        """Why a server is not asked; empty: it is."""
        if server.weights is None or server.served is None:
            return server.problem
        if server.weights != self.names.present:
            return f"its weights are {server.weights!r}; wanted {self.names.present!r}"
        if server.weights == BASE and server.served.base != self._options.base:
            return "its model folder has other weights than the recipe's"
        return ""


async def _outliving(asked: Mapping[K, Coroutine[Any, Any, T]]) -> dict[K, T]:
    """The answers of those that outlived it, all asked at once. Raises what is not their end."""
    answers = await asyncio.gather(*asked.values(), return_exceptions=True)
    found: dict[K, T] = {}
    for key, answer in zip(asked, answers, strict=True):
        if not isinstance(answer, BaseException):
            found[key] = answer
        elif not isinstance(answer, EngineLostError):
            raise answer
    return found


def _now() -> float:
    return asyncio.get_running_loop().time()
