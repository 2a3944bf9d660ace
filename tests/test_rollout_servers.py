"""Engine servers: same groups as one engine, whoever dies; nonsense is dropped."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_vllm import SECRET, WAIT_S, FakeServer, serving, trainer_of, wait_until
from rollout_world import SYSTEM_PROMPT, draw_image, draw_toolbox, picture_task
from scripted_engine import ScriptedEngine

from tapo_train.errors import AlignmentError, EngineError, EngineLostError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import Completion, Engine, GenerationRequest, Sampling
from tapo_train.rollout.limits import Limits
from tapo_train.rollout.servers import fleet, weights
from tapo_train.rollout.servers.engine import ServerEngine
from tapo_train.rollout.servers.fleet import ServerOptions
from tapo_train.rollout.servers.identity import BASE, TORN, WeightNames
from tapo_train.rollout.servers.placement import Placement, servers_of_rank
from tapo_train.rollout.servers.server import Seat
from tapo_train.rollout.servers.weights import FolderWeights
from tapo_train.types import Group, VersionSpan

CALL = '<tool_call>{"name": "draw", "arguments": {"note": "x"}}</tool_call>'
GENERATE = "/inference/v1/generate"
HOT = Sampling(temperature=0.8, seed=3)
ONES = {"w": torch.ones(3)}


@pytest.fixture(scope="module")
def chat(tiny_qwen3_vl: Path) -> ChatFormat:
    return ChatFormat(tiny_qwen3_vl)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers are looked at more often than on a network."""
    monkeypatch.setattr(fleet, "BEAT_S", 0.05)


def draws_twice(id: str) -> str:
    """Two pictures, then an answer that depends on the trajectory."""
    return CALL if int(id.rpartition(":")[2]) < 2 else f"<answer>{id}</answer>"


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


def played_alone(chat: ChatFormat) -> list[tuple[object, ...]]:
    return contents(play(ScriptedEngine(chat, lambda request: draws_twice(request.id)), chat))


def request_of(chat: ChatFormat, id: str = "t:0") -> GenerationRequest:
    return GenerationRequest(
        id=id, tokens=chat.plain("hello"), images=(), max_tokens=50, sampling=HOT
    )


def pictured(chat: ChatFormat, id: str, *images: int) -> GenerationRequest:
    pictures = tuple(draw_image(64, 64, seed=k) for k in images)
    tokens = np.concatenate([chat.picture_tokens] * len(images)).astype(np.int32)
    return replace(request_of(chat, id), images=pictures, tokens=chat.expand(tokens, pictures))


def finish(engine: ServerEngine) -> list[Completion]:
    """Everything that is under way, and a moment for more that must not come."""
    done: list[Completion] = []
    deadline = time.monotonic() + WAIT_S
    while engine.has_unfinished():
        assert time.monotonic() < deadline, "nothing comes"
        done += engine.step()
    for _ in range(20):
        done += engine.step()
    return done


def test_two_servers_play_what_one_engine_plays_and_are_not_sent_a_picture_with_each_request(
    chat: ChatFormat,
) -> None:
    with serving(chat, draws_twice) as one, serving(chat, draws_twice) as two:
        with trainer_of([one.url, two.url], chat) as engine:
            assert contents(play(engine, chat)) == played_alone(chat)
        asked = one.asked + two.asked
        assert len(asked) == len(set(asked)) == 2 * 6 * 3
        assert min(len(one.asked), len(two.asked)) >= 3, "the load was not shared"
        for server in (one, two):
            # Once with the request that came first, once for those that came meanwhile.
            assert len(set(server.sent)) == 3 and max(Counter(server.sent).values()) <= 2


