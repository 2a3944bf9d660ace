"""One client of an engine process: what it says, and what it is told.

A thread reads, another writes; the engine's thread only touches queues, so a slow client
costs the others nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from queue import Empty, Queue, SimpleQueue
from typing import Any, Literal

from tapo_train.errors import EngineLostError
from tapo_train.rollout.remote.messages import (
    Alive,
    BeginWeights,
    ClientMessage,
    EndWeights,
    Hello,
    PutImage,
    ServerMessage,
    Tensor,
    header,
    read_client,
)
from tapo_train.rollout.remote.wire import Channel, start_thread
from tapo_train.types import Image, ImageRef

BEAT_S = 1.0
"""How often a client with nothing to hear is told that the engine lives."""
SLICES_AHEAD = 4
"""Slices of weights that wait for the engine at most."""


class PictureStore:
    """Pictures by the sha256 of their bytes, least recently used out first."""

    def __init__(self, *, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._held = 0
        self._images: OrderedDict[str, Image] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, image: Image) -> None:
        """Keep a picture."""
        with self._lock:
            if image.sha256 in self._images:
                return
            self._images[image.sha256] = image
            self._held += len(image.data)
            while self._held > self._limit and len(self._images) > 1:
                self._held -= len(self._images.popitem(last=False)[1].data)

    def get(self, digests: Sequence[str]) -> tuple[Image, ...] | None:
        """The pictures, or None if one is not there (any more)."""
        with self._lock:
            found = [self._images.get(digest) for digest in digests]
            for digest, image in zip(digests, found, strict=True):
                if image is not None:
                    self._images.move_to_end(digest)
        whole = tuple(image for image in found if image is not None)
        return whole if len(whole) == len(found) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Something a client wants of the engine, or that it came or went."""

    session: Session
    message: ClientMessage | Literal["joined", "left"]
    body: bytearray


class Session:
    """A client that has proved itself.

    Args:
        commands: where what it wants of the engine goes, in order.
        idle_s: seconds since the engine last came round.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        commands: SimpleQueue[Command | None],
        pictures: PictureStore,
        idle_s: Callable[[], float],
    ) -> None:
        self._channel = channel
        self._commands = commands
        self._pictures = pictures
        self._idle_s = idle_s
        self._outbox: SimpleQueue[tuple[bytes, bytes] | None] = SimpleQueue()
        self._slices: Queue[tuple[Tensor, bytearray] | EngineLostError | None] = Queue(SLICES_AHEAD)
        self._sends_weights = False
        self.peer = channel.peer

    def say(self, message: ServerMessage, body: bytes = b"") -> None:
        """Queue a frame; returns at once."""
        self._outbox.put((header(message), body))

    def next_slice(self) -> tuple[Tensor, bytearray] | None:
        """The next slice of the weights this client sends; None at their end."""
        found = self._slices.get()
        if isinstance(found, EngineLostError):
            raise found
        return found

    def run(self) -> None:
        """Read until the client goes away or says something wrong."""
        writer = start_thread(self._write, name=f"write {self.peer}")
        try:
            while True:
                frame = self._channel.receive()
                self._take(read_client(frame, peer=self.peer), frame.body)
        except EngineLostError as error:
            if self._sends_weights:
                self._slices.put(error)
            self._commands.put(Command(session=self, message="left", body=bytearray()))
        finally:
            self._outbox.put(None)
            self._channel.close()
            writer.join()

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def _take(self, message: ClientMessage, body: bytearray) -> None:
        match message:
            case PutImage():
                self._pictures.put(_picture(message, body, self.peer))
            case Tensor() | EndWeights() if not self._sends_weights:
                raise EngineLostError(f"{self.peer}: sent a weight before announcing weights")
            case Tensor():
                self._slices.put((message, body))
            case EndWeights():
                self._sends_weights = False
                self._slices.put(None)
            case Hello():
                raise EngineLostError(f"{self.peer}: introduced itself twice")
            case _ if self._sends_weights:
                raise EngineLostError(f"{self.peer}: sent {message.op} in the middle of weights")
            case _:
                self._sends_weights = isinstance(message, BeginWeights)
                self._commands.put(Command(session=self, message=message, body=body))

    def _write(self) -> None:
        try:
            while (item := self._next_item()) is not None:
                self._channel.send(*item)
        except EngineLostError:
            self._channel.close()  # The reading thread ends the session.

    def _next_item(self) -> tuple[Any, ...] | None:
        try:
            return self._outbox.get(timeout=BEAT_S)
        except Empty:
            return (header(Alive(idle_s=self._idle_s())),)


def _picture(message: PutImage, body: bytearray, peer: str) -> Image:
    data = bytes(body)
    found = sha256(data).hexdigest()
    if found != message.sha256:
        raise EngineLostError(
            f"{peer}: sent a picture as {message.sha256[:12]} whose bytes hash to {found[:12]}"
        )
    ref = ImageRef(root=f"sha256:{found}")
    return Image(sha256=found, data=data, width=message.width, height=message.height, ref=ref)
