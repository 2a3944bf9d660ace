"""The checkpoints of a run: written beside the training, refused or passed over when damaged."""

from __future__ import annotations

import shutil
import threading
import time

import pytest
import torch
from learner_rows import make_policy, weights_of
from test_learner_checkpoint import ADAM, train

from tapo_train.errors import CheckpointError
from tapo_train.learner import checkpoint, durable, snapshot
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.manifest import checkpoints
from tapo_train.rollout.chat import ChatFormat
from tapo_train.training.resume import CheckpointFolder


@pytest.fixture(scope="module")
def chat(tiny_qwen3_vl):
    yield ChatFormat(tiny_qwen3_vl)
    end_process_group()


@pytest.fixture(scope="module")
def policy(tiny_qwen3_vl, chat):
    made = make_policy(tiny_qwen3_vl, chat, **ADAM)
    yield made
    made.close()


def folder_of(policy, root, **options):
    return CheckpointFolder(root, policy, **({"keep_last": 2} | options))


def test_what_is_written_is_the_state_when_it_was_asked_for(policy, chat, tmp_path, monkeypatch):
    """Training goes on before the first byte is written."""
    may_write, write = threading.Event(), durable.write_tensors
    monkeypatch.setattr(
        durable, "write_tensors", lambda *a, **k: may_write.wait(60) and write(*a, **k)
    )
    train(policy, chat, updates=1)
    wanted = weights_of(policy)
    ours = folder_of(policy, tmp_path, texts={"policy/recipe.yaml": "a: 1"})
    ours.save(0, {"position": 7}, 0.5)
    train(policy, chat, updates=2)
    assert checkpoints(tmp_path) == []
    may_write.set()
    ours.wait()
    (folder,) = checkpoints(tmp_path)
    assert folder.name == "step-000001"
    assert (folder / "policy" / "recipe.yaml").read_text() == "a: 1"
    assert checkpoint.check(folder).score == 0.5
    assert ours.load_latest() == {"position": 7}
    torch.testing.assert_close(weights_of(policy), wanted, atol=0, rtol=0)


def test_a_write_that_fails_is_raised_by_the_next_call(policy, tmp_path):
    folder_of(policy, tmp_path).save(0, {})
    ours = folder_of(policy, tmp_path, texts={"policy": "a file where a folder is"})
    ours.save(1, {})
    with pytest.raises(IsADirectoryError):
        ours.wait()
    assert not ours.has_failed, "raised once"
    ours.save(1, {})
    while not ours.has_failed:
        time.sleep(0.01)
    with pytest.raises(IsADirectoryError):
        ours.save(2, {})
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000001"]


def test_rank_0_does_not_wait_for_a_rank_that_failed(policy, tmp_path):
    taken = snapshot.take(policy, tmp_path, step=1, extra={})
    (taken.partial / ".failed.rank1").touch()
    object.__setattr__(taken, "ranks", 2)
    with pytest.raises(CheckpointError, match=r"rank 1 has not written .*\.failed\.rank1"):
        snapshot.write(taken)


def damaged_in_every_way(path):
    """Contents of a file that is not what it was: flipped, cut short, longer, gone."""
    content = path.read_bytes()
    for place in (0, len(content) // 2, len(content) - 1):
        yield content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    yield from (content[:-1], content[: len(content) // 2], b"", content + b"\0", None)


def test_damage_to_any_file_is_named_and_passed_over_only_when_asked(policy, chat, tmp_path):
    ours = folder_of(policy, tmp_path)
    ours.save(0, {"step": 0})
    train(policy, chat, updates=1)
    ours.save(1, {"step": 1})
    ours.wait()
    (newest,) = (path for path in checkpoints(tmp_path) if path.name == "step-000002")
    names = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert len(names) > 8
    for name in names:
        path = newest / name
        content = path.read_bytes()
        for damaged in damaged_in_every_way(path):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=f"{path}: .*previous_good") as caught:
                ours.load_latest()
            assert str(caught.value).count(str(tmp_path)) <= 2, "one file was damaged"
            path.write_bytes(content)
    assert ours.load_latest() == {"step": 1}, "all is well again"
    (newest / "learner" / "rank0.safetensors").unlink()
    forgiving = folder_of(policy, tmp_path, previous_good=True)
    assert forgiving.load_latest() == {"step": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "damaged-step-000002",
        "step-000001",
    ]
    assert forgiving.load_latest() == {"step": 0}
    (tmp_path / "step-000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-000001/manifest\.json: missing"):
        forgiving.load_latest()


def test_nothing_saved_is_nothing_to_resume_and_remains_are_cleared_away(policy, tmp_path):
    ours = folder_of(policy, tmp_path / "checkpoints")
    assert ours.load_latest() is None
    for name in (".step-000003.partial", ".step-000001.deleted"):
        (tmp_path / "checkpoints" / name / "policy").mkdir(parents=True)
    assert ours.load_latest() is None
    assert list((tmp_path / "checkpoints").iterdir()) == []
    shutil.rmtree(tmp_path / "checkpoints")
