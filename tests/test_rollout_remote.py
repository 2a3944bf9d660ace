"""Engine servers: same groups as one engine, whoever dies; strangers and nonsense refused."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from engine_servers import (
    SECRET,
    WAIT_S,
    base_policy,
    folder_of_weights,
    impostor,
    introduce,
    knock,
    say,
    serving,
    trainer_of,
)
from rollout_world import SYSTEM_PROMPT, draw_image, draw_toolbox, picture_task
from scripted_engine import ScriptedEngine, turn_of

from tapo_train.errors import AlignmentError, ConfigError, EngineError, EngineLostError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import Completion, Engine, GenerationRequest, Sampling
from tapo_train.rollout.limits import Limits
from tapo_train.rollout.remote import server as server_module
from tapo_train.rollout.remote import weight_stream
from tapo_train.rollout.remote.carriers import FolderWeights
from tapo_train.rollout.remote.engine import RemoteEngine
from tapo_train.rollout.remote.link import ServerLink, address_of, servers_of_rank
from tapo_train.rollout.remote.listener import Listener, Served
from tapo_train.rollout.remote.messages import (
    Alive,
    BeginWeights,
    Completed,
    Failed,
    PolicyId,
    PutImage,
    Reload,
    Submit,
    Tensor,
    header,
    read_client,
    read_server,
)
from tapo_train.rollout.remote.placement import Placement
from tapo_train.rollout.remote.wire import Channel, shared_secret
from tapo_train.types import Group, Image

CALL = '<tool_call>{"name": "draw", "arguments": {"note": "x"}}</tool_call>'
NEVER = 10**9
"""[steps] after which a turn is written that is never written."""
HOT = Sampling(temperature=0.8, seed=3)


@pytest.fixture(scope="module")
def chat(tiny_qwen3_vl: Path) -> ChatFormat:
    return ChatFormat(tiny_qwen3_vl)


def draws_twice(request: GenerationRequest) -> str:
    """Two pictures, then an answer that depends on the trajectory."""
    return CALL if turn_of(request) < 2 else f"<answer>{request.id}</answer>"


class WeighedEngine(ScriptedEngine):
    """A scripted engine with weights, whose scores are their sum."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        if self.has_unfinished():
            raise EngineError("not idle")
        self.weights = {name: tensor.clone() for name, tensor in weights}

    def score(
        self, tokens: npt.NDArray[np.int32], images: Sequence[Image]
    ) -> npt.NDArray[np.float32]:
        total = sum(float(tensor.float().sum()) for tensor in self.weights.values())
        return np.full(len(tokens) - 1, total + len(images), dtype=np.float32)


def play(engine: Engine, chat: ChatFormat, *, rollouts: int = 6) -> list[Group]:
    return collect(
        [picture_task("a"), picture_task("b")],
        engine=engine,
        chat=chat,
        toolbox=draw_toolbox(),
        system_prompt=SYSTEM_PROMPT,
        rollouts_per_task=rollouts,
        limits=Limits(max_turns=4, max_turn_tokens=200, max_tokens=4000),
        sampling=HOT,
    )


def contents(groups: Sequence[Group]) -> list[tuple[object, ...]]:
    return [
        (t.id, t.answer, t.tokens.tolist(), t.logprobs.tolist(), [i.sha256 for i in t.images])
        for group in groups
        for t in group.trajectories
    ]


def request_of(chat: ChatFormat, id: str = "t:0", *, images: int = 0) -> GenerationRequest:
    pictures = tuple(draw_image(64, 64, seed=k) for k in range(images))
    return GenerationRequest(
        id=id, tokens=chat.plain("hello"), images=pictures, max_tokens=50, sampling=HOT
    )


def step_until(engine: RemoteEngine, count: int) -> list[Completion]:
    """Completions, until there are `count`; then a moment for more that must not come."""
    done: list[Completion] = []
    deadline = time.monotonic() + WAIT_S
    while len(done) < count and time.monotonic() < deadline:
        done += engine.step()
    for _ in range(20):
        done += engine.step()
    return done


def test_two_servers_play_what_one_engine_plays(chat: ChatFormat) -> None:
    alone = contents(play(ScriptedEngine(chat, draws_twice, steps=2), chat))
    engines = [ScriptedEngine(chat, draws_twice, steps=2) for _ in range(2)]
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(engine, chat)) for engine in engines]
        remote = stack.enter_context(trainer_of(servers, chat))
        assert contents(play(remote, chat)) == alone
    asked = [request.id for engine in engines for request in engine.requests]
    assert len(asked) == len(set(asked)) == 2 * 6 * 3
    assert min(len(engine.requests) for engine in engines) >= 3, "the load was not shared"
    assert all(request.sampling == HOT for request in engines[0].requests)


