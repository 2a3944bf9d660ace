"""An engine in a process of its own: any number of clients, one engine thread.

    connections ─ read ─▶ commands ─▶ engine thread ─▶ outboxes ─ write ─▶ connections

All requests in flight, whoever sent them, are decoded together; a result is pushed the
moment it is there. Commands are obeyed in order. Weights and scores need an idle engine,
so they wait for what was asked before them, and what is asked after them waits for them.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Literal

from tapo_train.errors import AlignmentError, EngineLostError, TapoError
from tapo_train.rollout.engine import Completion, Engine
from tapo_train.rollout.remote.listener import Listener, Served
from tapo_train.rollout.remote.messages import (
    BASE,
    UNKNOWN,
    WEIGHTS,
    Abort,
    BeginWeights,
    Completed,
    Failed,
    Loaded,
    PolicyId,
    Reload,
    Score,
    Scored,
    Submit,
)
from tapo_train.rollout.remote.payload import int32, raw, request_of
from tapo_train.rollout.remote.session import BEAT_S, Command, PictureStore, Session
from tapo_train.rollout.remote.weight_stream import Named, assemble, read_weights
from tapo_train.rollout.remote.wire import Channel

PICTURE_BYTES = 2 * 2**30
"""Encoded pictures a server keeps."""


class EngineServer:
    """Serves one `Engine` on a TCP port until `stop`.

    Args:
        port: 0 takes a free one; `address` says which.
        weights_root: folder below which `Reload` may read; None refuses it.
    """

    def __init__(
        self,
        engine: Engine,
        served: Served,
        *,
        secret: bytes,
        host: str = "127.0.0.1",
        port: int = 0,
        weights_root: Path | None = None,
    ) -> None:
        self._engine = engine
        self._weights_root = weights_root
        self._listener = Listener(
            served, secret=secret, host=host, port=port, welcome=self._welcome
        )
        self.address = self._listener.address
        self._pictures = PictureStore(limit_bytes=PICTURE_BYTES)
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._waiting: deque[Command] = deque()
        self._sessions: set[Session] = set()
        self._owners: dict[str, Session] = {}
        self._policy = BASE
        self._beat = time.monotonic()
        self._stops = False

    def serve(self) -> None:
        """Run the engine in this thread until `stop` is called."""
        self._listener.start()
        try:
            while not self._stops:
                self._turn()
        finally:
            self._listener.close()
            for session in list(self._sessions):
                session.close()

    def stop(self) -> None:
        """Let `serve` return; from any thread."""
        self._stops = True
        self._commands.put(None)
        for session in list(self._sessions):
            session.close()  # The engine may be waiting for weights that one of them sends.

    def _welcome(self, channel: Channel) -> None:
        """Serve a client that has proved itself until it goes away; in a thread of its own."""
        session = Session(
            channel,
            commands=self._commands,
            pictures=self._pictures,
            idle_s=lambda: time.monotonic() - self._beat,
        )
        self._commands.put(Command(session=session, message="joined", body=bytearray()))
        session.run()

    def _turn(self) -> None:
        self._beat = time.monotonic()
        is_busy = self._engine.has_unfinished()
        self._take_commands(wait_s=0.0 if is_busy or self._waiting else BEAT_S)
        while self._waiting and not (_needs_idle(self._waiting[0]) and self._is_busy()):
            self._obey(self._waiting.popleft())
        if self._is_busy():
            for completion in self._engine.step():
                self._deliver(completion)

    def _is_busy(self) -> bool:
        return self._engine.has_unfinished()

    def _take_commands(self, *, wait_s: float) -> None:
        try:
            while True:
                command = self._commands.get(block=wait_s > 0, timeout=wait_s)
                if command is not None:
                    self._waiting.append(command)
                wait_s = 0.0
        except Empty:
            return

    def _obey(self, command: Command) -> None:
        session, message = command.session, command.message
        match message:
            case "joined":
                self._sessions.add(session)
                session.say(Loaded(policy=self._policy))
            case "left":
                self._sessions.discard(session)
                self._abort(session, list(self._owners))
            case Abort():
                self._abort(session, message.ids)
            case Submit():
                self._submit(session, message, command.body)
            case Score():
                self._score(session, message, command.body)
            case BeginWeights():
                self._load(session, message.policy, assemble(session.next_slice))
            case Reload():
                self._reload(session, message)

    def _submit(self, session: Session, message: Submit, body: bytearray) -> None:
        images = self._pictures.get(message.images)
        if message.policy != self._policy:
            return self._refuse_policy(session, message.id, message.policy)
        if images is None:
            return _fail(session, message.id, "images", "the server does not hold the pictures")
        try:
            request = request_of(message, body, images)
            self._engine.submit(request)
            self._owners[request.id] = session
        except AlignmentError as error:
            _fail(session, message.id, "alignment", str(error))
        except (TapoError, ValueError) as error:  # ValueError: vLLM's own way to refuse
            _fail(session, message.id, "engine", str(error))

    def _deliver(self, completion: Completion) -> None:
        message = Completed(
            id=completion.id,
            finished=completion.finished,
            cached_tokens=completion.cached_tokens,
        )
        numbers = raw(completion.tokens, "<i4") + raw(completion.logprobs, "<f4")
        self._owners.pop(completion.id).say(message, numbers)

    def _abort(self, session: Session, ids: Sequence[str]) -> None:
        """Drop those of a client's own requests that are still in flight."""
        own = [id for id in ids if self._owners.get(id) is session]
        for id in own:
            del self._owners[id]
        self._engine.abort(own)

    def _score(self, session: Session, message: Score, body: bytearray) -> None:
        images = self._pictures.get(message.images)
        if message.policy != self._policy:
            return self._refuse_policy(session, message.id, message.policy)
        if images is None:
            return _fail(session, message.id, "images", "the server does not hold the pictures")
        try:
            scores = self._engine.score(int32(body), images)
        except (TapoError, ValueError) as error:
            return _fail(session, message.id, "engine", str(error))
        session.say(Scored(id=message.id), raw(scores, "<f4"))

    def _reload(self, session: Session, message: Reload) -> None:
        root = self._weights_root
        folder = None if root is None else _below(root, message.folder)
        if folder is None:
            text = f"no weights are read from {message.folder}; wanted below --weights-root {root}"
            return _fail(session, WEIGHTS, "engine", text)
        self._load(session, message.policy, read_weights(folder))

    def _load(self, session: Session, policy: PolicyId, weights: Named) -> None:
        """Replace the weights. Half of them replaced is a policy nobody may sample from."""
        self._policy = UNKNOWN
        beating = self._beating(weights)
        try:
            try:
                self._engine.load_weights(beating, version=policy.version)
            finally:
                for _ in beating:  # An engine that does not read to the end.
                    pass
        except EngineLostError as error:
            return print(f"weights of {policy} are incomplete: {error}", file=sys.stderr)
        except (TapoError, ValueError, RuntimeError, LookupError) as error:
            # Beside ours: how engines say that names or shapes are not their model's.
            return _fail(session, WEIGHTS, "engine", f"{type(error).__name__}: {error}")
        self._policy = policy
        for each in list(self._sessions):
            each.say(Loaded(policy=policy))

    def _beating(self, weights: Named) -> Named:
        for named in weights:
            self._beat = time.monotonic()
            yield named

    def _refuse_policy(self, session: Session, id: str, wanted: PolicyId) -> None:
        _fail(session, id, "policy", f"the server's weights are {self._policy}; wanted {wanted}")


def _below(root: Path, name: str) -> Path | None:
    """The folder a client names, if it lies below `root`."""
    try:
        folder = (root / name).resolve()
    except (OSError, ValueError):  # a name that no folder can have
        return None
    return folder if folder.is_relative_to(root.resolve()) else None


def _needs_idle(command: Command) -> bool:
    return isinstance(command.message, Score | BeginWeights | Reload)


def _fail(
    session: Session,
    id: str,
    reason: Literal["alignment", "engine", "policy", "images"],
    text: str,
) -> None:
    session.say(Failed(id=id, reason=reason, message=text))
