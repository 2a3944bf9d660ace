"""The memory model against numbers worked out by hand, and against what autograd keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from learner_rows import kept_bytes

from tapo_train.learner import packed_model
from tapo_train.learner.memory import (
    Plan,
    bytes_per_patch,
    bytes_per_token,
    head_bytes,
    longest_trajectory,
    peak_bytes,
    state_bytes,
)
from tapo_train.learner.settings import LearnerSettings
from tapo_train.learner.shape import QWEN3_VL_4B, QWEN3_VL_8B, ModelShape


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
    rest = 2 * 2 * 9728 + 6 * 2560
    assert bytes_per_token(QWEN3_VL_4B, Plan()) == 36 * 2 * 2560 + layer + rest
    free = Plan(gradient_checkpointing=False)
    assert bytes_per_token(QWEN3_VL_4B, free) == 36 * layer + rest
    assert bytes_per_patch(QWEN3_VL_4B, free) == 24 * (22 * 1024 + 4 * 4096)
    assert bytes_per_patch(QWEN3_VL_4B, Plan(freeze_vision=True)) == 0
    shared = Plan(num_ranks=8, sequence_parallel=4)
    assert bytes_per_token(QWEN3_VL_4B, shared) == (36 * 2 * 2560 + layer + rest) / 4
    assert bytes_per_patch(QWEN3_VL_4B, shared) == bytes_per_patch(QWEN3_VL_4B, Plan())
    assert state_bytes(QWEN3_VL_4B, shared) == state_bytes(QWEN3_VL_4B, Plan(num_ranks=8))


def test_the_longest_trajectory_fills_the_device_and_not_a_token_more_fits():
    plan = Plan()
    longest = longest_trajectory(QWEN3_VL_4B, plan, device_bytes=141e9)
    assert peak_bytes(QWEN3_VL_4B, plan, tokens=longest) <= 0.95 * 141e9
    assert peak_bytes(QWEN3_VL_4B, plan, tokens=longest + 1) > 0.95 * 141e9
    assert longest_trajectory(QWEN3_VL_8B, plan, device_bytes=141e9) == 0
    assert head_bytes(QWEN3_VL_4B, plan) == 2048 * 151_936 * 14 + 4 * 151_936 * 2560
    pictured = longest_trajectory(QWEN3_VL_4B, plan, device_bytes=141e9, picture_share=0.5)
    assert pictured < longest


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_token_keeps_in_the_layers_what_the_model_says(tiny_qwen3_vl, precision, checkpointing):
    settings = LearnerSettings(precision=precision, gradient_checkpointing=checkpointing)
    model = packed_model.load(tiny_qwen3_vl, settings=settings, device=torch.device("cpu"))
    model.train()
    kept = (kept_bytes(model, 768) - kept_bytes(model, 256)) / 512
    shape = ModelShape.of(model.config)
    plan = Plan(precision=precision, gradient_checkpointing=checkpointing)
    # What exists in the backward pass alone is not kept: gradients, one layer made again.
    transient = bytes_per_token(replace(shape, layers=0), plan)
    outside = {"bf16": 6, "fp32": 8}[precision] * shape.hidden
    wanted = bytes_per_token(shape, plan) - transient + outside
    assert kept == pytest.approx(wanted, rel=0.04)