def test_the_groups_are_the_same_when_a_server_goes_away_in_the_middle(chat: ChatFormat) -> None:
    alone = contents(play(ScriptedEngine(chat, draws_twice), chat))
    stuck, sound = ScriptedEngine(chat, draws_twice, steps=NEVER), ScriptedEngine(chat, draws_twice)
    with ExitStack() as stack:
        first = stack.enter_context(serving(stuck, chat))
        second = stack.enter_context(serving(sound, chat))
        remote = stack.enter_context(trainer_of([first, second], chat))
        threading.Timer(0.5, first.stop).start()
        assert contents(play(remote, chat)) == alone
    assert len(stuck.requests) > 3, "the stuck server was not asked"


def test_an_answer_counts_once_and_only_from_the_server_that_was_asked(chat: ChatFormat) -> None:
    written = chat.assistant("hi")
    body = written.astype("<i4").tobytes() + np.zeros(len(written), "<f4").tobytes()

    def repeats_itself(channel: Channel) -> None:
        say(channel, base_policy())
        submit = read_client(channel.receive(), peer="trainer")
        assert isinstance(submit, Submit)
        answer = Completed(id=submit.id, finished="stop", cached_tokens=3)
        for id in ("never asked", submit.id, submit.id):
            say(channel, Completed(id=id, finished="stop", cached_tokens=0), body)
        say(channel, answer, body)
        channel.receive()

    with impostor(chat, repeats_itself) as server, trainer_of([server], chat) as remote:
        remote.submit(request_of(chat))
        (completion,) = step_until(remote, 1)
        assert not remote.has_unfinished()
    assert completion.id == "t:0"
    np.testing.assert_array_equal(completion.tokens, written)


def test_a_server_that_gave_a_request_back_is_not_believed_any_more(chat: ChatFormat) -> None:
    def answers(text: str, *before: Failed) -> Callable[[Channel], None]:
        def talk(channel: Channel) -> None:
            say(channel, base_policy())
            channel.receive()
            for message in before:
                say(channel, message)
            written = chat.assistant(text)
            body = written.astype("<i4").tobytes() + np.zeros(len(written), "<f4").tobytes()
            time.sleep(0.1 if before else 0.5)
            say(channel, Completed(id="t:0", finished="stop", cached_tokens=0), body)
            channel.receive()

        return talk

    given_back = Failed(id="t:0", reason="policy", message="others sent me weights")
    with (
        impostor(chat, answers("first", given_back)) as first,
        impostor(chat, answers("second")) as second,
        trainer_of([first, second], chat) as remote,
    ):
        remote.submit(request_of(chat))
        (completion,) = step_until(remote, 1)
    np.testing.assert_array_equal(completion.tokens, chat.assistant("second"))


def test_a_server_whose_engine_hangs_is_given_up(chat: ChatFormat) -> None:
    def hangs(channel: Channel) -> None:
        say(channel, base_policy())
        channel.receive()
        say(channel, Alive(idle_s=61.0))
        channel.receive()

    sound = ScriptedEngine(chat, draws_twice)
    with (
        impostor(chat, hangs) as server,
        serving(sound, chat) as other,
        trainer_of([server, other], chat, timeout_s=60.0) as remote,
    ):
        remote.submit(request_of(chat, "t:0"))
        remote.submit(request_of(chat, "t:1"))
        assert sorted(c.id for c in step_until(remote, 2)) == ["t:0", "t:1"]


def test_a_request_that_kills_every_server_ends_the_run(chat: ChatFormat) -> None:
    def dies(channel: Channel) -> None:
        say(channel, base_policy())
        channel.receive()

    with impostor(chat, dies) as server, trainer_of([server], chat) as remote:
        remote.submit(request_of(chat))
        with pytest.raises(EngineError, match="request t:0 was lost 4 times"):
            step_until(remote, 1)


def test_without_any_server_the_run_ends_and_says_why(chat: ChatFormat) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(serving(ScriptedEngine(chat, draws_twice, NEVER), chat))
        remote = stack.enter_context(trainer_of([server], chat, patience_s=0.5))
        remote.submit(request_of(chat))
        server.stop()
        with pytest.raises(
            EngineError, match=r"no engine server is left to serve 1 requests\n  tcp"
        ):
            step_until(remote, 1)


