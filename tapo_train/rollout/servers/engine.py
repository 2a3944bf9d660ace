"""The `Engine` protocol over engine servers.

    rollout's thread   submit, abort ─▶ event loop ─▶ one coroutine for each request ─▶ servers
                       step ◀── completions ◀─────────────────┘
    learner's thread   load_weights, score: while requests are under way

A request is a pure function of tokens, weights and seed, so one whose server went away is asked
again elsewhere, by the same coroutine: it is delivered once. Weights may change in the middle of
an answer; `Completion.versions` says which sampled what.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from tapo_train.errors import AlignmentError, EngineError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.engine import Completion, GenerationRequest, require_admissible
from tapo_train.rollout.servers.client import Body
from tapo_train.rollout.servers.fleet import Fleet, ServerOptions
from tapo_train.rollout.servers.weights import WeightCarrier
from tapo_train.types import Image

if TYPE_CHECKING:
    import torch

POLL_S = 0.005
"""How soon it is worth asking again when nothing has arrived."""

T = TypeVar("T")


class ServerEngine:
    """Shares requests among servers.

    One thread may submit, step and abort while another loads weights and scores.

    Raises:
        EngineError: a server cannot be reached, refuses us or serves another model.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        chat: ChatFormat,
        options: ServerOptions,
        carrier: WeightCarrier,
    ) -> None:
        self._chat = chat
        self._carrier = carrier
        self._flights: dict[str, Future[Completion]] = {}
        self._landed: SimpleQueue[tuple[str, Future[Completion]]] = SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="servers", daemon=True)
        self._thread.start()
        self._fleet = Fleet(urls, chat, options, carrier)
        try:
            self._run(self._fleet.meet())
        except EngineError:
            self.close()
            raise

    @property
    def version(self) -> int:
        """Of the weights sent last."""
        return self._fleet.names.number

    def submit(self, request: GenerationRequest) -> None:
        """See `Engine.submit`. What only a server can find wrong, `step` raises."""
        require_admissible(request, self._flights, max_model_len=self._fleet.max_tokens)
        self._require_aligned(request)
        flight = asyncio.run_coroutine_threadsafe(self._fleet.complete(request), self._loop)
        self._flights[request.id] = flight
        flight.add_done_callback(lambda done: self._landed.put((request.id, done)))

    def step(self) -> list[Completion]:
        """See `Engine.step`: what has arrived; nothing is computed here."""
        done, wait_s = [], POLL_S / 10
        try:
            while True:
                id, flight = self._landed.get(timeout=wait_s)
                wait_s = 0.0
                if self._flights.get(id) is flight:  # else it was aborted
                    del self._flights[id]
                    done.append(flight.result())
        except Empty:
            return done

    def has_unfinished(self) -> bool:
        """See `Engine.has_unfinished`."""
        return bool(self._flights)

    def idle_s(self) -> float:
        """See `Engine.idle_s`."""
        return POLL_S if self._landed.empty() else 0.0

    def capacity_tokens(self) -> int | None:
        """See `Engine.capacity_tokens`: the servers queue what they cannot hold."""
        return None

    def abort(self, ids: Sequence[str]) -> None:
        """See `Engine.abort`: servers drop what nobody waits for."""
        for id in ids:
            flight = self._flights.pop(id, None)
            if flight is not None:
                flight.cancel()

    def score(
        self, tokens: npt.NDArray[np.int32], images: Sequence[Image]
    ) -> npt.NDArray[np.float32]:
        """See `Engine.score`. Every engine is asked; EngineError if they disagree."""
        return self._run(self._fleet.score(tokens, images))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """See `Engine.load_weights`; but requests may be in flight, and go on with the new weights.

        Returns when every server that is there has them.
        """
        self._carrier.prepare(weights, version=version)
        paused = self._run(self._fleet.pause()) if self._carrier.sends else []

        def tell(path: str, body: Callable[[str], Body]) -> None:
            nonlocal paused
            paused = self._run(self._fleet.tell(paused, path, body))

        self._carrier.deliver(tell, {each.name: each.devices for each in paused})
        self._run(self._fleet.resume(paused, version=version))

    def close(self) -> None:
        """See `Engine.close`. The servers go on; they belong to whoever started them."""
        self.abort(list(self._flights))
        self._run(self._fleet.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._carrier.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _require_aligned(self, request: GenerationRequest) -> None:
        """The server is given one placeholder per picture and makes as many of it as we did."""
        collapsed = np.array(self._chat.collapse(request.tokens), dtype=np.int32)
        try:
            expanded = self._chat.expand(collapsed, request.images)
        except AlignmentError as error:
            raise AlignmentError(f"request {request.id}: {error}") from error
        if not np.array_equal(expanded, request.tokens):
            raise AlignmentError(f"request {request.id}: placeholders do not fit their pictures")
