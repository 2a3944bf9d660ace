"""Checkpoints: resuming, damage, pruning, export."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_rows import make_policy, some_rows, weights_of
from transformers import AutoModelForImageTextToText, AutoProcessor

from tapo_train.algos.metrics import finalise
from tapo_train.errors import CheckpointError
from tapo_train.learner import checkpoint, export, snapshot
from tapo_train.learner.batch import pack
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.manifest import Manifest, checkpoints, discard_remains, latest, prune
from tapo_train.learner.objective import supervised
from tapo_train.learner.settings import AdapterSettings
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


LORA = AdapterSettings(rank=2, alpha=4.0, targets=("q_proj",))


@pytest.mark.parametrize(
    "sharding",
    [
        {"zero_stage": 0, "precision": "fp32"},
        {"zero_stage": 0, "precision": "bf16"},
        {"zero_stage": 1, "precision": "bf16"},
        {"zero_stage": 2, "precision": "bf16", "offload_optimizer": True},
        {"zero_stage": 2, "precision": "bf16", "freeze_vision": True},
        {"zero_stage": 3, "precision": "fp32"},
        {"zero_stage": 3, "precision": "bf16", "adapter": LORA},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values())[:20],
)
def test_a_resumed_run_continues_bit_for_bit(tiny_qwen3_vl, chat, tmp_path, sharding):
    options = ADAM | sharding
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


def test_a_manifest_that_cannot_be_one_is_refused(policy, tmp_path):
    folder = checkpoint.save(policy, tmp_path, step=1, extra={})
    path = folder / "manifest.json"
    text = path.read_text()
    for content, message in (
        ("{", r"manifest\.json: no readable manifest"),
        ("[]", r"manifest\.json: no readable manifest"),
        (text.replace('"format": 2', '"format": 1'), "format is 1; wanted 2"),
        (text.replace('"step": 1', '"step": 2'), r"manifest\.json: damaged"),
        (text + " ", r"manifest\.json: damaged"),
    ):
        path.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(policy, folder)


def test_a_manifest_that_names_files_elsewhere_is_refused(policy, tmp_path):
    folder = checkpoint.save(policy, tmp_path, step=1, extra={})
    outside = tmp_path / "outside"
    outside.write_text("secret")
    manifest = Manifest.read(folder)
    digest = hashlib.sha256(b"secret").hexdigest()
    for name in ("policy/../../outside", str(outside)):
        files = {**manifest.files, name: digest}
        (folder / "manifest.json").write_text(replace(manifest, files=files).text())
        with pytest.raises(CheckpointError, match="outside its folder"):
            checkpoint.load(policy, folder)
    (folder / "policy" / "link").symlink_to(outside)
    linked = replace(manifest, files={**manifest.files, "policy/link": digest})
    (folder / "manifest.json").write_text(linked.text())
    with pytest.raises(CheckpointError, match="policy/link: missing"):
        checkpoint.load(policy, folder)


@pytest.mark.parametrize(
    ("before", "after"),
    [((0, "fp32"), (3, "fp32")), ((3, "fp32"), (1, "fp32")), ((1, "bf16"), (0, "fp32"))],
)
def test_another_sharding_goes_on_with_the_same_master_weights_and_moments(
    tiny_qwen3_vl, chat, tmp_path, before, after
):
    first = make_policy(tiny_qwen3_vl, chat, **as_options(before))
    train(first, chat, updates=2)
    folder = checkpoint.save(first, tmp_path, step=2, extra={})
    wanted, _ = first.learner_state()
    first.close()
    second = make_policy(tiny_qwen3_vl, chat, **as_options(after))
    restored = checkpoint.load(second, folder)
    found, _ = second.learner_state()
    assert wanted.keys() == found.keys()
    assert any(key.startswith("exp_avg_sq/") for key in found)
    for key, values in wanted.items():
        assert torch.equal(found[key], values), key
    (row,) = train(second, chat, updates=1)
    assert row["update/learning_rate"] == pytest.approx(1e-3 * 3 / 4)
    second.close()
    assert f"zero_stage {after[0]}, was {before[0]}" in restored.changes


def as_options(sharding):
    zero_stage, precision = sharding
    return ADAM | {"zero_stage": zero_stage, "precision": precision}


def test_the_rates_of_the_new_run_count_and_are_named(policy, tiny_qwen3_vl, chat, tmp_path):
    train(policy, chat, updates=1)
    folder = checkpoint.save(policy, tmp_path, step=1, extra={})
    changed = ADAM | {"learning_rate": 2e-3, "betas": (0.8, 0.99), "weight_decay": 0.1}
    other = make_policy(tiny_qwen3_vl, chat, **changed)
    restored = checkpoint.load(other, folder)
    assert restored.changes == [
        "learning_rate 0.002, was 0.001",
        "betas [0.8, 0.99], was [0.9, 0.999]",
        "weight_decay 0.1, was 0.0",
    ]
    (group,) = other._engine.optimizer.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.99), 0.1)
    rates = [row["update/learning_rate"] for row in train(other, chat, updates=4)]
    assert rates == pytest.approx([2e-3 * share for share in (2 / 4, 3 / 4, 1, 1)])
    other.close()


def test_other_trained_parameters_or_another_optimizer_are_refused(
    policy, tiny_qwen3_vl, chat, tmp_path
):
    folder = checkpoint.save(policy, tmp_path, step=1, extra={})
    frozen = make_policy(tiny_qwen3_vl, chat, freeze_vision=True, **ADAM)
    with pytest.raises(CheckpointError, match=r"parameter model\.visual\..*, this run none"):
        checkpoint.load(frozen, folder)
    frozen.close()
    descent = make_policy(tiny_qwen3_vl, chat, **(ADAM | {"optimizer": "sgd"}))
    with pytest.raises(CheckpointError, match="optimizer is adamw; this run has sgd"):
        checkpoint.load(descent, folder)
    descent.close()


def test_the_newest_and_the_best_checkpoints_stay(policy, tmp_path):
    scores = {1: 0.3, 2: 0.9, 3: None, 4: 0.9, 5: 0.5, 10: 0.1}
    for step, score in scores.items():
        options = {"keep_last": 2, "keep_best": 1}
        checkpoint.save(policy, tmp_path, step=step, extra={}, score=score, **options)
    assert [p.name for p in checkpoints(tmp_path)] == [f"step-{n:06d}" for n in (4, 5, 10)]
    (tmp_path / ".step-000011.partial").mkdir()
    (tmp_path / "step-000012").mkdir()
    prune(tmp_path, keep_last=1)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000010", "step-000012"]
    assert latest(tmp_path) == tmp_path / "step-000012", "damaged is not the same as not there"
    assert latest(tmp_path / "nowhere") is None
    assert prune(tmp_path, keep_last=0) == []


def test_saving_a_step_again_replaces_it(policy, tmp_path):
    checkpoint.save(policy, tmp_path, step=1, extra={"a": 1})
    folder = checkpoint.save(policy, tmp_path, step=1, extra={"a": 2})
    assert checkpoint.load(policy, folder).extra == {"a": 2}
    assert Manifest.read(folder).step == 1


def killed_at(moment, write):
    """Run `write` in a child that is killed before its n-th rename or deletion; whether it was."""
    child = os.fork()
    if child == 0:
        left = itertools.count(moment, -1)

        def stops_at(real):
            def called(*arguments, **options):
                if next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return called

        Path.rename, shutil.rmtree = stops_at(Path.rename), stops_at(shutil.rmtree)
        try:
            write()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_killed_at_any_moment_of_replacing_a_step_a_whole_checkpoint_is_there(policy, tmp_path):
    extras = [{"old": 0}, {"new": 1}]
    found = []
    for moment in itertools.count():
        root = tmp_path / str(moment)
        checkpoint.save(policy, root, step=1, extra=extras[0])
        taken = snapshot.take(policy, root, step=1, extra=extras[1])
        was_killed = killed_at(moment, partial(snapshot.write, taken))
        discard_remains(root)
        assert [path.name for path in root.iterdir()] == ["step-000001"], moment
        found.append(checkpoint.load(policy, root / "step-000001").extra)
        # And it can be replaced after all.
        checkpoint.save(policy, root, step=1, extra=extras[1])
        assert [path.name for path in root.iterdir()] == ["step-000001"], moment
        if not was_killed:
            break
    assert len(found) > 3 and found == sorted(found, key=extras.index)
    assert (found[0], found[-1]) == (extras[0], extras[1])


@pytest.mark.parametrize("family", ["tiny_qwen3_vl", "tiny_qwen2_5_vl"])
def test_an_export_is_what_transformers_would_write(request, family, tmp_path):
    source = request.getfixturevalue(family)
    policy = make_policy(source, ChatFormat(source), precision="bf16")
    policy.export(tmp_path / "ours")
    policy.model.save_pretrained(tmp_path / "theirs")
    policy.close()
    for path in (tmp_path / "theirs").iterdir():
        ours = tmp_path / "ours" / path.name
        assert ours.read_bytes() == path.read_bytes(), path.name
    assert (tmp_path / "ours" / "tokenizer.json").exists()


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


def test_an_export_takes_the_step_asked_for(policy, chat, tmp_path):
    root = tmp_path / "run" / "checkpoints"
    for step in (1, 2):
        checkpoint.save(policy, root, step=step, extra={})
        train(policy, chat, updates=1)
    for number, (folder, options, wanted) in enumerate(
        (
            (tmp_path / "run", [], "step-000002"),
            (tmp_path / "run", ["--step", "1"], "step-000001"),
            (root, ["--step", "2"], "step-000002"),
            (root / "step-000001", [], "step-000001"),
        )
    ):
        out = tmp_path / f"out{number}"
        assert export.main([str(folder), *options, "--out", str(out)]) == 0
        exported, kept = (p / "model.safetensors" for p in (out, root / wanted / "policy"))
        assert exported.read_bytes() == kept.read_bytes()
    with pytest.raises(CheckpointError, match="found step-000001, step-000002, wanted step-000003"):
        export.export(tmp_path / "run", tmp_path / "none", step=3)


def test_an_export_refuses_damage_nothing_and_an_existing_folder(policy, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        export.export(tmp_path, tmp_path / "out")
    folder = checkpoint.save(policy, tmp_path / "run", step=1, extra={})
    with pytest.raises(CheckpointError, match="exists already"):
        export.export(folder, tmp_path)
    (folder / "policy" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json: damaged"):
        export.export(folder, tmp_path / "out")
