"""vLLM's own server, as `serve-engine` starts it: one process for all tests of this file."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import engine_contract as it
import httpx
import numpy as np
import pytest
from engine_contract import AGREEMENT, changed_weights, recomputed, request_for, serve
from fake_vllm import SECRET, serving, trainer_of, wait_until
from process_environment import ROOT, environment
from rollout_world import picture_task, teach_calls
from streaming import streamed

from tapo_train.__main__ import main
from tapo_train.commands import serve_engine as serve_engine_command
from tapo_train.errors import EngineError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.engine import Completion, GenerationRequest, Sampling
from tapo_train.rollout.hf_engine import HfEngine
from tapo_train.rollout.servers.engine import ServerEngine
from tapo_train.rollout.servers.gate import authorization
from tapo_train.rollout.servers.server import EngineServer
from tapo_train.rollout.servers.weights import FolderWeights
from tapo_train.types import Trajectory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

START_S = 400
"""[s] a server may take to start on a machine that does other things as well."""
CHANGES = 20
"""Weight changes under running requests."""
UNLISTED = ("/docs", "/redoc", "/openapi.json", "/", "/nothing", "/tapo_train/served", "/metrics/")
"""Paths that the description of the server's routes leaves out."""


@dataclass
class Served:
    """The server, its trainer, and the reference over the same folder."""

    process: subprocess.Popen[str]
    url: str
    chat: ChatFormat
    engine: ServerEngine
    slow: HfEngine


