"""The `Engine` protocol over engine servers.

A request is a pure function of tokens, weights and seed, so one whose server died is asked
again elsewhere. It is delivered once: an answer counts only if it comes through the very
connection its request went out on, and only for the weights this trainer sent last.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tapo_train.errors import AlignmentError, EngineError
from tapo_train.rollout.engine import Completion, GenerationRequest
from tapo_train.rollout.remote.carriers import WeightCarrier
from tapo_train.rollout.remote.fleet import POLL_S, Fleet, RemoteOptions
from tapo_train.rollout.remote.link import Event, ServerLink
from tapo_train.rollout.remote.messages import UNKNOWN, Abort, Completed, Failed, Score, Scored
from tapo_train.rollout.remote.payload import raw, scores_of, submit_message
from tapo_train.rollout.remote.placement import Placement
from tapo_train.types import Image

if TYPE_CHECKING:
    import torch

MOST_LOSSES = 3
"""A request that was in flight on so many servers that went away is taken for the reason."""


@dataclass(slots=True)
class Flight:
    """A request under way, and where; None: it waits for a server."""

    request: GenerationRequest
    link: ServerLink | None = None
    losses: int = 0


class RemoteEngine:
    """Shares requests among servers; used by one thread, like every engine.

    Raises:
        EngineError: a server cannot be reached, refuses us or serves another model.
    """

    def __init__(
        self, urls: Sequence[str], *, secret: bytes, options: RemoteOptions, carrier: WeightCarrier
    ) -> None:
        self._options = options
        self._placement = Placement()
        self._flights: dict[str, Flight] = {}
        self._waiting: list[str] = []
        self._last_usable = time.monotonic()
        self._fleet = Fleet(
            urls, secret=secret, options=options, carrier=carrier, on_lost=self._take_back
        )

    @property
    def version(self) -> int:
        """Of the weights sent last."""
        return self._fleet.policy.version

    def submit(self, request: GenerationRequest) -> None:
        """See `Engine.submit`. What only the server can find wrong, `step` raises."""
        longest = self._fleet.max_tokens
        if request.id in self._flights:
            raise EngineError(f"request {request.id} is in flight already")
        if len(request.tokens) + request.max_tokens > longest:
            raise EngineError(
                f"request {request.id}: {len(request.tokens)} tokens and {request.max_tokens} "
                f"to sample exceed max_model_len = {longest}"
            )
        if not self._flights:
            self._last_usable = time.monotonic()  # Nobody has been waiting since the last rollout.
        self._flights[request.id] = Flight(request=request)
        self._waiting.append(request.id)
        self._place()

    def step(self) -> list[Completion]:
        """See `Engine.step`: what has arrived; nothing is computed here."""
        done = []
        for event in self._fleet.hear(wait_s=POLL_S / 4):
            if isinstance(event.message, Completed):
                done += self._completion(event, event.message)
            elif isinstance(event.message, Failed):
                self._fail(event.link, event.message)
        self._place()
        return done

    def has_unfinished(self) -> bool:
        """See `Engine.has_unfinished`."""
        return bool(self._flights)

    def idle_s(self) -> float:
        """See `Engine.idle_s`."""
        return POLL_S if self._fleet.is_silent else 0.0

    def capacity_tokens(self) -> int | None:
        """See `Engine.capacity_tokens`: the servers queue what they cannot hold."""
        return None

    def abort(self, ids: Sequence[str]) -> None:
        """See `Engine.abort`."""
        for id in ids:
            flight = self._flights.pop(id, None)
            if flight is not None and flight.link is not None:
                flight.link.load -= 1
                self._fleet.tell(flight.link, Abort(ids=(id,)))
        self._waiting = [id for id in self._waiting if id in self._flights]

    def score(
        self, tokens: npt.NDArray[np.int32], images: Sequence[Image]
    ) -> npt.NDArray[np.float32]:
        """See `Engine.score`. Every server is asked; EngineError if they disagree."""
        self._require_idle("score")
        self._fleet.hear()
        scores: dict[str, npt.NDArray[np.float32]] = {}
        # A server that comes back meanwhile has a new connection, and was asked nothing.
        asked = [(link, link.channel) for link in self._fleet.await_usable("score a sequence")]
        digests = tuple(image.sha256 for image in images)
        message = Score(id="score", policy=self._fleet.policy, images=digests)
        for link, _ in asked:
            self._fleet.give_pictures(link, images)
            self._fleet.tell(link, message, raw(tokens, "<i4"))
        while any(link.channel is sent and link.url not in scores for link, sent in asked):
            for event in self._fleet.hear(wait_s=POLL_S):
                if isinstance(event.message, Scored):
                    self._take_scores(scores, event, tokens)
                elif isinstance(event.message, Failed) and event.message.id == message.id:
                    raise EngineError(f"{event.link.url}: instead of a score: {event.message}")
                # Anything else is late words about a request that was aborted.
        if not scores:
            raise EngineError(self._fleet.nobody("score a sequence"))
        return _agreed(scores, self._options.agreement)

    def _take_scores(
        self,
        scores: dict[str, npt.NDArray[np.float32]],
        event: Event,
        tokens: npt.NDArray[np.int32],
    ) -> None:
        try:
            scores[event.link.url] = scores_of(event.body, tokens)
        except EngineError as error:
            self._fleet.forsake(event.link, error)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """See `Engine.load_weights`. Returns when every server that is there has them."""
        self._require_idle("load_weights")
        self._placement.forget()
        self._fleet.load(weights, version=version)

    def close(self) -> None:
        """See `Engine.close`. The servers go on; they belong to whoever started them."""
        self._fleet.close()

    def _place(self) -> None:
        """Send what waits for a server."""
        while self._waiting:
            links = self._fleet.usable()
            if not links:
                return self._be_patient()
            self._last_usable = time.monotonic()
            id = self._waiting.pop(0)
            flight = self._flights[id]
            link = flight.link = self._placement.choose(links, flight.request)
            link.load += 1
            self._send(link, flight.request)
        self._last_usable = time.monotonic()

    def _be_patient(self) -> None:
        waited_s = time.monotonic() - self._last_usable
        if self._fleet.is_deserted or waited_s > self._options.patience_s:
            raise EngineError(self._fleet.nobody(f"serve {len(self._flights)} requests"))

    def _send(self, link: ServerLink, request: GenerationRequest) -> None:
        self._fleet.give_pictures(link, request.images)
        message = submit_message(request, self._fleet.policy)
        self._fleet.tell(link, message, raw(request.tokens, "<i4"))

    def _completion(self, event: Event, message: Completed) -> list[Completion]:
        """What an event completes, if it was waited for and can be right."""
        flight = self._flight(message.id, event.link)
        if flight is None:
            return []
        try:
            completion = self._options.expected.completion(message, event.body, flight.request)
        except EngineError as error:
            self._fleet.forsake(event.link, error)
            return []
        del self._flights[message.id]
        event.link.load -= 1
        return [completion]

    def _fail(self, link: ServerLink, message: Failed) -> None:
        """Ask again what a server could not know; raise what is wrong with the request."""
        flight = self._flight(message.id, link)
        if flight is None:
            return
        link.load -= 1
        if message.reason == "policy":
            link.policy = UNKNOWN  # Somebody else sent it weights.
        elif message.reason == "images":
            link.sent.clear()  # It keeps so many pictures and no more.
        else:
            del self._flights[message.id]
            kind = AlignmentError if message.reason == "alignment" else EngineError
            raise kind(f"{message.message} (at {link.url})")
        self._wait_again(message.id, flight, message.message)

    def _flight(self, id: str, link: ServerLink) -> Flight | None:
        """The request a server speaks of; None if it was aborted or is asked elsewhere."""
        flight = self._flights.get(id)
        return flight if flight is not None and flight.link is link else None

    def _take_back(self, link: ServerLink) -> None:
        """What was under way on a lost server waits for another one."""
        for id, flight in self._flights.items():
            if flight.link is link:
                self._wait_again(id, flight, link.problem)

    def _wait_again(self, id: str, flight: Flight, problem: str) -> None:
        flight.link = None
        flight.losses += 1
        if flight.losses > MOST_LOSSES:
            raise EngineError(f"request {id} was lost {flight.losses} times, at last: {problem}")
        self._waiting.append(id)

    def _require_idle(self, what: str) -> None:
        if self._flights:
            raise EngineError(f"{what} needs an idle engine; {len(self._flights)} in flight")


def _agreed(
    scores: dict[str, npt.NDArray[np.float32]], agreement: float
) -> npt.NDArray[np.float32]:
    """The first server's scores, if those of the others are the same."""
    (first, expected), *others = scores.items()
    for url, found in others:
        worst = float(np.abs(found - expected).max(initial=0.0))
        if not worst <= agreement:
            raise EngineError(
                f"{first} and {url} score the same tokens {worst:.2g} nat apart; wanted at most "
                f"probe.tolerance = {agreement}: one of them holds other weights or caches"
            )
    return expected