def test_a_server_that_comes_back_waits_for_the_next_weights(chat: ChatFormat) -> None:
    weights = {"w": torch.ones(3)}
    with ExitStack() as stack:
        first_life = ExitStack()
        stays = stack.enter_context(serving(WeighedEngine(chat, draws_twice), chat))
        dies = first_life.enter_context(serving(WeighedEngine(chat, draws_twice), chat))
        remote = stack.enter_context(trainer_of([stays, dies], chat, run="r"))
        remote.load_weights(weights.items(), version=1)
        first_life.close()
        again = WeighedEngine(chat, draws_twice)
        stack.enter_context(serving(again, chat, port=dies.address[1]))
        time.sleep(1.0)
        for index in range(8):
            remote.submit(request_of(chat, f"t{index}:0"))
        assert len(step_until(remote, 8)) == 8
        assert not again.requests, "a server with its folder's weights was asked"
        remote.load_weights(weights.items(), version=2)
        for index in range(8):
            remote.submit(request_of(chat, f"t{index}:0"))
        assert len(step_until(remote, 8)) == 8
        assert again.requests and torch.equal(again.weights["w"], weights["w"])


def test_requests_for_other_weights_are_refused(chat: ChatFormat) -> None:
    engine = WeighedEngine(chat, draws_twice)
    with serving(engine, chat) as server:
        channel = knock(server)
        introduce(channel)
        policies = (PolicyId(run="r", version=0), PolicyId(run="", version=1))
        for policy in policies:
            submit = Submit(
                id="x", policy=policy, images=(), max_tokens=5, temperature=1, top_p=1, top_k=0,
                seed=None,
            )  # fmt: skip
            channel.send(header(submit), chat.plain("hello").tobytes())
            answer = read_server(channel.receive(), peer="server")
            assert isinstance(answer, Failed) and answer.reason == "policy"
            assert f"the server's weights are the model folder's; wanted {policy}" in answer.message
        channel.close()
    assert not engine.requests


def test_weights_arrive_whole_in_slices_on_every_server(
    chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_stream, "BODY_BYTES", 64)
    generator = torch.Generator().manual_seed(0)
    weights = {
        "a": torch.randn(7, 5, generator=generator),
        "half": torch.randn(3, 11, generator=generator).to(torch.bfloat16),
        "exact": torch.randn(16, generator=generator),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "turned": torch.randn(4, 9, generator=generator).T,
    }
    engines = [WeighedEngine(chat, draws_twice) for _ in range(2)]
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(engine, chat)) for engine in engines]
        remote = stack.enter_context(trainer_of(servers, chat, run="r"))
        remote.load_weights(weights.items(), version=4)
        assert remote.version == 4
        scores = remote.score(chat.plain("hello"), [draw_image(64, 64)])
        expected = sum(float(tensor.float().sum()) for tensor in weights.values()) + 1
        np.testing.assert_allclose(scores, expected, rtol=1e-6)
    for engine in engines:
        assert list(engine.weights) == list(weights)
        for name, tensor in weights.items():
            assert engine.weights[name].dtype == tensor.dtype
            assert engine.weights[name].shape == tensor.shape
            assert torch.equal(engine.weights[name], tensor)


def test_servers_that_score_differently_are_refused(chat: ChatFormat) -> None:
    class Deaf(WeighedEngine):
        def load_weights(
            self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int
        ) -> None:
            super().load_weights([(name, tensor + 0.01) for name, tensor in weights], version=1)

    with ExitStack() as stack:
        engines = [WeighedEngine(chat, draws_twice), Deaf(chat, draws_twice)]
        servers = [stack.enter_context(serving(engine, chat)) for engine in engines]
        remote = stack.enter_context(trainer_of(servers, chat, run="r", agreement=0.02))
        remote.load_weights({"w": torch.ones(3)}.items(), version=1)
        with pytest.raises(EngineError, match=r"score the same tokens 0\.03 nat apart"):
            remote.score(chat.plain("hello"), [])