@pytest.fixture(scope="module")
def served(tiny_qwen3_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    chat = ChatFormat(teach_calls(tiny_qwen3_vl, tmp_path_factory.mktemp("model")))
    command = [sys.executable, "-m", "tapo_train", "serve-engine", "recipes/demo_cpu.yaml"]
    process = subprocess.Popen(
        [*command, "--model", str(chat.model), "--port", "0"],
        cwd=ROOT,
        env=environment() | {"TAPO_ENGINE_SECRET": SECRET, "VLLM_LOGGING_LEVEL": "ERROR"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        line = next((line for line in process.stdout if "to serve it" in line), "")
        found = re.search(r"on (http://127\.0\.0\.1:\d+)", line)
        assert found, "the server did not start"
        threading.Thread(target=process.stdout.read, daemon=True).start()
        carrier = FolderWeights(tmp_path_factory.mktemp("weights"))
        with trainer_of([found[1]], chat, carrier=carrier, patience_s=START_S) as engine:
            yield Served(
                process=process, url=found[1], chat=chat, engine=engine, slow=HfEngine(chat)
            )
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_no_path_of_the_server_answers_without_the_secret(served: Served) -> None:
    with httpx.Client(base_url=served.url, trust_env=False, timeout=120) as client:
        known = {"Authorization": authorization(SECRET)}
        described = client.get("/openapi.json", headers=known).json()["paths"]
        routes = [(method, path) for path, methods in described.items() for method in methods]
        assert {"/pause", "/collective_rpc", "/update_weights", "/inference/v1/generate"} <= set(
            described
        )
        routes += [(method, path) for path in UNLISTED for method in ("get", "post", "options")]
        for method, path in routes:
            for wrong in ({}, {"Authorization": authorization("x" * 16)}):
                found = client.request(method, path, headers=wrong)
                assert found.status_code == 401, f"{method} {path}"
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        key = {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
        assert client.get("/v1/realtime", headers=upgrade | key).status_code == 403
        assert client.get("/health", headers=known).status_code == 200


def test_it_agrees_with_the_reference_before_and_after_weight_syncs(served: Served) -> None:
    it.agrees_before_and_after_weight_syncs(
        served.engine, served.slow, served.chat, versions=(1, 2)
    )


def test_its_logprobs_are_those_of_the_sampled_distribution(served: Served) -> None:
    it.says_the_logprobs_of_the_sampled_distribution(served.engine, served.slow, served.chat)


def test_its_greedy_turns_are_those_of_the_reference(served: Served) -> None:
    it.is_greedy_like_the_reference(served.engine, served.slow, served.chat)


def test_it_never_samples_banned_tokens(served: Served) -> None:
    it.never_samples_banned_tokens(served.engine, served.chat)


def test_its_seeded_requests_are_the_same_in_any_company(served: Served) -> None:
    it.seeds_a_request_in_any_company(served.engine, served.chat)


def test_it_reuses_keys_until_the_weights_change(served: Served) -> None:
    it.reuses_keys_until_the_weights_change(served.engine, served.chat, version=9)
    weights = changed_weights(served.chat, seed=9)
    served.slow.load_weights(weights.items(), version=9)


def test_it_gives_a_text_its_own_positions_after_a_picture(served: Served) -> None:
    it.gives_a_text_its_own_positions_after_a_picture(served.engine, served.slow, served.chat)


def test_it_drops_an_aborted_request(served: Served) -> None:
    it.drops_an_aborted_request(served.engine, served.chat)


def test_it_refuses_what_it_cannot_hold(served: Served) -> None:
    it.refuses_what_it_cannot_hold(served.engine, served.chat)


def test_a_picture_that_it_forgot_is_sent_again(served: Served) -> None:
    request = request_for(served.chat, sampling=Sampling(temperature=0))
    (before,) = serve(served.engine, [request])
    with httpx.Client(base_url=served.url, trust_env=False, timeout=120) as client:
        known = {"Authorization": authorization(SECRET)}
        assert client.post("/reset_mm_cache", headers=known).status_code == 200
    (after,) = serve(served.engine, [request])
    np.testing.assert_array_equal(after.tokens, before.tokens)


def answered_under_changes(served: Served, changes: int) -> tuple[float, float]:
    """Weights change `changes` times under running requests: the largest disagreement [nat] of a
    probe, and of a sampled token with the weights that it names."""
    engine, chat = served.engine, served.chat
    requests = [
        replace(request_for(chat, id=f"{k}:0", sampling=Sampling(seed=k)), max_tokens=400)
        for k in range(6)
    ]
    found: list[tuple[GenerationRequest, Completion]] = []
    stop = threading.Event()

    def sample() -> None:
        number = 0
        while not stop.is_set():
            batch = [replace(each, id=f"{number}.{each.id}") for each in requests]
            found.extend(zip(batch, serve(engine, batch), strict=True))
            number += 1

    references, probe = {}, request_for(chat, sampling=Sampling())
    first = served.engine.version + 1
    references[first - 1] = replace_weights(served, first - 1)
    sampler = threading.Thread(target=sample)
    sampler.start()
    drift = 0.0
    for version in range(first, first + changes):
        references[version] = replace_weights(served, version)
        ours = references[version].score(probe.tokens, probe.images)
        theirs = engine.score(probe.tokens, probe.images)
        drift = max(drift, float(np.abs(ours - theirs).max()))
    stop.set()
    sampler.join()
    assert {span.version for _, completion in found for span in completion.versions} >= {first}
    assert max(len(completion.versions) for _, completion in found) > 1, "none was interrupted"
    worst = 0.0
    for request, completion in found:
        for span in completion.versions:
            expected = recomputed(references[span.version], request, completion)
            differences = np.abs(expected - completion.logprobs)[span.start : span.end]
            worst = max(worst, float(differences.max()))
    return drift, worst


def replace_weights(served: Served, version: int) -> HfEngine:
    """Send new weights; the reference that has them."""
    weights = changed_weights(served.chat, seed=version)
    served.engine.load_weights(weights.items(), version=version)
    reference = HfEngine(served.chat)
    reference.load_weights(weights.items(), version=version)
    return reference


def test_every_token_is_sampled_by_the_weights_it_names_whatever_changes_meanwhile(
    served: Served,
) -> None:
    drift, worst = answered_under_changes(served, CHANGES)
    assert drift <= AGREEMENT
    assert worst <= AGREEMENT


def test_without_emptied_caches_tokens_would_be_of_weights_that_they_do_not_name(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above sees if `resume` keeps keys and values of the old weights."""

    async def hasty(self: EngineServer, weights: str) -> None:
        await self._client.ask("POST", "/reset_encoder_cache")
        await self._client.ask("POST", "/update_weight_version", {"new_version": weights})
        await self._client.ask("POST", "/resume")
        self.is_changing, self.weights = False, weights

    with monkeypatch.context() as patched:
        patched.setattr(EngineServer, "resume", hasty)
        _, worst = answered_under_changes(served, 2)
    assert worst > 10 * AGREEMENT
    replace_weights(served, served.engine.version + 1)


def test_a_stream_goes_on_while_weights_change_and_each_token_is_of_the_weights_it_names(
    served: Served,
) -> None:
    first, staleness = served.engine.version + 1, 2
    references = {first: replace_weights(served, first)}
    stream = streamed(
        served.engine,
        chat=served.chat,
        staleness=staleness,
        steps=10**6,
        rollouts=2,
        apart=True,
        tasks=[picture_task(f"q{number}") for number in range(20)],
    )
    versions_of_steps = []
    try:
        for step in range(first, first + 4):
            rolled = stream(step)
            versions_of_steps.append(rolled.metrics["rollout/versions"])
            references[step + 1] = replace_weights(served, step + 1)
            for played in [t for group in rolled.groups for t in group.trajectories]:
                require_named(references, played)
                versions = played.token_versions()
                assert step - staleness <= versions.min() <= versions.max() <= step
        assert max(versions_of_steps) > 1, "none went on over an update"
    finally:
        stream.close()


def require_named(references: dict[int, HfEngine], played: Trajectory) -> None:
    """Each sampled token has the log-probability that the weights it names give it."""
    turns = [np.arange(turn.span.start, turn.span.end) for turn in played.turns]
    at, versions = np.concatenate(turns), played.token_versions()
    for version in np.unique(versions).tolist():
        slow = references[version]
        scores = slow.processed(slow.logits(played.tokens, played.images), Sampling())
        named = versions == version
        expected = scores[at - 1, played.tokens[at]].numpy()[named]
        np.testing.assert_allclose(played.logprobs[named], expected, atol=AGREEMENT, rtol=0)


def test_killed_in_mid_answer_it_is_replaced_by_another_until_none_is_left(
    served: Served,
) -> None:
    """The last test: the server is gone after it."""
    chat = served.chat
    long = replace(request_for(chat, sampling=Sampling(seed=1)), max_tokens=500)
    with serving(chat, lambda _: "<answer>x</answer>") as other:
        other.answers.clear()
        other.label = served.engine._fleet.names.present
        with trainer_of([served.url, other.url], chat, patience_s=2) as engine:
            engine._fleet.names.advance(served.engine.version)
            requests = [replace(long, id=f"{k}:0") for k in range(12)]
            for request in requests:
                engine.submit(request)
            wait_until(lambda: engine._fleet.servers[0].seats[0].load > 0 and other.asked)
            os.kill(served.process.pid, signal.SIGKILL)
            other.answers.set()
            done: list[str] = []
            while engine.has_unfinished():
                done += [completion.id for completion in engine.step()]
            assert sorted(done) == sorted(request.id for request in requests)
            other.die()
            engine.submit(long)
            with pytest.raises(EngineError, match=r"no engine server is left .*\n  http.*\n  http"):
                while engine.has_unfinished():
                    engine.step()


def test_without_recipe_or_secret_nothing_is_served(
    tiny_qwen3_vl: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["serve-engine", "--model", str(tiny_qwen3_vl), "--port", "0"]) == 2
    assert "wanted RECIPE, or --model DIR with a recipe.yaml in it" in capsys.readouterr().err
    for secret, problem in (("", "found 0 characters"), ("two words " * 3, "found 30 ")):
        monkeypatch.setenv("TAPO_ENGINE_SECRET", secret)
        assert main(["serve-engine", "recipes/demo_cpu.yaml", "--port", "0"]) == 2
        assert f"TAPO_ENGINE_SECRET: {problem}" in capsys.readouterr().err


def test_with_a_model_folder_the_first_word_may_be_an_override(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loaded(Exception):
        pass

    def load(path: Path, overrides: list[str]) -> None:
        raise Loaded(path.name, overrides)

    monkeypatch.setattr("tapo_train.commands.serve_engine.load_recipe", load)
    (tmp_path / "recipe.yaml").touch()
    model = ["--model", str(tmp_path), "--port", "0"]
    for words in (["run.seed=3"], [], ["other.yaml", "run.seed=3"]):
        with pytest.raises(Loaded) as caught:
            serve_engine_command.main([*words, *model])
        given = [word for word in words if "=" in word]
        name = "other.yaml" if "other.yaml" in words else "recipe.yaml"
        assert caught.value.args == (name, [f"model.path='{tmp_path}'", *given])