def test_the_groups_are_the_same_when_a_server_dies_in_mid_answer(chat: ChatFormat) -> None:
    with serving(chat, draws_twice) as stuck, serving(chat, draws_twice) as sound:
        stuck.answers.clear()
        with trainer_of([stuck.url, sound.url], chat) as engine:
            killer = threading.Thread(target=lambda: (wait_until(lambda: stuck.asked), stuck.die()))
            killer.start()
            assert contents(play(engine, chat)) == played_alone(chat)
            killer.join()
        assert stuck.asked and set(stuck.asked) <= set(sound.asked)


def test_a_late_answer_of_a_server_that_was_given_up_is_not_heard(chat: ChatFormat) -> None:
    with serving(chat, lambda _: "first") as slow, serving(chat, lambda _: "second") as other:
        slow.answers.clear()
        with trainer_of([slow.url, other.url], chat, timeout_s=0.3) as engine:
            for index in range(4):
                engine.submit(request_of(chat, f"{index}:0"))
            wait_until(lambda: slow.asked)
            slow.lives.clear()  # It hangs, until the others are served.
            done = finish(engine)
            slow.lives.set()
            slow.answers.set()
            time.sleep(0.2)
            done += finish(engine)
    assert sorted(completion.id for completion in done) == ["0:0", "1:0", "2:0", "3:0"]
    for completion in done:
        np.testing.assert_array_equal(completion.tokens, chat.assistant("second"))


def test_a_request_that_kills_every_server_ends_the_run(chat: ChatFormat) -> None:
    with serving(chat, draws_twice) as server, trainer_of([server.url], chat) as engine:
        server.fault = lambda answer: None
        engine.submit(request_of(chat))
        with pytest.raises(EngineError, match="request t:0 was lost 4 times, at last: http"):
            finish(engine)
        assert len(server.asked) == 4


def test_without_any_server_the_run_ends_and_says_why(chat: ChatFormat) -> None:
    with serving(chat, draws_twice) as server:
        server.answers.clear()
        with trainer_of([server.url], chat, patience_s=0.3) as engine:
            engine.submit(request_of(chat))
            wait_until(lambda: server.asked)
            server.die()
            with pytest.raises(
                EngineError,
                match=r"no engine server is left to serve request t:0\n  http://127.*Error",
            ):
                finish(engine)


def changed(answer: dict[str, Any], **values: Any) -> dict[str, Any]:
    return answer | {"choices": [answer["choices"][0] | values]}


def with_logprob(answer: dict[str, Any], value: Any) -> dict[str, Any]:
    first, *others = answer["choices"][0]["logprobs"]["content"]
    return changed(answer, logprobs={"content": [first | {"logprob": value}, *others]})


def with_first(answer: dict[str, Any], token: int) -> dict[str, Any]:
    (choice,) = answer["choices"]
    first, *others = choice["logprobs"]["content"]
    return changed(
        answer,
        token_ids=[token, *choice["token_ids"][1:]],
        logprobs={"content": [first | {"token_id": token}, *others]},
    )


def shortened(answer: dict[str, Any], count: int) -> dict[str, Any]:
    (choice,) = answer["choices"]
    logprobs = {"content": choice["logprobs"]["content"][:count]}
    return changed(answer, token_ids=choice["token_ids"][:count], logprobs=logprobs)


def spans(*borders: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"version": BASE, "start": start, "end": end} for start, end in borders]


FAULTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an answer nobody knows: KeyError": lambda a: {"choices": a["choices"]},
    "an answer nobody knows: ValueError": lambda a: a | {"choices": a["choices"] * 2},
    "an answer nobody knows: TypeError": lambda a: changed(a, logprobs=None),
    "another prompt than ours: 2 tokens": lambda a: a | {"prompt_token_ids": [1, 2]},
    "log-probabilities of other tokens": lambda a: changed(a, token_ids=[1, 2, 3]),
    "0 tokens with 0 log-probabilities": lambda a: shortened(a, 0),
    "weights are not named for each": lambda a: changed(a, weight_versions=spans((0, 1))),
    "weights are not named for": lambda a: changed(a, weight_versions=spans((0, 5), (4, 14))),
    "weights are not named": lambda a: changed(a, weight_versions=spans((1, 14))),
    "nobody knows: TypeError: '<'": lambda a: changed(
        a, weight_versions=spans((0, "a"), ("a", len(a["choices"][0]["token_ids"])))
    ),
    "finished by 'length' with last token": lambda a: changed(a, finish_reason="length"),
    "token 2147483647 cannot be sampled": lambda a: with_first(a, 2**31 - 1),
    "token -1 cannot be sampled": lambda a: with_first(a, -1),
    "a log-probability of 0.5": lambda a: with_logprob(a, 0.5),
    "a log-probability is not finite": lambda a: with_logprob(a, -9999.0),
    "log-probability is not finite": lambda a: with_logprob(a, None),
    "1000000 of": lambda a: a | {"usage": {"prompt_tokens_details": {"cached_tokens": 10**6}}},
    "HTTP 400: ": lambda a: 400,
}


