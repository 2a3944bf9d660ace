"""Checkpoints: resuming, damage, pruning, export."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from learner_rows import make_policy, some_rows, weights_of
from transformers import AutoModelForImageTextToText, AutoProcessor

from tapo_train.algos.metrics import finalise
from tapo_train.errors import CheckpointError
from tapo_train.learner import checkpoint, export
from tapo_train.learner.batch import pack
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.manifest import Manifest, checkpoints, latest
from tapo_train.learner.objective import supervised
from tapo_train.rollout.chat import ChatFormat

ADAM = {"optimizer": "adamw", "learning_rate": 1e-3, "warmup_updates": 4, "max_grad_norm": 1.0}


@pytest.fixture(scope="module")
def chat(tiny_qwen3_vl):
    yield ChatFormat(tiny_qwen3_vl)
    end_process_group()


@pytest.fixture
def policy(tiny_qwen3_vl, chat):
    made = make_policy(tiny_qwen3_vl, chat, **ADAM)
    yield made
    made.close()


def train(policy, chat, *, updates):
    batches = pack(some_rows(chat, policy.layout), budget_tokens=60)
    return [finalise(policy.update(batches, supervised)) for _ in range(updates)]


@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")],
)
def test_a_resumed_run_continues_bit_for_bit(tiny_qwen3_vl, chat, tmp_path, zero_stage, precision):
    options = ADAM | {"zero_stage": zero_stage, "precision": precision}
    first = make_policy(tiny_qwen3_vl, chat, **options)
    train(first, chat, updates=2)
    folder = checkpoint.save(first, tmp_path, step=2, extra={"position": [1, 7]})
    drawn = (random.random(), np.random.rand(), torch.rand(1).item())
    wanted = train(first, chat, updates=2)
    second = make_policy(tiny_qwen3_vl, chat, **options)
    restored = checkpoint.load(second, folder)
    assert (restored.extra, restored.changes) == ({"position": [1, 7]}, [])
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn
    assert train(second, chat, updates=2) == wanted
    torch.testing.assert_close(weights_of(second), weights_of(first), atol=0, rtol=0)
    first.close()
    second.close()


@pytest.mark.parametrize(
    "pattern",
    [
        "policy/model.safetensors",
        "learner/rank0.safetensors",
        "random/rank0.safetensors",
        "trainer/rank0.json",
        "manifest.json",
    ],
)
def test_a_damaged_file_is_named(policy, tmp_path, pattern):
    folder = checkpoint.save(policy, tmp_path, step=1, extra={})
    (path,) = folder.glob(pattern)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{path}: damaged"):
        checkpoint.load(policy, folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path}: missing"):
        checkpoint.load(policy, folder)


def test_a_checkpoint_of_another_stage_is_refused(policy, tmp_path):
    folder = checkpoint.save(policy, tmp_path, step=1, extra={})
    path = folder / "manifest.json"
    entries = json.loads(path.read_text())
    path.write_text(json.dumps(entries | {"zero_stage": 2}))
    with pytest.raises(CheckpointError, match="zero_stage is 2; this run has 0"):
        checkpoint.load(policy, folder)
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json: no readable manifest"):
        checkpoint.load(policy, folder)


def test_only_the_newest_checkpoints_stay(policy, tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(policy, tmp_path, step=step, extra={}, keep_last=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000002", "step-000010"]
    (tmp_path / ".step-000011.partial").mkdir()
    (tmp_path / "step-000012").mkdir()
    assert latest(tmp_path) == tmp_path / "step-000010"
    assert latest(tmp_path / "nowhere") is None


def test_saving_a_step_again_replaces_it(policy, tmp_path):
    checkpoint.save(policy, tmp_path, step=1, extra={"a": 1})
    folder = checkpoint.save(policy, tmp_path, step=1, extra={"a": 2})
    assert checkpoint.load(policy, folder).extra == {"a": 2}
    assert Manifest.read(folder).step == 1


def test_an_export_loads_like_any_downloaded_model(policy, chat, tmp_path, capsys):
    train(policy, chat, updates=1)
    checkpoint.save(policy, tmp_path / "run", step=1, extra={})
    out = tmp_path / "out"
    assert export.main([str(tmp_path / "run"), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    model = AutoModelForImageTextToText.from_pretrained(out, dtype="auto")
    AutoProcessor.from_pretrained(out)
    trained = weights_of(policy)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config._attn_implementation == "sdpa"


def test_an_export_converts_the_weights_if_asked(policy, tmp_path):
    folder = checkpoint.save(policy, tmp_path / "run", step=1, extra={})
    export.export(folder, tmp_path / "half", dtype="bfloat16")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "half", dtype="auto")
    assert model.dtype == torch.bfloat16
    before, after = (
        (root / "model.safetensors").stat().st_size
        for root in (folder / "policy", tmp_path / "half")
    )
    assert after < 0.6 * before


def test_an_export_refuses_damage_nothing_and_an_existing_folder(policy, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        export.export(tmp_path, tmp_path / "out")
    folder = checkpoint.save(policy, tmp_path / "run", step=1, extra={})
    with pytest.raises(CheckpointError, match="exists already"):
        export.export(folder, tmp_path)
    (folder / "policy" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json: damaged"):
        export.export(folder, tmp_path / "out")