def test_weights_through_a_folder_reach_servers_also_when_they_come_back(
    chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_stream, "FILE_BYTES", 20)
    weights = {"a": torch.ones(7), "b": torch.arange(3.0), "c": torch.ones(1)}
    with ExitStack() as stack:
        first_life = ExitStack()
        server = first_life.enter_context(
            serving(WeighedEngine(chat, draws_twice), chat, weights_root=tmp_path)
        )
        carrier = FolderWeights(tmp_path)
        remote = stack.enter_context(trainer_of([server], chat, run="r", carrier=carrier))
        for version in (1, 2):
            remote.load_weights(weights.items(), version=version)
        assert folder_of_weights(tmp_path) == ["00000.safetensors", "00001.safetensors"]
        first_life.close()
        again = WeighedEngine(chat, draws_twice)
        stack.enter_context(serving(again, chat, port=server.address[1], weights_root=tmp_path))
        remote.submit(request_of(chat))
        assert len(step_until(remote, 1)) == 1
        assert {name: t.tolist() for name, t in again.weights.items()} == {
            name: t.tolist() for name, t in weights.items()
        }
    assert list(tmp_path.iterdir()) == [], "the newest weights are left behind"


def test_a_carrier_takes_its_own_folder_away_and_no_other_ranks(tmp_path: Path) -> None:
    mine, theirs = FolderWeights(tmp_path), FolderWeights(tmp_path)
    for version in (1, 2):
        for carrier, value in ((mine, 1.0), (theirs, 2.0)):
            tensor = torch.full((2,), value)
            carrier.send([], [("w", tensor)], PolicyId(run="r", version=version), print)
    assert len(folder_of_weights(tmp_path)) == 2, "versions before are removed"
    mine.close()
    (left,) = tmp_path.rglob("*.safetensors")
    ((_, tensor),) = weight_stream.read_weights(left.parent)
    assert tensor.tolist() == [2.0, 2.0]
    del carrier, theirs  # as when the process ends without `close`
    assert list(tmp_path.iterdir()) == []


