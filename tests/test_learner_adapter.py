"""Low-rank adapters: what is trained, what leaves the learner, what the reference is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_rows import make_policy, some_rows, weights_of
from transformers import AutoModelForImageTextToText

from tapo_train.algos.losses import grpo
from tapo_train.algos.metrics import finalise
from tapo_train.errors import LearnerError
from tapo_train.learner.batch import join, pack
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.objective import policy_gradient, supervised
from tapo_train.learner.policy import Policy
from tapo_train.learner.reference import AdapterFree
from tapo_train.learner.settings import AdapterSettings
from tapo_train.rollout.chat import ChatFormat

RANK, ALPHA = 4, 6.0
ADAPTER = AdapterSettings(rank=RANK, alpha=ALPHA, targets=("q_proj", "down_proj"), seed=3)
TOLERANCE = 1e-5
FAMILIES = ("tiny_qwen3_vl", "tiny_qwen2_5_vl")


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    yield
    end_process_group()


def adapted(folder: Path, **changes: Any) -> Policy:
    settings = {"adapter": ADAPTER, "freeze_vision": True, "learning_rate": 0.5} | changes
    return make_policy(folder, ChatFormat(folder), **settings)


def train(policy: Policy, folder: Path, updates: int = 2) -> None:
    rows = some_rows(ChatFormat(folder), policy.layout)
    for _ in range(updates):
        policy.update(pack(rows, budget_tokens=60), supervised)


def base_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a folder, as the model's own names have them."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return weights | {"lm_head.weight": model.lm_head.weight.detach()}


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_adapters_are_trained_and_what_leaves_is_the_base_plus_their_product(
    family: str, zero_stage: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    policy = adapted(folder, zero_stage=zero_stage)
    wanted = base_weights(folder)
    before = weights_of(policy)
    train(policy, folder)
    after = weights_of(policy)
    factors = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    policy.close()
    assert set(after) == set(wanted) and "lm_head.weight" in after
    for name, base in wanted.items():
        assert torch.equal(before[name], base), name
        is_adapted = "language_model" in name and name.endswith(
            tuple(f".{target}.weight" for target in ADAPTER.targets)
        )
        assert torch.equal(after[name], base) != is_adapted, name
        change = after[name] - base
        assert not is_adapted or torch.linalg.matrix_rank(change, rtol=1e-3) <= RANK
    assert len(factors) == 2 * 2 * len([n for n in wanted if n.endswith("q_proj.weight")])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_model_answers_as_the_adapted_learner_does(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(family)
    policy = adapted(folder, learning_rate=2.0)
    rows = some_rows(ChatFormat(folder), policy.layout)
    untrained = policy.logprobs(join(rows))
    train(policy, folder)
    learned = policy.logprobs(join(rows))
    policy.export(tmp_path / "export")
    policy.close()
    plain = make_policy(tmp_path / "export", ChatFormat(folder))
    exported = plain.logprobs(join(rows))
    assert set(weights_of(plain)) == set(base_weights(folder))
    plain.close()
    torch.testing.assert_close(exported, learned, atol=TOLERANCE, rtol=0)
    assert (learned - untrained).abs().max() > 1e-2


def test_the_first_update_of_an_adapter_is_the_gradient_of_the_weight_through_its_factors(
    tiny_qwen3_vl: Path,
) -> None:
    """With B = 0: dL/dB = s dL/dW A^T, so SGD at rate r changes W by -r s^2 dL/dW A^T A."""
    rate, scale = 0.5, ALPHA / RANK
    policy = adapted(tiny_qwen3_vl, learning_rate=rate)
    layer = "model.language_model.layers.0.self_attn.q_proj"
    first = policy.model.get_submodule(layer).lora_A.detach().clone()
    before = weights_of(policy)[f"{layer}.weight"]
    train(policy, tiny_qwen3_vl, updates=1)
    change = weights_of(policy)[f"{layer}.weight"] - before
    policy.close()
    full = make_policy(tiny_qwen3_vl, ChatFormat(tiny_qwen3_vl), learning_rate=1.0)
    whole = weights_of(full)[f"{layer}.weight"]
    train(full, tiny_qwen3_vl, updates=1)
    gradient = whole - weights_of(full)[f"{layer}.weight"]
    full.close()
    wanted = -rate * scale**2 * gradient @ first.T @ first
    torch.testing.assert_close(change, wanted, atol=1e-6, rtol=1e-3)
    assert change.abs().max() > 1e-5


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_the_reference_is_the_learner_without_its_adapters(
    tiny_qwen3_vl: Path, zero_stage: int
) -> None:
    policy = adapted(tiny_qwen3_vl, zero_stage=zero_stage)
    chat = ChatFormat(tiny_qwen3_vl)
    packed = pack(some_rows(chat, policy.layout), budget_tokens=60)
    start = policy.logprobs_of_all(packed)
    train(policy, tiny_qwen3_vl)
    moved = policy.logprobs_of_all(packed)
    batches = AdapterFree(policy)(policy.with_old_logprobs(packed))
    for batch, before, now in zip(batches, start, moved, strict=True):
        assert batch.reference_logprobs is not None
        torch.testing.assert_close(batch.reference_logprobs, before, atol=1e-6, rtol=0)
        assert torch.equal(batch.old_logprobs, now), "the adapters are on again"
    metrics = finalise(policy.update(batches, policy_gradient(grpo, kl_coefficient=0.1)))
    policy.close()
    assert metrics["kl/k3"] > 1e-6


def test_adapters_are_the_same_from_the_same_seed_alone(tiny_qwen3_vl: Path) -> None:
    factors = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        policy = adapted(tiny_qwen3_vl)
        factors.append([p.detach().clone() for p in policy.model.parameters() if p.requires_grad])
        policy.close()
    assert all(torch.equal(a, b) for a, b in zip(*factors, strict=True))
    assert any(bool(factor.any()) for factor in factors[0])


def test_adapters_of_the_vision_tower_are_there_unless_it_is_frozen(tiny_qwen3_vl: Path) -> None:
    targets = ("q_proj", "qkv")
    settings = AdapterSettings(rank=RANK, alpha=ALPHA, targets=targets)
    policy = adapted(tiny_qwen3_vl, adapter=settings, freeze_vision=False)
    before = weights_of(policy)
    train(policy, tiny_qwen3_vl)
    after = weights_of(policy)
    policy.close()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[1] for name in changed} == {"language_model", "visual"}
    with pytest.raises(
        LearnerError, match="'qkv', which names only layers that stay frozen; wanted of down_proj"
    ):
        adapted(tiny_qwen3_vl, adapter=settings)


def test_the_head_gets_no_adapter(tiny_qwen3_vl: Path) -> None:
    settings = AdapterSettings(rank=RANK, alpha=ALPHA, targets=("lm_head",))
    with pytest.raises(LearnerError, match="'lm_head', which names only layers that stay frozen"):
        adapted(tiny_qwen3_vl, adapter=settings, freeze_vision=False)


@pytest.mark.parametrize(
    ("family", "target"), [("tiny_qwen3_vl", "proj"), ("tiny_qwen2_5_vl", "0")]
)
def test_a_target_in_the_tower_means_its_linear_layers_and_no_others_of_that_name(
    family: str, target: str, request: pytest.FixtureRequest
) -> None:
    """A convolution is called proj too, and a whole block 0."""
    folder = request.getfixturevalue(family)
    settings = AdapterSettings(rank=RANK, alpha=ALPHA, targets=(target,))
    policy = adapted(folder, adapter=settings, freeze_vision=False)
    before = weights_of(policy)
    train(policy, folder, updates=1)
    after = weights_of(policy)
    policy.close()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    inside = "attn.proj" if target == "proj" else "merger.mlp.0"
    assert changed == {name for name in before if name.endswith(f"{inside}.weight")} != set()
    with pytest.raises(LearnerError, match=f"{target!r}, which names only layers that stay frozen"):
        adapted(folder, adapter=settings)
    with pytest.raises(LearnerError, match="'oj', which names no linear layer; wanted of "):
        adapted(folder, adapter=replace(settings, targets=("oj",)), freeze_vision=False)


def test_in_bf16_the_learner_computes_with_the_very_weights_it_hands_on(
    tiny_qwen3_vl: Path, tmp_path: Path
) -> None:
    """After a small update, most of which bf16 rounds away: beside W it would all be there."""
    change: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 2e-5, "precision": "bf16"}
    policy = adapted(tiny_qwen3_vl, zero_stage=1, **change)
    rows = some_rows(ChatFormat(tiny_qwen3_vl), policy.layout)
    name = "model.language_model.layers.0.mlp.down_proj"
    before = weights_of(policy)[f"{name}.weight"].float()
    train(policy, tiny_qwen3_vl)
    made = weights_of(policy)[f"{name}.weight"].float() - before
    wanted = policy.logprobs(join(rows))
    policy.export(tmp_path / "export")
    layer = policy.model.get_submodule(name)
    asked = (layer.scale * layer.lora_B.float() @ layer.lora_A.float()).detach()
    policy.close()
    assert (made - asked).norm() > 0.3 * asked.norm() > 0, "nothing was rounded away"
    plain = make_policy(
        tmp_path / "export", ChatFormat(tiny_qwen3_vl), zero_stage=1, precision="bf16"
    )
    found = plain.logprobs(join(rows))
    plain.close()
    assert torch.equal(found, wanted)