@pytest.mark.parametrize("problem", FAULTS)
def test_a_server_that_answers_nonsense_is_dropped_and_others_are_asked(
    chat: ChatFormat, problem: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(chat, lambda _: "<answer>x</answer>") as bad, serving(chat, draws_twice) as good:
        good.script = bad.script
        bad.fault = FAULTS[problem]
        with trainer_of([bad.url, good.url], chat) as engine:
            for name in "abcdefgh":
                engine.submit(request_of(chat, f"{name}:0"))
            done = [completion.id for completion in finish(engine)]
            asked = len(bad.asked)
            time.sleep(0.2)  # in which one that died would be met again
            engine.submit(request_of(chat, "i:0"))
            done += [completion.id for completion in finish(engine)]
    assert sorted(done) == [f"{name}:0" for name in "abcdefghi"]
    assert 0 < asked == len(bad.asked)
    said = capfd.readouterr().err.splitlines()
    (warning,) = [line for line in said if f"engine server dropped: {bad.url}" in line]
    assert problem in warning


@pytest.mark.parametrize(
    "fault",
    [
        lambda answer: 500,
        lambda answer: changed(answer, finish_reason="abort"),
        lambda answer: changed(
            answer, weight_versions=[{"version": "other.1", "start": 0, "end": 1}]
        ),
        lambda answer: changed(answer, weight_versions=[{"version": "torn", "start": 0, "end": 1}]),
    ],
    ids=["out of order", "aborted", "others' weights", "half replaced weights"],
)
def test_what_a_server_could_not_answer_is_asked_again_and_the_server_is_not_dropped(
    chat: ChatFormat, fault: Callable[[dict[str, Any]], Any]
) -> None:
    with serving(chat, draws_twice) as server, trainer_of([server.url], chat) as engine:

        def once(answer: dict[str, Any]) -> Any:
            server.fault = lambda answer: answer
            return fault(answer)

        server.fault = once
        engine.submit(request_of(chat))
        assert [completion.id for completion in finish(engine)] == ["t:0"]
        assert server.asked == ["t:0", "t:0"]


def test_when_the_last_server_answers_nonsense_the_run_ends_at_once_and_says_so(
    chat: ChatFormat,
) -> None:
    with serving(chat, draws_twice) as server, trainer_of([server.url], chat) as engine:
        server.fault = FAULTS["a log-probability of 0.5"]
        engine.submit(request_of(chat))
        began = time.monotonic()
        with pytest.raises(EngineError, match=r"no engine server is left .*\n.*log-probability of"):
            finish(engine)
        assert time.monotonic() - began < 5


def test_a_picture_that_several_requests_wait_for_goes_ahead_of_them_once(chat: ChatFormat) -> None:
    with serving(chat, draws_twice) as server, trainer_of([server.url], chat) as engine:

        async def together() -> None:
            requests = [pictured(chat, f"t.{k}:0", 1) for k in range(6)]
            await asyncio.gather(*(engine._fleet.complete(request) for request in requests))

        engine._run(together())
        assert server.sent == [draw_image(64, 64, seed=1).sha256]
        assert server.posts.count(GENERATE) == 1 + 6


def test_a_picture_that_a_server_forgot_is_sent_again_for_that_answer_only(
    chat: ChatFormat,
) -> None:
    with serving(chat, draws_twice) as server, trainer_of([server.url], chat) as engine:
        for turn, images in enumerate([(1,), (1, 2), (1, 2)]):
            if turn == 2:
                del server.pictures[draw_image(64, 64, seed=1).sha256]
            engine.submit(pictured(chat, f"t:{turn}", *images))
            assert len(finish(engine)) == 1
        one, two = (draw_image(64, 64, seed=k).sha256 for k in (1, 2))
        assert server.sent == [one, two, one, two]
        assert server.posts.count(GENERATE) == 3 + 1, "new pictures go with the request"
        engine.submit(pictured(chat, "t:3", 1, 2))
        assert len(finish(engine)) == 1
        assert len(server.sent) == 4


def test_an_aborted_request_is_not_returned_and_may_be_asked_again(chat: ChatFormat) -> None:
    with serving(chat, draws_twice) as server, trainer_of([server.url], chat) as engine:
        server.answers.clear()
        for id in ("kept:0", "dropped:0"):
            engine.submit(request_of(chat, id))
        wait_until(lambda: len(server.asked) == 2)
        engine.abort(["dropped:0", "never there"])
        server.answers.set()
        assert [completion.id for completion in finish(engine)] == ["kept:0"]
        engine.submit(request_of(chat, "dropped:0"))
        assert [completion.id for completion in finish(engine)] == ["dropped:0"]


def test_placeholders_that_do_not_fit_their_picture_are_refused_before_they_are_sent(
    chat: ChatFormat,
) -> None:
    with serving(chat, draws_twice) as server, trainer_of([server.url], chat) as engine:
        request = pictured(chat, "t:0", 1)
        with pytest.raises(AlignmentError, match="request t:0: placeholders do not fit"):
            engine.submit(replace(request, images=(draw_image(300, 300),)))
        with pytest.raises(AlignmentError, match="request t:0: 1 image placeholders for 2"):
            engine.submit(replace(request, images=request.images * 2))
        assert not engine.has_unfinished() and not server.asked


@pytest.mark.parametrize("kind", ["secret", "model", "path"])
def test_a_server_that_is_not_ours_is_refused_at_the_start(
    chat: ChatFormat, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    said = {"secret": "HTTP 401", "model": "another model", "path": "HTTP 404"}
    with serving(chat, draws_twice) as server:
        if kind == "model":
            server.served = replace(server.served, identity="0" * 64)
        if kind == "path":
            server.served = None
        secret = "x" * 16 if kind == "secret" else SECRET
        with (
            pytest.raises(EngineError, match=f"{server.url}: .*{said[kind]}"),
            trainer_of([server.url], chat, secret=secret),
        ):
            pass


def test_a_server_that_is_not_there_is_waited_for_and_then_named(chat: ChatFormat) -> None:
    with (
        pytest.raises(EngineError, match=r"with `serve-engine`\?\n  http://127.0.0.1:9: .*Connect"),
        trainer_of(["http://127.0.0.1:9"], chat, patience_s=0.1),
    ):
        pass


def test_base_weights_count_only_if_they_are_the_recipes(chat: ChatFormat) -> None:
    with (
        serving(chat, draws_twice) as server,
        trainer_of([server.url], chat, base="0" * 64, patience_s=0.1) as engine,
    ):
        engine.submit(request_of(chat))
        with pytest.raises(EngineError, match="its model folder has other weights"):
            finish(engine)


def test_the_secret_is_in_no_representation() -> None:
    assert SECRET not in repr(ServerOptions(secret=SECRET, base="", run=""))


def test_weights_arrive_whole_on_every_server_and_leave_no_files(
    chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "FILE_BYTES", 20)
    generator = torch.Generator().manual_seed(0)
    sent = {
        "a": torch.randn(7, 5, generator=generator),
        "half": torch.randn(3, 11, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "turned": torch.randn(4, 9, generator=generator).T,
    }
    with serving(chat, draws_twice) as one, serving(chat, draws_twice) as two:
        carrier = FolderWeights(tmp_path)
        with trainer_of([one.url, two.url], chat, carrier=carrier) as engine:
            for version in (3, 4):
                engine.load_weights(sent.items(), version=version)
                assert engine.version == version
            files = list(tmp_path.rglob("*.safetensors"))
            assert len(files) == 3, "old weights are left behind"
            readable = files[0].parent.stat().st_mode & 0o666
            assert {file.stat().st_mode & 0o777 for file in files} == {readable}
            scores = engine.score(chat.plain("hello"), [draw_image(64, 64)][:0])
            engine.submit(request_of(chat))
            (completion,) = finish(engine)
        length = len(completion.tokens)
        assert completion.versions == (VersionSpan(start=0, end=length, version=4),)
        total = sum(float(tensor.float().sum()) for tensor in sent.values())
        np.testing.assert_allclose(scores, -total, rtol=1e-6)
        for server in (one, two):
            assert server.weights.keys() == sent.keys()
            for name, tensor in sent.items():
                assert server.weights[name].dtype == tensor.dtype
                assert torch.equal(server.weights[name], tensor)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_replaced_in_mid_answer_between_a_pause_and_a_resume(
    chat: ChatFormat, tmp_path: Path
) -> None:
    with serving(chat, draws_twice) as server:
        with trainer_of([server.url], chat, carrier=FolderWeights(tmp_path)) as engine:
            server.answers.clear()
            engine.submit(request_of(chat))
            wait_until(lambda: server.asked)
            engine.load_weights(ONES.items(), version=1)
            assert engine.has_unfinished()
            server.answers.set()
            assert [completion.id for completion in finish(engine)] == ["t:0"]
        assert server.asked == ["t:0"], "what was under way was asked again"
        changes = [path for path in server.posts if "generate" not in path]
    assert changes == [
        "/pause?mode=keep&clear_cache=false",
        "/update_weight_version",
        "/collective_rpc",
        "/reset_prefix_cache?reset_running_requests=true",
        "/reset_encoder_cache",
        "/update_weight_version",
        "/resume",
    ]


@pytest.fixture
def with_weights(chat: ChatFormat, tmp_path: Path) -> Iterator[tuple[FakeServer, ServerEngine]]:
    """A server that was given ONES as version 1, and its trainer."""
    with (
        serving(chat, draws_twice) as server,
        trainer_of([server.url], chat, carrier=FolderWeights(tmp_path)) as engine,
    ):
        engine.load_weights(ONES.items(), version=1)
        yield server, engine


def test_a_server_that_comes_back_is_given_the_last_weights(
    chat: ChatFormat, with_weights: tuple[FakeServer, ServerEngine]
) -> None:
    first, engine = with_weights
    first.die()
    with serving(chat, draws_twice, port=first.server_address[1]) as again:
        engine.submit(request_of(chat))
        assert len(finish(engine)) == 1
        assert torch.equal(again.weights["w"], ONES["w"])


def test_a_server_that_was_restarted_before_anybody_missed_it_is_given_the_last_weights(
    with_weights: tuple[FakeServer, ServerEngine],
) -> None:
    server, _ = with_weights
    server.label, server.weights = BASE, {}
    wait_until(lambda: server.label == "r.1")
    assert torch.equal(server.weights["w"], ONES["w"])


def test_a_server_that_was_lost_before_it_was_told_to_go_on_goes_on(
    chat: ChatFormat, with_weights: tuple[FakeServer, ServerEngine]
) -> None:
    """It has the weights and is paused; whoever asks it would wait for ever."""
    server, engine = with_weights
    server.goes_on.clear()
    lost = engine._fleet.servers[0]._give_up
    engine._loop.call_soon_threadsafe(lost, EngineLostError("/resume: given up"))
    engine.submit(request_of(chat))
    assert len(finish(engine)) == 1
    assert server.posts.count("/collective_rpc") == 1, "it had them already"


def test_a_server_that_comes_back_during_an_update_is_not_taken_for_one_that_has_it(
    chat: ChatFormat, tmp_path: Path
) -> None:
    """It takes the weights before; its answers would be named after newer ones."""
    with (
        serving(chat, draws_twice) as first,
        serving(chat, draws_twice) as sound,
        trainer_of([first.url, sound.url], chat, carrier=FolderWeights(tmp_path)) as engine,
    ):
        engine.load_weights(ONES.items(), version=1)
        first.die()
        wait_until(lambda: engine._fleet.servers[0].weights is None)
        with serving(chat, draws_twice, port=first.server_address[1]) as again:
            taking, goes_on = threading.Event(), threading.Event()
            again.on_load = lambda: (taking.set(), goes_on.wait(WAIT_S))
            assert taking.wait(WAIT_S)
            engine.load_weights({"w": torch.zeros(3)}.items(), version=2)
            goes_on.set()
            wait_until(lambda: again.label == "r.1")
            for index in range(8):
                engine.submit(request_of(chat, f"{index}:0"))
            assert {c.versions[0].version for c in finish(engine)} == {2}
            wait_until(lambda: engine._fleet.servers[0].weights == "r.2")
            assert torch.equal(again.weights["w"], torch.zeros(3))
            engine.load_weights(ONES.items(), version=3)
            assert (again.label, sound.label) == ("r.3", "r.3")


def test_a_server_with_other_weights_is_asked_nothing_before_it_has_ours(
    chat: ChatFormat, tmp_path: Path
) -> None:
    with (
        serving(chat, draws_twice) as one,
        serving(chat, draws_twice) as two,
        trainer_of([one.url, two.url], chat, carrier=FolderWeights(tmp_path)) as engine,
    ):
        for version in (1, 2):
            engine.load_weights(ONES.items(), version=version)
            if version == 1:
                two.label = "other.7"
                time.sleep(0.3)
            for index in range(8):
                engine.submit(request_of(chat, f"{index}:0"))
            assert len(finish(engine)) == 8
            assert bool(two.asked) == (version == 2)


def test_half_replaced_weights_serve_nobody_until_whole_ones_come(
    chat: ChatFormat, tmp_path: Path
) -> None:
    """A trainer that dies between pause and resume leaves its server so."""
    with serving(chat, draws_twice) as server:
        server.label = TORN
        server.goes_on.clear()
        with trainer_of([server.url], chat, patience_s=0.2) as engine:
            engine.submit(request_of(chat))
            with pytest.raises(EngineError, match="its weights are 'torn'; wanted 'default'"):
                finish(engine)
        with trainer_of([server.url], chat, carrier=FolderWeights(tmp_path)) as engine:
            engine.load_weights(ONES.items(), version=1)
            engine.submit(request_of(chat))
            assert len(finish(engine)) == 1


def test_weights_that_do_not_fit_end_the_run_with_the_servers_words(
    chat: ChatFormat, tmp_path: Path
) -> None:
    with (
        serving(chat, draws_twice) as server,
        trainer_of([server.url], chat, carrier=FolderWeights(tmp_path)) as engine,
    ):
        server.refuses_weights = True
        with pytest.raises(EngineError, match=r"did not take the weights: .*shapes differ"):
            engine.load_weights(ONES.items(), version=1)


def test_a_server_that_dies_while_it_takes_weights_leaves_the_others_in_use(
    chat: ChatFormat, tmp_path: Path
) -> None:
    with serving(chat, draws_twice) as one, serving(chat, draws_twice) as two:
        one.on_load = one.die
        with trainer_of([one.url, two.url], chat, carrier=FolderWeights(tmp_path)) as engine:
            engine.load_weights(ONES.items(), version=1)
            engine.submit(request_of(chat))
            assert len(finish(engine)) == 1
        assert two.asked and not one.asked


def test_a_rank_that_does_not_send_waits_for_the_one_that_does(
    chat: ChatFormat, tmp_path: Path
) -> None:
    with serving(chat, draws_twice) as server, ExitStack() as stack:
        sender = stack.enter_context(
            trainer_of([server.url], chat, carrier=FolderWeights(tmp_path))
        )
        other = stack.enter_context(trainer_of([server.url], chat))
        gathered: list[str] = []
        waiting = threading.Thread(
            target=lambda: other.load_weights(
                ((gathered.append(name) or name, tensor) for name, tensor in ONES.items()),
                version=1,
            )
        )
        waiting.start()
        time.sleep(0.2)
        assert waiting.is_alive() and gathered == ["w"]
        sender.load_weights(ONES.items(), version=1)
        waiting.join(10)
        assert not waiting.is_alive() and other.version == 1


def test_servers_that_score_differently_are_refused(chat: ChatFormat, tmp_path: Path) -> None:
    with serving(chat, draws_twice) as one, serving(chat, draws_twice) as two:
        carrier = FolderWeights(tmp_path)
        with trainer_of([one.url, two.url], chat, carrier=carrier, agreement=0.02) as engine:
            engine.load_weights(ONES.items(), version=1)
            assert set(engine.score(chat.plain("hello"), [])) == {-3.0}
            assert one.ahead == two.ahead == ["score"], "the learner waits for nobody's answer"
            two.weights = {"w": torch.full((3,), 1.01)}
            with pytest.raises(EngineError, match=r"score the same tokens 0\.03 nat apart"):
                engine.score(chat.plain("hello"), [])


def test_only_names_of_this_run_are_versions() -> None:
    names = WeightNames("r")
    assert (names.version(BASE), names.version("r.0")) == (0, 0)
    names.advance(7)
    assert names.present == "r.7" and names.number == 7
    assert [names.version(name) for name in ("r.7", "r.12")] == [7, 12]
    for other in (BASE, TORN, "s.7", "r.", "r.-1", "r.7.1", "7"):
        assert names.version(other) is None
        assert names.are_others(other) == (other != BASE)
    assert not any(map(names.are_others, (None, "r.7", "r.2")))


def seats(*loads: int) -> list[Seat]:
    return [Seat(server=None, replica=k, load=load) for k, load in enumerate(loads)]  # type: ignore[arg-type]


def test_a_request_follows_its_trajectory_or_its_group_unless_that_engine_is_overloaded(
    chat: ChatFormat,
) -> None:
    placement, (a, b) = Placement(), seats(0, 1)
    first = request_of(chat, "x.0:0")
    assert placement.choose([a, b], first) is a
    longer = replace(first, id="x.0:1", tokens=chat.plain("hello there"))
    a.load = 5  # at most 1.25 * 1 + 4
    assert placement.choose([a, b], replace(first, id="x.1:0")) is a, "attempts share a prefix"
    assert placement.choose([a, b], longer) is a, "turns stay together"
    a.load = 6
    assert placement.choose([a, b], longer) is b, "it is overloaded"
    a.load = 0
    assert placement.choose([a, b], replace(longer, id="x.0:2")) is b, "it moved"
    placement.forget()
    assert placement.choose([a, b], replace(longer, id="x.0:3")) is a


def test_ranks_have_servers_of_their_own_or_share_them() -> None:
    urls = ["a", "b", "c"]
    assert servers_of_rank(urls, 0, 2) == (["a", "c"], True)
    assert servers_of_rank(urls, 1, 2) == (["b"], True)
    assert [servers_of_rank(urls[:2], rank, 4) for rank in range(4)] == [
        (["a"], True), (["b"], True), (["a"], False), (["b"], False),
    ]  # fmt: skip
