"""The memory model against numbers worked out by hand, and against what autograd keeps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from learner_rows import kept_bytes, peak_allocated

from tapo_train.learner import packed_model
from tapo_train.learner.batch import TrainingRow, join
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.head import LogprobHead
from tapo_train.learner.memory import (
    Plan,
    activation_bytes,
    bucket_bytes,
    bytes_per_patch,
    gathered_bytes,
    gradient_bytes,
    head_bytes,
    kept_bytes_per_token,
    longest_trajectory,
    peak_bytes,
    pixel_bytes,
    scored_head_bytes,
    state_bytes,
    working_bytes_per_token,
)
from tapo_train.learner.objective import supervised
from tapo_train.learner.policy import Policy
from tapo_train.learner.settings import LearnerSettings
from tapo_train.learner.shape import QWEN3_VL_4B, QWEN3_VL_8B, ModelShape
from tapo_train.types import Span


def test_published_sizes_are_met():
    assert QWEN3_VL_4B.weights == pytest.approx(4.44e9, rel=2e-3)
    assert QWEN3_VL_8B.weights == pytest.approx(8.77e9, rel=2e-3)


def test_states_of_the_4b_model_by_stage():
    n = 4_437_245_952
    expected = {
        (0, 1): 16 * n,
        (1, 8): 2 * n + 4 * n + 12 * n / 8,
        (2, 8): 2 * n + 16 * n / 8,
        (3, 8): 18 * n / 8,
    }
    for (stage, ranks), wanted in expected.items():
        assert state_bytes(QWEN3_VL_4B, Plan(zero_stage=stage, num_ranks=ranks)) == wanted
    assert state_bytes(QWEN3_VL_4B, Plan(offload_optimizer=True)) == 6 * n
    assert state_bytes(QWEN3_VL_4B, Plan(zero_stage=0, precision="fp32")) == 16 * n
    frozen = 2 * n + 16 * 4_022_272_000
    assert state_bytes(QWEN3_VL_4B, Plan(freeze_vision=True)) == frozen


def test_bytes_per_token_of_the_4b_model():
    layer = 16 * 2560 + 8 * 9728 + 10 * 4096 + 10 * 1024
    kept, gradients = 36 * 2 * 2560 + 6 * 2560, 2 * 2 * 9728
    assert kept_bytes_per_token(QWEN3_VL_4B, Plan()) == kept
    assert working_bytes_per_token(QWEN3_VL_4B, Plan()) == layer + gradients
    free = Plan(gradient_checkpointing=False)
    assert kept_bytes_per_token(QWEN3_VL_4B, free) == 36 * layer + 6 * 2560
    assert working_bytes_per_token(QWEN3_VL_4B, free) == gradients
    assert bytes_per_patch(QWEN3_VL_4B, free) == 24 * (22 * 1024 + 4 * 4096)
    assert bytes_per_patch(QWEN3_VL_4B, Plan(freeze_vision=True)) == 0
    assert pixel_bytes(QWEN3_VL_4B, Plan()) == 1536 * 6 + 4 * 2560 * 2 / 4
    shared = Plan(num_ranks=8, sequence_parallel=4)
    assert kept_bytes_per_token(QWEN3_VL_4B, shared) == kept / 4
    assert working_bytes_per_token(QWEN3_VL_4B, shared) == (layer + gradients) / 4
    assert bytes_per_patch(QWEN3_VL_4B, shared) == bytes_per_patch(QWEN3_VL_4B, Plan())
    assert state_bytes(QWEN3_VL_4B, shared) == state_bytes(QWEN3_VL_4B, Plan(num_ranks=8))


def test_adapters_have_gradients_and_states_and_the_weights_none():
    plan = Plan(zero_stage=2, adapter_weights=10_000_000)
    assert state_bytes(QWEN3_VL_4B, plan) == 2 * 4_437_245_952 + 16 * 10_000_000


def test_sharded_weights_are_whole_as_far_as_they_are_asked_to_and_the_head_besides():
    head, sharded = 151_936 * 4096, Plan(zero_stage=3, num_ranks=8, live_elements=10**8)
    assert gathered_bytes(QWEN3_VL_8B, sharded) == 2 * (10**8 + head + head)
    assert gathered_bytes(QWEN3_VL_8B, Plan(zero_stage=2)) == 0
    everything = replace(sharded, live_elements=10**11)
    assert gathered_bytes(QWEN3_VL_8B, everything) == 2 * (QWEN3_VL_8B.weights + head)
    assert state_bytes(QWEN3_VL_8B, replace(sharded, offload_parameters=True)) == (
        16 * QWEN3_VL_8B.weights / 8
    )


def test_the_head_takes_its_chunk_of_logits_and_its_gradient():
    chunk, head = 2048 * 151_936, 151_936 * 2560
    assert head_bytes(QWEN3_VL_4B, Plan()) == 10 * chunk + 6 * head
    assert head_bytes(QWEN3_VL_4B, Plan(with_entropy=True)) == 18 * chunk + 6 * head
    assert head_bytes(QWEN3_VL_4B, Plan(precision="fp32")) == 8 * chunk + 8 * head


def test_the_longest_trajectory_fills_the_device_and_not_a_token_more_fits():
    for plan in (Plan(), Plan(zero_stage=3, num_ranks=8), Plan(head_chunk_tokens=8192)):
        longest = longest_trajectory(QWEN3_VL_4B, plan, device_bytes=141e9)
        assert peak_bytes(QWEN3_VL_4B, plan, tokens=longest) <= 0.95 * 141e9
        assert peak_bytes(QWEN3_VL_4B, plan, tokens=longest + 1) > 0.95 * 141e9
    assert longest_trajectory(QWEN3_VL_8B, Plan(), device_bytes=141e9) == 0
    pictured = longest_trajectory(QWEN3_VL_4B, Plan(), device_bytes=141e9, picture_share=0.5)
    assert pictured < longest_trajectory(QWEN3_VL_4B, Plan(), device_bytes=141e9)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_token_keeps_in_the_layers_what_the_model_says(tiny_qwen3_vl, precision, checkpointing):
    settings = LearnerSettings(precision=precision, gradient_checkpointing=checkpointing)
    model = packed_model.load(tiny_qwen3_vl, settings=settings, device=torch.device("cpu"))
    model.train()
    kept = (kept_bytes(model, 768) - kept_bytes(model, 256)) / 512
    shape = ModelShape.of(model.config)
    plan = Plan(precision=precision, gradient_checkpointing=checkpointing)
    assert kept == pytest.approx(kept_bytes_per_token(shape, plan), rel=0.04)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_an_update_takes_what_was_planned(tiny_qwen3_vl, zero_stage):
    sizes = {"head_chunk_tokens": 32, "bucket_elements": 100_000, "live_elements": 1}
    settings = LearnerSettings(
        zero_stage=zero_stage, gradient_checkpointing=True, freeze_vision=True, **sizes
    )
    tokens = 512
    row = TrainingRow.supervised(
        id="r",
        tokens=np.full(tokens, 300, dtype=np.int32),
        images=(),
        spans=(Span(start=tokens - 96, end=tokens),),
    )
    policy = Policy(
        tiny_qwen3_vl, settings=settings, pixels=lambda images: {}, measure_entropy=False
    )
    batches = [join([row])] * 2
    policy.update(batches, supervised)
    found = peak_allocated(lambda: policy.update(batches, supervised))
    shape = ModelShape.of(policy.model.config)
    plan = Plan(zero_stage=zero_stage, freeze_vision=True, **sizes)
    kept, at_work = activation_bytes(shape, plan, tokens=tokens)
    wanted = kept + max(at_work, head_bytes(shape, plan))
    if zero_stage == 2:
        wanted += gradient_bytes(shape, plan)  # with ZeRO-3 they stay between two updates
    wanted += gathered_bytes(shape, plan)
    policy.close()
    end_process_group()
    resting = state_bytes(shape, plan) + bucket_bytes(shape, plan)
    if zero_stage == 2:
        resting -= gradient_bytes(shape, plan)
    assert found + resting == pytest.approx(wanted + resting, rel=0.1)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_logits_of_the_head_take_what_was_planned(precision, with_entropy):
    vocabulary, hidden, chunk = 50_000, 16, 64
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    head = LogprobHead.around(torch.nn.Linear(hidden, vocabulary, bias=False, dtype=kind))
    rows = torch.randn(3 * chunk, hidden, dtype=kind, requires_grad=True)
    targets = torch.randint(5, vocabulary, (len(rows),))
    held: list[torch.Tensor] = []

    def forward() -> None:
        asked = {"temperature": 0.9, "banned": torch.tensor([3]), "chunk": chunk}
        held.append(head(rows, targets, with_entropy=with_entropy, **asked))

    shape = replace(QWEN3_VL_8B, vocabulary=vocabulary, hidden=hidden)
    plan = Plan(precision=precision, with_entropy=with_entropy, head_chunk_tokens=chunk)
    forward_bytes = vocabulary * chunk * 20 if with_entropy else scored_head_bytes(shape, plan)
    assert peak_allocated(forward) == pytest.approx(forward_bytes, rel=0.1)
    backward = peak_allocated(lambda: held[0].sum().backward())
    # The head's gradient is next to nothing here: 16 hidden numbers for each entry.
    highest = max(forward_bytes, backward)
    assert highest == pytest.approx(head_bytes(shape, plan), rel=0.1)
