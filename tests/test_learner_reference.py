"""The reference policy of a KL penalty: where it starts, what it holds on to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from learner_rows import make_policy, some_rows

from tapo_train.algos.kl import KlKind
from tapo_train.algos.losses import grpo
from tapo_train.algos.metrics import finalise
from tapo_train.build import build_reference
from tapo_train.learner.batch import MicroBatch, pack
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.objective import policy_gradient
from tapo_train.learner.policy import Policy
from tapo_train.learner.reference import FrozenReference, NoReference
from tapo_train.recipe.compose import recipe_from_dict
from tapo_train.rollout.chat import ChatFormat

TEMPERATURE = 0.7
BANNED = (3, 17)
PULLING: tuple[KlKind, ...] = ("k2", "k3", "k1+", "k3+")
"""Estimators whose gradient fades towards the reference: that of abs never does, so it
oscillates around it, and that of k1 has no direction (see algos/kl.py)."""


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    yield
    end_process_group()


def a_policy(folder: Path, **changes: object) -> tuple[Policy, FrozenReference, list[MicroBatch]]:
    """A policy, the reference it started from, and micro-batches with both log-probabilities."""
    chat = ChatFormat(folder)
    policy = make_policy(
        folder,
        chat,
        **(
            {"temperature": TEMPERATURE, "banned_token_ids": BANNED, "learning_rate": 0.1} | changes
        ),
    )
    reference = FrozenReference(
        folder,
        settings=policy.settings,
        pixels=chat.pixels,
        device=policy.device,
        distribution=policy.distribution,
    )
    packed = pack(some_rows(chat, policy.layout), budget_tokens=60)
    return policy, reference, reference(policy.with_old_logprobs(packed))


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize("family", ["tiny_qwen3_vl", "tiny_qwen2_5_vl"])
def test_the_divergence_is_zero_before_the_first_update_and_grows_after(
    family: str, zero_stage: int, request: pytest.FixtureRequest
) -> None:
    policy, reference, batches = a_policy(request.getfixturevalue(family), zero_stage=zero_stage)
    objective = policy_gradient(grpo, kl_coefficient=1e-3)
    rows = [finalise(policy.update(batches, objective)) for _ in range(3)]
    again = reference(batches)
    reference.close()
    policy.close()
    assert rows[0]["policy/ref_kl"] == 0
    assert rows[2]["kl/k3"] > rows[1]["kl/k3"] > 1e-6
    for before, after in zip(batches, again, strict=True):
        assert before.reference_logprobs is not None and after.reference_logprobs is not None
        assert torch.equal(before.reference_logprobs, after.reference_logprobs)


def test_each_micro_batch_a_reference_scores_is_progress(tiny_qwen3_vl: Path) -> None:
    recipe = recipe_from_dict(
        {
            "run": {"dir": "r"},
            "model": {"path": str(tiny_qwen3_vl)},
            "data": {"train": ["t.jsonl"]},
            "tools": {"names": []},
            "algo": {"kl": {"coef": 0.1}},
        }
    )
    chat, beats = ChatFormat(tiny_qwen3_vl), list[int]()
    policy = make_policy(tiny_qwen3_vl, chat)
    reference = build_reference(recipe, policy, chat, on_progress=lambda: beats.append(1))
    batches = pack(some_rows(chat, policy.layout), budget_tokens=60)
    reference(batches)
    reference.close()
    policy.close()
    assert len(beats) == len(batches) > 1


@pytest.mark.parametrize("kind", get_args(KlKind))
def test_a_large_coefficient_keeps_the_policy_near_the_reference(
    tiny_qwen3_vl: Path, kind: KlKind
) -> None:
    free, held = (distance(tiny_qwen3_vl, kind, coefficient) for coefficient in (0.0, 4.0))
    if kind in PULLING:
        assert held < 0.8 * free
    else:
        assert held != free


def distance(folder: Path, kind: KlKind, coefficient: float) -> float:
    """Mean |log ratio to the reference| after six updates on the same rows."""
    policy, reference, batches = a_policy(folder, learning_rate=0.05)
    objective = policy_gradient(grpo, kl_kind=kind, kl_coefficient=coefficient)
    for _ in range(6):
        policy.update(batches, objective)
    total = sum((policy.logprobs(b) - b.reference_logprobs).abs().sum() for b in batches)
    reference.close()
    policy.close()
    return float(total / sum(b.num_trained for b in batches))


def test_without_a_penalty_the_micro_batches_stay_as_they_are(tiny_qwen3_vl: Path) -> None:
    policy, reference, batches = a_policy(tiny_qwen3_vl)
    assert all(a is b for a, b in zip(NoReference()(batches), batches, strict=True))
    reference.close()
    policy.close()
