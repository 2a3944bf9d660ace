"""The servers of one trainer: which are there, and which hold the present weights."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from tapo_train.errors import EngineError, EngineLostError
from tapo_train.rollout.remote.carriers import WeightCarrier
from tapo_train.rollout.remote.link import Event, ServerLink
from tapo_train.rollout.remote.messages import (
    BASE,
    UNKNOWN,
    WEIGHTS,
    ClientMessage,
    Failed,
    Loaded,
    PolicyId,
    PutImage,
    header,
)
from tapo_train.rollout.remote.payload import Expected
from tapo_train.types import Image

if TYPE_CHECKING:
    import torch

POLL_S = 0.002
"""How soon it is worth asking again when nothing has arrived."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteOptions:
    """What a trainer expects of its servers."""

    identity: str
    """Of the chat format, see `identity.py`."""
    base: str
    """Of the model folder's weights; counts until weights are sent."""
    expected: Expected
    """What completions of that format may hold."""
    run: str = ""
    """Names the run whose weights are sent; the same on all ranks."""
    sends_weights: bool = True
    """False on a rank whose servers get the weights from another rank."""
    timeout_s: float = 60.0
    """A server that is silent, or whose engine hangs, for so long is given up."""
    patience_s: float = 120.0
    """How long to wait at the start for all servers, later for one, before the run ends."""
    agreement: float = 1e-3
    """[nat] by which scores of two servers may differ."""


