"""Engine servers when something breaks midway: nobody waits for ever, and nobody dies of it."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
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
from tapo_train.rollout.engine import GenerationRequest, Sampling
from tapo_train.rollout.remote.engine import RemoteEngine
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
    Submit,
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


def request(chat: ChatFormat, id: str) -> GenerationRequest:
    """A request for at most 50 tokens."""
    return GenerationRequest(
        id=id, tokens=chat.plain("hello"), images=(), max_tokens=50, sampling=Sampling()
    )


def completed(chat: ChatFormat, asked: Submit) -> tuple[Completed, list[int], list[float]]:
    """A completion as it should be: header, tokens, log-probabilities."""
    tokens = chat.assistant("<answer>x</answer>").tolist()
    message = Completed(id=asked.id, finished="stop", cached_tokens=0)
    return message, tokens, [-0.5] * len(tokens)


def frame_of(message: Completed, tokens: list[int], logprobs: list[float]) -> tuple[bytes, bytes]:
    numbers = np.array(tokens, "<i4").tobytes() + np.array(logprobs, "<f4").tobytes()
    return header(message), numbers


def malformed(chat: ChatFormat, kind: str, asked: Submit) -> tuple[bytes, bytes]:
    """Header and body of a completion with one fault."""
    message, tokens, logprobs = completed(chat, asked)
    match kind:
        case "odd":
            written, body = frame_of(message, tokens, logprobs)
            return written, body[:-3]
        case "empty":
            return frame_of(message, [], [])
        case "long":
            return frame_of(message, tokens[:1] * 99 + tokens, [-0.5] * (99 + len(tokens)))
        case "unfinished":
            return frame_of(message, tokens[:-1], logprobs[:-1])
        case "placeholder":
            return frame_of(message, [chat.image_token_id, *tokens[1:]], logprobs)
        case "unknown":
            return frame_of(message, [2**31 - 1, *tokens[1:]], logprobs)
        case "negative":
            return frame_of(message, [-1, *tokens[1:]], logprobs)
        case "nan":
            return frame_of(message, tokens, [float("nan"), *logprobs[1:]])
        case "sure":
            return frame_of(message, tokens, [0.5, *logprobs[1:]])
        case "cached":
            return frame_of(replace(message, cached_tokens=10**6), tokens, logprobs)
    written, body = frame_of(message, tokens, logprobs)
    return written.replace(b'"cached_tokens":0', b'"cached_tokens":-1'), body


FAULTS = {
    "odd": "wanted pairs of 4",
    "empty": "0 tokens with 0 log-probabilities",
    "long": "wanted equal numbers between 1 and 50",
    "unfinished": "finished by 'stop' with last token",
    "placeholder": "cannot be sampled",
    "unknown": "token 2147483647 cannot be sampled",
    "negative": "token -1 cannot be sampled",
    "nan": "not finite",
    "sure": "a log-probability of 0.5",
    "cached": "1000000 of",
    "frame": "sent a frame nobody knows",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_server_that_answers_nonsense_is_dropped_and_others_are_asked(
    chat: ChatFormat, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    connections: list[Channel] = []

    def nonsense(channel: Channel) -> None:
        connections.append(channel)
        say(channel, base_policy())
        while True:
            message = read_client(channel.receive(), peer="trainer")
            if isinstance(message, Submit):
                channel.send(*malformed(chat, kind, message))

    with ExitStack() as stack:
        bad = stack.enter_context(impostor(chat, nonsense))
        good = stack.enter_context(serving(ScriptedEngine(chat, answers), chat))
        remote = stack.enter_context(trainer_of([bad, good], chat))
        until_usable(remote, 2)  # otherwise all may go to the one that was quicker
        for name in "abcdefgh":
            remote.submit(request(chat, f"{name}:0"))
        done = until_idle(remote)
        time.sleep(0.4)  # in which one that died would be met again
        remote.submit(request(chat, "i:0"))
        done += until_idle(remote)
    assert sorted(done) == [f"{name}:0" for name in "abcdefghi"]
    assert len(connections) == 1
    said = capfd.readouterr().err.splitlines()
    (warning,) = [line for line in said if "engine server dropped: tcp://127.0" in line]
    assert FAULTS[kind] in warning


def until_usable(remote: RemoteEngine, number: int) -> None:
    """So many servers have said that they hold the weights."""
    deadline = time.monotonic() + WAIT_S
    while len(remote._fleet.usable()) < number:
        assert time.monotonic() < deadline, "a server did not introduce itself"
        remote.step()


def until_idle(remote: RemoteEngine) -> list[str]:
    """The ids of what is completed until nothing is under way."""
    done: list[str] = []
    deadline = time.monotonic() + WAIT_S
    while remote.has_unfinished() and time.monotonic() < deadline:
        done += [completion.id for completion in remote.step()]
    return done


def test_when_the_last_server_answers_nonsense_the_run_ends_at_once_and_says_so(
    chat: ChatFormat,
) -> None:
    def nonsense(channel: Channel) -> None:
        say(channel, base_policy())
        while True:
            message = read_client(channel.receive(), peer="trainer")
            if isinstance(message, Submit):
                channel.send(*malformed(chat, "odd", message))

    with impostor(chat, nonsense) as server, trainer_of([server], chat) as remote:
        remote.submit(request(chat, "a:0"))
        began = time.monotonic()
        with pytest.raises(
            EngineError, match=r"no engine server is left .*\n.*completion of \d+ bytes"
        ):
            until_idle(remote)
        assert time.monotonic() - began < WAIT_S / 2


def test_a_server_that_scores_nonsense_is_dropped(chat: ChatFormat) -> None:
    def nonsense(channel: Channel) -> None:
        say(channel, base_policy())
        channel.receive()
        say(channel, Scored(id="score"), bytes(6))
        channel.receive()

    class Scoring(ScriptedEngine):
        def score(
            self, tokens: npt.NDArray[np.int32], images: Sequence[Image]
        ) -> npt.NDArray[np.float32]:
            return np.full(len(tokens) - 1, -2.0, dtype=np.float32)

    with ExitStack() as stack:
        bad = stack.enter_context(impostor(chat, nonsense))
        good = stack.enter_context(serving(Scoring(chat, answers), chat))
        remote = stack.enter_context(trainer_of([bad, good], chat))
        assert remote.score(chat.plain("hello")[:3], []).tolist() == [-2.0, -2.0]


@pytest.mark.parametrize("breaks", ["before", "meanwhile"])
def test_a_rank_that_sends_no_weights_connects_again_while_they_are_synced(
    chat: ChatFormat, breaks: str
) -> None:
    engine = WeighedEngine(chat, answers)
    weights = {"w": torch.ones(2)}
    with (
        serving(engine, chat) as server,
        trainer_of([server], chat, run="r") as sender,
        trainer_of([server], chat, run="r", sends_weights=False) as waiter,
    ):

        def gathered() -> Iterable[tuple[str, torch.Tensor]]:
            sender.load_weights(weights.items(), version=1)
            if breaks == "meanwhile":
                broken(waiter)
            yield from weights.items()

        if breaks == "before":
            broken(waiter)
            waiter._fleet.hear(wait_s=WAIT_S)
        waiter.load_weights(gathered(), version=1)
        waiter.submit(request(chat, "a:0"))
        assert until_idle(waiter) == ["a:0"]


def broken(remote: RemoteEngine) -> None:
    """Break the only connection, as a network does."""
    channel = remote._fleet.links[0].channel
    assert channel is not None
    channel._socket.shutdown(socket.SHUT_RDWR)


def test_a_rank_whose_server_does_not_come_back_with_the_weights_ends_after_its_patience(
    chat: ChatFormat,
) -> None:
    with (
        serving(WeighedEngine(chat, answers), chat) as server,
        trainer_of([server], chat, run="r", sends_weights=False, patience_s=0.6) as waiter,
    ):

        def gathered() -> Iterable[tuple[str, torch.Tensor]]:
            broken(waiter)
            yield "w", torch.ones(2)

        began = time.monotonic()
        with pytest.raises(EngineError, match="no engine server is left to take the weights"):
            waiter.load_weights(gathered(), version=1)
        assert 0.6 < time.monotonic() - began < WAIT_S
