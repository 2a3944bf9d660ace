"""Sampler and learner take turns: in which order, and nothing is different for it."""

from __future__ import annotations

from collections.abc import Iterator
from mmap import PAGESIZE, mmap
from pathlib import Path

import pytest
import torch
from learner_rows import make_policy, some_rows, weights_of

from tapo_train.algos.metrics import finalise
from tapo_train.build.learner import build_sharing
from tapo_train.errors import ConfigError
from tapo_train.learner.batch import pack
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.objective import supervised
from tapo_train.recipe.compose import load_recipe
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.engine import Sleeper
from tapo_train.training.colocation import DeviceSharing, begin_stage, stage_memory

RECIPE = "recipes/demo_cpu.yaml"


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    yield
    end_process_group()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_states_that_leave_between_updates_change_no_bit_of_weights_scores_or_checkpoint(
    tiny_qwen3_vl: Path, precision: str
) -> None:
    chat = ChatFormat(tiny_qwen3_vl)
    outcomes = []
    for moves in (False, True):
        policy = make_policy(
            tiny_qwen3_vl,
            chat,
            zero_stage=2,
            precision=precision,
            optimizer="adamw",
            learning_rate=1e-2,
        )
        sharing = DeviceSharing(
            before_learning=[policy.reload_states] if moves else [],
            before_sampling=[policy.offload_states] if moves else [],
        )
        batches = pack(some_rows(chat, policy.layout), budget_tokens=60)
        losses = []
        sharing.sampling()
        for _ in range(3):
            sharing.learning()
            losses.append(finalise(policy.update(batches, supervised))["update/loss"])
            sharing.sampling()
            sharing.sampling()
        outcomes.append(
            (losses, weights_of(policy), policy.logprobs(batches[0]), policy.learner_state()[0])
        )
        policy.close()
    (losses, weights, scores, state), (losses_2, weights_2, scores_2, state_2) = outcomes
    assert losses == losses_2 and losses[2] < losses[0]
    assert torch.equal(scores, scores_2)
    for ours, theirs in ((weights, weights_2), (state, state_2)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Recorder:
    """An engine that can sleep and a policy whose states can leave, in one list of events."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def sleep(self) -> None:
        self.events.append("engine sleeps")

    def wake(self) -> None:
        self.events.append("engine wakes")

    def offload_states(self) -> None:
        self.events.append("states leave")

    def reload_states(self) -> None:
        self.events.append("states come")


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], []),
        (["learner.offload_in_rollout=true"], ["states come", "states leave"]),
        (["rollout.engine.sleep_in_update=true"], ["engine sleeps", "engine wakes"]),
        (
            ["learner.offload_in_rollout=true", "rollout.engine.sleep_in_update=true"],
            ["engine sleeps", "states come", "states leave", "engine wakes"],
        ),
    ],
)
def test_one_leaves_before_the_other_comes(
    overrides: list[str], wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A machine with a GPU, for which alone these switches are.
    monkeypatch.setattr("tapo_train.build.rollout.DEVICE", "cuda")
    both = Recorder()
    assert isinstance(both, Sleeper)
    recipe = load_recipe(RECIPE, ["learner.zero_stage=2", *overrides])
    sharing = build_sharing(recipe, both, both)  # type: ignore[arg-type]
    sharing.learning()
    sharing.sampling()
    assert both.events == wanted


def test_an_engine_without_a_gpu_cannot_sleep() -> None:
    recipe = load_recipe(RECIPE, ["rollout.engine.sleep_in_update=true"])
    both = Recorder()
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="sleep_in_update: found true without a GPU"):
        build_sharing(recipe, both, both)  # type: ignore[arg-type]


def test_the_memory_of_a_stage_is_what_is_resident_after_it() -> None:
    begin_stage()
    before = stage_memory()["rss"]
    # A quarter of a GiB from the system: an allocator may give what it kept of earlier tests.
    with mmap(-1, 2**28) as held:
        held[::PAGESIZE] = bytes(len(held) // PAGESIZE)
        after = stage_memory()["rss"]
    assert after - before == pytest.approx(0.25, abs=0.05)
