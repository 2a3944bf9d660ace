"""Weights leave a sharded learner layer by layer, bit for bit; a sharded learner loads so too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from learner_rows import make_policy, some_rows
from transformers import AutoModelForImageTextToText

from tapo_train.learner import packed_model, weights
from tapo_train.learner.batch import pack
from tapo_train.learner.engine import end_process_group, full_size
from tapo_train.learner.objective import supervised
from tapo_train.learner.settings import AdapterSettings, LearnerSettings
from tapo_train.rollout.chat import ChatFormat

ADAPTER = AdapterSettings(rank=4, alpha=8.0, targets=("q_proj", "down_proj"))
SHARDED = {"zero_stage": 3, "persistent_elements": 0, "live_elements": 1}


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    yield
    end_process_group()


def saved(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    named = {name: p.detach() for name, p in model.named_parameters()}
    return named | {"lm_head.weight": model.lm_head.weight.detach()}


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["full", "adapters"])
@pytest.mark.parametrize("bucket", [1, 10**8])
@pytest.mark.parametrize("family", ["tiny_qwen3_vl", "tiny_qwen2_5_vl"])
def test_never_more_than_a_layer_is_whole_while_every_weight_leaves_as_it_is(
    family: str,
    bucket: int,
    adapter: AdapterSettings | None,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = request.getfixturevalue(family)
    monkeypatch.setattr(weights, "GATHER_ELEMENTS", bucket)
    policy = make_policy(folder, ChatFormat(folder), adapter=adapter, freeze_vision=True, **SHARDED)
    wanted = saved(folder)
    largest = max(layer_sizes(policy.model).values())
    seen = 0
    for name, tensor in policy.named_weights():
        assert torch.equal(tensor, wanted.pop(name)), name
        whole = [n for n, p in policy.model.named_parameters() if p.numel()]
        layers = {weights.layer_of(weights._owner(n)) for n in whole}
        assert len(layers) == 1
        seen = max(seen, sum(p.numel() for p in policy.model.parameters()))
    after = sum(p.numel() for p in policy.model.parameters())
    policy.close()
    assert not wanted and after == 0
    assert seen == largest if bucket == 10**8 else 0 < seen <= largest


def layer_sizes(model: torch.nn.Module) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        layer = weights.layer_of(weights._owner(name))
        sizes[layer] = sizes.get(layer, 0) + full_size(parameter)
    return sizes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["tiny_qwen3_vl", "tiny_qwen2_5_vl"])
def test_a_sharded_model_is_never_whole_on_a_rank_and_learns_as_a_replicated_one(
    family: str, precision: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    chat = ChatFormat(folder)
    policies = [
        make_policy(folder, chat, precision=precision, learning_rate=0.1, **settings)
        for settings in ({"zero_stage": 2}, SHARDED)
    ]
    loaded = packed_model.load(
        folder,
        settings=LearnerSettings(precision="fp32", **SHARDED),
        device=policies[0].device,
    )
    assert not any(p.numel() for p in loaded.parameters()), "not even before the engine starts"
    updated = []
    for policy in policies:
        policy.update(pack(some_rows(chat, policy.layout), budget_tokens=60), supervised)
        updated.append({name: tensor.clone() for name, tensor in policy.named_weights()})
        policy.close()
    torch.testing.assert_close(updated[1], updated[0], atol=1e-6, rtol=0)