class Fleet:
    """Connections to the servers, for the engine's thread alone.

    Args:
        on_lost: told of a server that went away, with what was under way there.

    Raises:
        EngineError: a server cannot be reached, refuses us or serves another model.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        secret: bytes,
        options: RemoteOptions,
        carrier: WeightCarrier,
        on_lost: Callable[[ServerLink], None],
    ) -> None:
        self._options = options
        self._carrier = carrier
        self._on_lost = on_lost
        self._events: SimpleQueue[Event] = SimpleQueue()
        self.links = [
            ServerLink(url=url, secret=secret, timeout_s=options.timeout_s, events=self._events)
            for url in urls
        ]
        self.policy = BASE
        for link in self.links:
            link.start()
        try:
            self._await_all()
        except EngineError:
            self.close()
            raise

    @property
    def max_tokens(self) -> int:
        """[tokens] longest sequence that every server takes."""
        return min(link.served.max_tokens for link in self.links if link.served is not None)

    @property
    def is_silent(self) -> bool:
        """True if no server has said anything new."""
        return self._events.empty()

    @property
    def is_deserted(self) -> bool:
        """True if no server can come back."""
        return all(link.is_refused for link in self.links)

    def usable(self) -> list[ServerLink]:
        """Servers that hold the present weights."""
        base = self._options.base
        return [
            link
            for link in self.links
            if link.channel is not None
            and link.policy == self.policy
            and (self.policy != BASE or (link.served is not None and link.served.base == base))
        ]

    def hear(self, *, wait_s: float = 0.0) -> list[Event]:
        """What servers have said, other than that they came, went or took weights."""
        heard = []
        try:
            while True:
                event = self._events.get(block=wait_s > 0, timeout=wait_s)
                wait_s = 0.0
                if isinstance(event.message, Loaded):
                    self._join(event, event.message.policy)
                elif event.channel is event.link.channel:
                    if event.message is None:
                        self.lose(event.link)
                    else:
                        heard.append(event)
                # Anything else is late words of a connection that was given up.
        except Empty:
            return heard

    def tell(self, link: ServerLink, message: ClientMessage, body: bytes = b"") -> None:
        """Send a frame; a server that cannot be reached is lost."""
        if link.channel is not None:
            try:
                link.channel.send(header(message), body)
            except EngineLostError as error:
                if not link.is_refused:  # else it says what led to this
                    link.problem = str(error)
                self.lose(link)

    def give_pictures(self, link: ServerLink, images: Sequence[Image]) -> None:
        """Send the pictures that a server was not sent yet."""
        for image in images:
            if image.sha256 not in link.sent:
                link.sent.add(image.sha256)
                message = PutImage(sha256=image.sha256, width=image.width, height=image.height)
                self.tell(link, message, image.data)

    def load(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Send weights to every server that is there, and wait until they have them.

        Raises:
            EngineError: no server took them.
        """
        self.hear()
        self.policy = PolicyId(run=self._options.run, version=version)
        asked = [(link, link.channel) for link in self.links if link.channel is not None]
        if self._options.sends_weights:
            for link, _ in asked:
                link.policy = None
            self._carrier.send([link for link, _ in asked], weights, self.policy, self.lose)
        else:
            for _ in weights:  # Gathering them may take all ranks.
                pass
        # A server that comes back meanwhile has a new connection, and is not waited for.
        while any(link.channel is sent and self._is_behind(link) for link, sent in asked):
            for event in self.hear(wait_s=POLL_S):
                if isinstance(event.message, Failed) and event.message.id == WEIGHTS:
                    raise EngineError(
                        f"{event.link.url}: did not take the weights: {event.message.message}"
                    )
                # Anything else is late words about a request that was aborted.
        task = f"take the weights of version {version}"
        if not self._options.sends_weights:
            # The sender's connection may have held where this one broke.
            self.await_usable(task)
        elif not self.usable():
            raise EngineError(self.nobody(task))

    def lose(self, link: ServerLink) -> None:
        """Give a connection up; its thread makes a new one, unless the server talks nonsense."""
        if link.is_refused:
            print(f"engine server dropped: {link.problem}", file=sys.stderr, flush=True)
        link.hang_up()
        self._on_lost(link)

    def forsake(self, link: ServerLink, problem: EngineError) -> None:
        """Give a server up for the rest of the run: what it says cannot be right."""
        link.forsake(str(problem))
        self.lose(link)

    def await_usable(self, task: str) -> list[ServerLink]:
        """Servers that hold the present weights, once there is one.

        Raises:
            EngineError: there is none within the patience, or none can come back.
        """
        deadline = time.monotonic() + self._options.patience_s
        while not (links := self.usable()):
            if self.is_deserted or time.monotonic() > deadline:
                raise EngineError(self.nobody(task))
            self.hear(wait_s=POLL_S)
        return links

    def nobody(self, task: str) -> str:
        """Why no server can do a task."""
        lines = [f"  {link.url}: {self._state(link)}" for link in self.links]
        return "\n".join([f"no engine server is left to {task}", *lines])

    def close(self) -> None:
        """Hang up. The servers go on; they belong to whoever started them."""
        for link in self.links:
            link.close()
        self._carrier.close()

    def _await_all(self) -> None:
        deadline = time.monotonic() + self._options.patience_s
        while missing := [link for link in self.links if link.policy is None]:
            for link in missing:
                if link.is_refused:
                    raise EngineError(link.problem)
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"{link.url} did not answer within {self._options.patience_s:.0f} s: "
                        f"{link.problem}; is it started with `serve-engine`?"
                    )
            self.hear(wait_s=0.05)

    def _join(self, event: Event, policy: PolicyId) -> None:
        """A server says which weights it holds; its first word on every connection."""
        link, served = event.link, event.link.served
        if link.is_refused:
            return
        if event.channel is not link.channel:
            link.hang_up()
            link.channel = event.channel
        link.policy = policy
        if served is None or served.identity != self._options.identity:
            raise EngineError(
                f"{link.url} serves another model: its tokens, template, banned ids or pixels "
                "differ; wanted a server of the recipe's model.path"
            )
        if policy != self.policy and self._options.sends_weights:
            self._carrier.revive(link, self.policy, self.lose)

    def _is_behind(self, link: ServerLink) -> bool:
        """Whether a server is expected to report the present weights."""
        return link.policy not in (self.policy, UNKNOWN)

    def _state(self, link: ServerLink) -> str:
        if link.channel is None:
            return link.problem
        if link.policy != self.policy:
            return f"its weights are {link.policy}; wanted {self.policy}"
        return "its model folder has other weights than the recipe's"