def test_a_server_reads_weights_below_its_root_alone(chat: ChatFormat, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    weight_stream.write_weights(iter([("w", torch.ones(1))]), outside)
    engine = WeighedEngine(chat, draws_twice)
    for root in (tmp_path / "root", None):
        with serving(engine, chat, weights_root=root) as server:
            channel = knock(server)
            introduce(channel)
            for folder in ("../outside", str(outside)):
                message = Reload(policy=PolicyId(run="r", version=1), folder=folder)
                channel.send(header(message))
                answer = read_server(channel.receive(), peer="server")
                assert (
                    isinstance(answer, Failed) and "wanted below --weights-root" in answer.message
                )
            channel.close()
    assert not hasattr(engine, "weights")


def test_half_replaced_weights_serve_nobody_until_whole_ones_come(chat: ChatFormat) -> None:
    engine = WeighedEngine(chat, draws_twice)
    with serving(engine, chat) as server:
        policy = PolicyId(run="r", version=1)
        sender = knock(server)
        introduce(sender)
        sender.send(header(BeginWeights(policy=policy)))
        sender.send(header(Tensor(name="w", dtype="float32", shape=(3,), offset=0)), b"1234")
        sender.close()
        other = knock(server)
        introduce(other)
        for asked in (policy, PolicyId()):
            submit = Submit(
                id="x", policy=asked, images=(), max_tokens=5, temperature=1, top_p=1, top_k=0,
                seed=None,
            )  # fmt: skip
            other.send(header(submit), chat.plain("hello").tobytes())
            answer = read_server(other.receive(), peer="server")
            assert isinstance(answer, Failed) and answer.reason == "policy"
        other.close()
        with trainer_of([server], chat, run="r") as remote:
            remote.load_weights({"w": torch.ones(3)}.items(), version=1)
            remote.submit(request_of(chat))
            assert len(step_until(remote, 1)) == 1


def test_a_rank_that_does_not_send_waits_for_the_one_that_does(chat: ChatFormat) -> None:
    engine = WeighedEngine(chat, draws_twice)
    read: list[str] = []

    def gathered() -> Iterable[tuple[str, torch.Tensor]]:
        for name in ("v", "w"):
            read.append(name)
            yield name, torch.ones(2)

    with (
        serving(engine, chat) as server,
        trainer_of([server], chat, run="r") as sender,
        trainer_of([server], chat, run="r", sends_weights=False) as waiter,
    ):
        waiting = threading.Thread(target=lambda: waiter.load_weights(gathered(), version=7))
        waiting.start()
        time.sleep(0.2)
        assert waiting.is_alive() and read == ["v", "w"]
        sender.load_weights({"w": torch.ones(2)}.items(), version=7)
        waiting.join(WAIT_S)
        assert not waiting.is_alive()
        waiter.submit(request_of(chat))
        assert len(step_until(waiter, 1)) == 1


def test_pictures_are_sent_once_and_again_when_the_server_forgot_them(
    chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [len(draw_image(64, 64, seed=k).data) for k in range(3)]
    monkeypatch.setattr(server_module, "PICTURE_BYTES", sum(sizes) - 1)
    engine = ScriptedEngine(chat, draws_twice)
    with serving(engine, chat) as server, trainer_of([server], chat) as remote:
        remote.submit(request_of(chat, "t:0", images=2))
        assert len(step_until(remote, 1)) == 1
        other = GenerationRequest(
            id="u:0",
            tokens=chat.plain("hello"),
            images=(draw_image(64, 64, seed=2),),
            max_tokens=50,
            sampling=HOT,
        )
        remote.submit(other)
        assert len(step_until(remote, 1)) == 1
        remote.submit(request_of(chat, "t:1", images=2))
        assert len(step_until(remote, 1)) == 1
    first, _, last = (request.images for request in engine.requests)
    assert first[1] is last[1] or first[0] is not last[0]
    assert [image.data for image in first] == [image.data for image in last]


def test_each_picture_crosses_the_wire_once(chat: ChatFormat) -> None:
    seen: list[str] = []

    def counts(channel: Channel) -> None:
        say(channel, base_policy())
        while True:
            message = read_client(channel.receive(), peer="trainer")
            seen.append(message.sha256 if isinstance(message, PutImage) else message.op)

    with impostor(chat, counts) as server, trainer_of([server], chat) as remote:
        for turn in range(3):
            remote.submit(request_of(chat, f"t:{turn}", images=2))
        remote.abort(["t:0", "t:1", "t:2"])
        assert not remote.has_unfinished()
        time.sleep(0.3)
    digests = [draw_image(64, 64, seed=k).sha256 for k in range(2)]
    assert seen == [*digests, *["submit"] * 3, *["abort"] * 3]


def test_an_aborted_request_and_those_of_a_lost_client_leave_the_engine(chat: ChatFormat) -> None:
    engine = ScriptedEngine(chat, draws_twice, steps=NEVER)
    with serving(engine, chat) as server:
        with trainer_of([server], chat) as remote:
            remote.submit(request_of(chat, "t:0"))
            remote.submit(request_of(chat, "t:1"))
            remote.step()
            remote.abort(["t:0", "unknown"])
            wait_for(lambda: list(engine._left) == ["t:1"])
        wait_for(lambda: not engine.has_unfinished())


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("kind", [AlignmentError, EngineError, ValueError])
def test_what_the_servers_engine_refuses_is_raised_here(
    chat: ChatFormat, kind: type[Exception]
) -> None:
    class Refusing(ScriptedEngine):
        def submit(self, request: GenerationRequest) -> None:
            raise kind(f"{request.id} does not fit")

    expected = AlignmentError if kind is AlignmentError else EngineError
    with (
        serving(Refusing(chat, draws_twice), chat) as server,
        trainer_of([server], chat) as remote,
    ):
        remote.submit(request_of(chat))
        with pytest.raises(expected, match=r"t:0 does not fit \(at tcp://127"):
            step_until(remote, 1)
        assert not remote.has_unfinished()


def test_a_wrong_secret_is_refused_on_both_sides(
    chat: ChatFormat, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(ScriptedEngine(chat, draws_twice), chat) as server:
        expected = pytest.raises(EngineError, match="the server refused us: wrong secret")
        with expected, trainer_of([server], chat, secret=b"another secret.."):
            pass
    assert "wrong secret" in capfd.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as thief:
        threading.Thread(target=pretend, args=(thief,), daemon=True).start()
        expected = pytest.raises(EngineError, match="does not know the secret")
        with expected, trainer_of([Listening(thief)], chat):  # type: ignore[list-item]
            pass


class Listening:
    """Something with an address."""

    def __init__(self, listener: socket.socket) -> None:
        self.address = listener.getsockname()


def pretend(listener: socket.socket) -> None:
    """A server that welcomes everybody without knowing the secret."""
    connection, _ = listener.accept()
    zeros = "0" * 64
    challenge = {"op": "challenge", "protocol": 1, "nonce": zeros}
    welcome = {"op": "welcome", "mac": zeros, "identity": zeros, "base": zeros, "max_tokens": 9}
    for message in (challenge, welcome):
        written = json.dumps(message).encode()
        connection.sendall(struct.pack(">IQ", len(written), 0) + written)
    connection.recv(1000)
    time.sleep(1)


def test_a_server_of_another_model_is_refused(chat: ChatFormat, tiny_qwen2_5_vl: Path) -> None:
    other = ChatFormat(tiny_qwen2_5_vl)
    with serving(ScriptedEngine(other, draws_twice), other) as server:
        expected = pytest.raises(EngineError, match="serves another model")
        with expected, trainer_of([server], chat):
            pass


def framed(header: bytes, body: bytes = b"", *, length: int | None = None) -> bytes:
    return struct.pack(">IQ", len(header), len(body) if length is None else length) + header + body


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    "nonsense",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        framed(b"\x80\x04N."),
        framed(b'{"op": "shell", "command": "id"}'),
        framed(b'{"op": "abort", "ids": [], "more": 1}'),
        framed(b"{}", length=2**62),
        struct.pack(">IQ", 2**31, 0),
        framed(b'{"op": "end_weights"}'),
        framed(b'{"op":"image","sha256":"' + b"0" * 64 + b'","width":4,"height":4}', b"PNG"),
    ],
)
def test_nonsense_ends_its_connection_and_nothing_else(
    chat: ChatFormat, nonsense: bytes, known: bool
) -> None:
    engine = ScriptedEngine(chat, draws_twice)
    with serving(engine, chat) as server, trainer_of([server], chat) as remote:
        bad = knock(server)
        if known:
            introduce(bad)
        else:
            bad.receive()
        bad._socket.sendall(nonsense)
        with pytest.raises(EngineLostError):
            while True:
                bad.receive()
        remote.submit(request_of(chat))
        assert len(step_until(remote, 1)) == 1


def test_a_stranger_may_not_send_a_body_nor_take_its_time(
    chat: ChatFormat, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tapo_train.rollout.remote import listener

    monkeypatch.setattr(listener, "GREETING_S", 0.2)
    with serving(ScriptedEngine(chat, draws_twice), chat) as server:
        eager, slow = knock(server), knock(server)
        eager.receive()
        slow.receive()
        eager._socket.sendall(framed(b"{}", b"x"))
        for channel in (eager, slow):
            with pytest.raises(EngineLostError):
                channel.receive()
    said = capfd.readouterr().err
    assert "announced a frame of 2 + 1 bytes; wanted at most 1024 + 0" in said
    assert "silent for too long" in said


def test_a_trajectory_stays_where_its_prefix_is_unless_that_server_is_overloaded(
    chat: ChatFormat,
) -> None:
    links = [link_with(load) for load in (0, 0)]
    placement = Placement()
    first = placement.choose(links, request_of(chat, "a:0"))
    first.load = 4
    assert placement.choose(links, request_of(chat, "a:1")) is first
    first.load = 5
    other = placement.choose(links, request_of(chat, "a:2"))
    assert other is not first
    first.load = other.load = 40
    first.load = 54
    assert placement.choose(links, request_of(chat, "a:3")) is other
    placement.forget()
    other.load, first.load = 3, 2
    assert placement.choose(links, request_of(chat, "a:4")) is first


def link_with(load: int) -> ServerLink:
    from queue import SimpleQueue

    return ServerLink(
        url="tcp://localhost:1", secret=SECRET, timeout_s=1, events=SimpleQueue(), load=load
    )


def test_ranks_share_servers_or_have_their_own() -> None:
    urls = ["a", "b", "c"]
    assert [servers_of_rank(urls, rank, 2) for rank in range(2)] == [
        (["a", "c"], True),
        (["b"], True),
    ]
    assert [servers_of_rank(urls[:2], rank, 4) for rank in range(4)] == [
        (["a"], True),
        (["b"], True),
        (["a"], False),
        (["b"], False),
    ]


def test_a_secret_is_needed_and_an_address_is_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPO_ENGINE_SECRET", "x" * 15)
    with pytest.raises(ConfigError, match="found 15 characters"):
        shared_secret()
    monkeypatch.setenv("TAPO_ENGINE_SECRET", "x" * 16)
    assert shared_secret() == b"x" * 16
    assert address_of("tcp://[::1]:80") == ("::1", 80)
    for url in ("http://a:1", "tcp://a", "a:1", "tcp://:1"):
        with pytest.raises(ConfigError, match=r"wanted tcp://host:port"):
            address_of(url)


@pytest.mark.parametrize("port", ["taken", 99999])
def test_a_port_that_cannot_be_listened_on_is_refused(port: str | int) -> None:
    served = Served(identity="", base="", max_tokens=1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1] if port == "taken" else int(port)
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{number}: "):
            Listener(served, secret=SECRET, host="127.0.0.1", port=number, welcome=Channel.close)
