"""Engine servers when something breaks midway: nobody waits for ever, and nobody dies of it."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
import pytest
import torch
from engine_servers import (
    SECRET,
    WAIT_S,
    base_policy,
    impostor,
    introduce,
    knock,
    say,
    serving,
    trainer_of,
)
from scripted_engine import ScriptedEngine

from tapo_train.errors import EngineError, EngineLostError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.engine import GenerationRequest
from tapo_train.rollout.remote.link import ServerLink
from tapo_train.rollout.remote.messages import (
    Alive,
    BeginWeights,
    Challenge,
    Completed,
    EndWeights,
    Failed,
    Hello,
    Loaded,
    PolicyId,
    Reload,
    Score,
    Scored,
    Tensor,
    header,
    read_client,
    read_server,
)
from tapo_train.rollout.remote.wire import Channel, proof
from tapo_train.types import Image


@pytest.fixture(scope="module")
def chat(tiny_qwen3_vl: Path) -> ChatFormat:
    return ChatFormat(tiny_qwen3_vl)


def answers(request: GenerationRequest) -> str:
    return "<answer>x</answer>"


class WeighedEngine(ScriptedEngine):
    """A scripted engine that takes weights."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        self.weights = {name: tensor.clone() for name, tensor in weights}


def test_a_score_is_not_waited_for_from_a_server_that_came_back(chat: ChatFormat) -> None:
    asked = threading.Event()
    lives: list[Channel] = []

    def dies_once(channel: Channel) -> None:
        say(channel, base_policy())
        lives.append(channel)
        if len(lives) == 1:
            channel.receive()
            asked.set()
            return
        while True:
            time.sleep(0.05)
            say(channel, Alive(idle_s=0.0))

    class Slow(ScriptedEngine):
        def score(
            self, tokens: npt.NDArray[np.int32], images: Sequence[Image]
        ) -> npt.NDArray[np.float32]:
            assert asked.wait(WAIT_S)
            deadline = time.monotonic() + WAIT_S
            while len(lives) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.2)
            return np.zeros(len(tokens) - 1, dtype=np.float32)

    found: list[npt.NDArray[np.float32]] = []
    with ExitStack() as stack:
        server = stack.enter_context(serving(Slow(chat, answers), chat))
        other = stack.enter_context(impostor(chat, dies_once))
        remote = stack.enter_context(trainer_of([server, other], chat))
        scoring = threading.Thread(
            target=lambda: found.append(remote.score(chat.plain("hello"), [])), daemon=True
        )
        scoring.start()
        scoring.join(WAIT_S)
        assert len(lives) == 2
        assert len(found) == 1 and not found[0].any()


def test_late_words_about_an_aborted_request_harm_neither_weights_nor_scores(
    chat: ChatFormat,
) -> None:
    late = Completed(id="t:0", finished="stop", cached_tokens=0)

    def talkative(channel: Channel) -> None:
        say(channel, base_policy())
        while True:
            message = read_client(channel.receive(), peer="trainer")
            if isinstance(message, EndWeights):
                say(channel, late, bytes(8))
                say(channel, Loaded(policy=PolicyId(run="r", version=1)))
            elif isinstance(message, Score):
                say(channel, late, bytes(8))
                say(channel, Scored(id="score"), bytes(4))

    with impostor(chat, talkative) as server, trainer_of([server], chat, run="r") as remote:
        remote.load_weights({"w": torch.ones(2)}.items(), version=1)
        assert remote.score(chat.plain("hello")[:2], []).tolist() == [0.0]


