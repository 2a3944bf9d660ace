"""Engine processes: the same tokens as the engine inside the trainer, also when one is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from engine_servers import SECRET, options_of
from process_environment import ROOT, environment
from rollout_world import SYSTEM_PROMPT, draw_toolbox, picture_task, teach_calls

from tapo_train.__main__ import main
from tapo_train.commands import serve_engine as serve_engine_command
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import Engine, Sampling
from tapo_train.rollout.hf_engine import HfEngine
from tapo_train.rollout.limits import Limits
from tapo_train.rollout.remote.carriers import StreamedWeights
from tapo_train.rollout.remote.engine import RemoteEngine
from tapo_train.types import Group

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

AGREEMENT = 1e-4
"""[nat] between engines in float32."""
START_S = 120


@contextmanager
def serve_engine(model: Path, *overrides: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and its address, as the command prints it."""
    command = [sys.executable, "-m", "tapo_train", "serve-engine", "recipes/demo_cpu.yaml"]
    command += ["--model", str(model), "--port", "0", *overrides]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment() | {"TAPO_ENGINE_SECRET": SECRET.decode()},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = next((line for line in process.stdout if "serving" in line), "")
        found = re.search(r"on (tcp://127\.0\.0\.1:\d+)", line)
        assert found, "the server did not start"
        yield process, found.group(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGKILL)
    finally:
        process.kill()


def trainer(urls: list[str], chat: ChatFormat) -> RemoteEngine:
    options = options_of(chat, patience_s=START_S)
    return RemoteEngine(urls, secret=SECRET, options=options, carrier=StreamedWeights())


def play(engine: Engine, chat: ChatFormat, sampling: Sampling, *, rollouts: int) -> list[Group]:
    return collect(
        [picture_task("a"), picture_task("b")],
        engine=engine,
        chat=chat,
        toolbox=draw_toolbox(),
        system_prompt=SYSTEM_PROMPT,
        rollouts_per_task=rollouts,
        limits=Limits(max_turns=4, max_turn_tokens=48, max_tokens=1000),
        sampling=sampling,
    )


def require_equal(found: list[Group], expected: list[Group]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert [t.id for t in ours.trajectories] == [t.id for t in theirs.trajectories]
        for a, b in zip(ours.trajectories, theirs.trajectories, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=AGREEMENT, rtol=0)


def test_a_killed_server_changes_no_group(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    chat = ChatFormat(teach_calls(tiny_qwen3_vl, tmp_path))
    seeded = Sampling(temperature=0.8, seed=1)
    expected = play(HfEngine(chat), chat, seeded, rollouts=8)
    with (
        serve_engine(chat.model, "rollout/engine=hf") as (victim, first),
        serve_engine(chat.model, "rollout/engine=hf") as (_, second),
    ):
        remote = trainer([first, second], chat)
        killer = threading.Thread(target=kill_while_busy, args=(victim, remote))
        killer.start()
        found = play(remote, chat, seeded, rollouts=8)
        killer.join()
        assert victim.wait(10) == -signal.SIGKILL
        require_equal(found, expected)
        remote.close()


def kill_while_busy(victim: subprocess.Popen[str], remote: RemoteEngine) -> None:
    """kill -9, as soon as the first server has had requests for a moment."""
    while remote._fleet.links[0].load == 0:
        time.sleep(0.001)
    time.sleep(0.3)
    assert remote._fleet.links[0].load > 0, "nothing was under way there"
    os.kill(victim.pid, signal.SIGKILL)


def test_a_vllm_process_gives_the_tokens_of_the_reference_and_takes_weights(
    tiny_qwen3_vl: Path, tmp_path: Path
) -> None:
    from test_rollout_engines import changed_weights

    chat, greedy = ChatFormat(teach_calls(tiny_qwen3_vl, tmp_path)), Sampling(temperature=0)
    slow = HfEngine(chat)
    with serve_engine(chat.model) as (_, url):
        remote = trainer([url], chat)
        require_equal(play(remote, chat, greedy, rollouts=1), play(slow, chat, greedy, rollouts=1))
        weights = changed_weights(chat, seed=1)
        for engine in (remote, slow):
            engine.load_weights(weights.items(), version=1)
        (group, _) = play(slow, chat, greedy, rollouts=1)
        probe = group.trajectories[0]
        np.testing.assert_allclose(
            remote.score(probe.tokens, probe.images),
            slow.score(probe.tokens, probe.images),
            atol=AGREEMENT,
            rtol=0,
        )
        remote.close()


def test_without_recipe_or_secret_nothing_is_served(
    tiny_qwen3_vl: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["serve-engine", "--model", str(tiny_qwen3_vl), "--port", "0"]) == 2
    assert "wanted RECIPE, or --model DIR with a recipe.yaml in it" in capsys.readouterr().err
    monkeypatch.delenv("TAPO_ENGINE_SECRET", raising=False)
    assert main(["serve-engine", "recipes/demo_cpu.yaml", "--port", "0"]) == 2
    assert "TAPO_ENGINE_SECRET: found 0 characters" in capsys.readouterr().err


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