def test_weights_that_do_not_fit_are_refused_and_the_server_lives_on(
    chat: ChatFormat, tmp_path: Path
) -> None:
    class Picky(WeighedEngine):
        def load_weights(
            self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int
        ) -> None:
            super().load_weights(weights, version=version)
            self.weights["w"].view(3)  # RuntimeError, as torch raises for a wrong shape

    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "00000.safetensors").write_bytes(b"half a file")
    engine = Picky(chat, answers)
    with serving(engine, chat, weights_root=tmp_path) as server:
        with trainer_of([server], chat, run="r") as remote:
            for shape in (2, 4):
                with pytest.raises(EngineError, match="did not take the weights: RuntimeError"):
                    remote.load_weights({"w": torch.ones(shape)}.items(), version=1)
            remote.load_weights({"w": torch.ones(3)}.items(), version=2)
        channel = knock(server)
        introduce(channel)
        for folder, said in (("bad", "cannot be read"), ("a\0b", "wanted below --weights-root")):
            channel.send(header(Reload(policy=PolicyId(run="r", version=3), folder=folder)))
            answer = read_server(channel.receive(), peer="server")
            assert isinstance(answer, Failed) and said in answer.message
        channel.close()


def test_a_client_that_goes_away_while_refused_weights_are_drained_harms_nobody(
    chat: ChatFormat,
) -> None:
    refused = threading.Event()

    class Refusing(WeighedEngine):
        def load_weights(
            self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int
        ) -> None:
            next(iter(weights))
            refused.set()
            raise EngineError("unknown name")

    with serving(Refusing(chat, answers), chat) as server:
        channel = knock(server)
        introduce(channel)
        channel.send(header(BeginWeights(policy=PolicyId(run="r", version=1))))
        tensor = Tensor(name="w", dtype="float32", shape=(1,), offset=0)
        channel.send(header(tensor), bytes(4))
        assert refused.wait(WAIT_S)
        channel.close()
        again = knock(server)
        assert isinstance(first_word(again), Loaded)


def first_word(channel: Channel) -> object:
    """What the engine's thread says to a new client, whatever weights it holds."""
    challenge = read_server(channel.receive(), peer="server")
    assert isinstance(challenge, Challenge)
    nonce = "0" * 64
    mac = proof(SECRET, "client", challenge.nonce, nonce)
    channel.send(header(Hello(nonce=nonce, mac=mac)))
    channel.receive()
    channel.trust()
    return read_server(channel.receive(), peer="server")


def test_a_server_stops_although_a_client_stalls_in_the_middle_of_weights(
    chat: ChatFormat,
) -> None:
    engine = WeighedEngine(chat, answers)
    with serving(engine, chat) as server:
        channel = knock(server)
        introduce(channel)
        channel.send(header(BeginWeights(policy=PolicyId(run="r", version=1))))
        time.sleep(0.3)
        server.stop()
        with pytest.raises(EngineLostError, match="the connection ended"):
            for _ in range(20):  # the beat of a server that goes on
                channel.receive()
        waited = time.monotonic()
    assert time.monotonic() - waited < WAIT_S / 2


def test_a_stranger_who_sends_drop_by_drop_is_sent_away_in_time(
    chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tapo_train.rollout.remote.listener.GREETING_S", 0.5)
    with serving(ScriptedEngine(chat, answers), chat) as server:
        dripping = knock(server)
        dripping.receive()
        dripping._socket.sendall(struct.pack(">IQ", 1000, 0))
        began = time.monotonic()
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            while time.monotonic() - began < 4.0:
                dripping._socket.sendall(b"\0")
                time.sleep(0.1)


def test_a_connection_that_cannot_be_accepted_does_not_end_the_listener(
    chat: ChatFormat,
) -> None:
    with serving(ScriptedEngine(chat, answers), chat) as server:
        listener = server._listener
        listening = listener._socket

        class Full:
            """A listening socket at a moment when too many files are open."""

            def accept(self) -> object:
                listener._socket = listening
                raise OSError(24, "Too many open files")

        listener._socket = Full()  # type: ignore[assignment]
        knock(server).receive()  # accepted by the call that was waiting
        channel = knock(server)
        introduce(channel)


def test_the_secret_is_in_no_representation() -> None:
    assert SECRET.decode() not in repr(
        ServerLink(url="tcp://h:1", secret=SECRET, timeout_s=1.0, events=SimpleQueue())
    )
