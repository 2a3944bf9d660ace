"""A checkpoint is read by another number of ranks, and by another ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_rank_worker import SETTINGS, STAGES, go_on
from forked_runs import run_ranks
from learner_rows import make_policy, weights_of
from safetensors import safe_open

from tapo_train.learner import checkpoint
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.manifest import Manifest
from tapo_train.rollout.chat import ChatFormat

WORKER = Path(__file__).with_name("checkpoint_rank_worker.py")
TOLERANCE = 1e-5
"""Of a weight after three further updates in float32: sums are taken in another order."""


@pytest.mark.slow
def test_two_ranks_go_on_from_one_and_one_from_two(tiny_qwen3_vl, tmp_path):
    chat = ChatFormat(tiny_qwen3_vl)
    alone = make_policy(tiny_qwen3_vl, chat, **SETTINGS)
    go_on(alone, chat, updates=2)
    start = weights_of(alone)
    source = checkpoint.save(alone, tmp_path, step=2, extra={"rank": 0})
    go_on(alone, chat, updates=3)
    wanted = weights_of(alone)
    assert max(float((wanted[n] - start[n]).abs().max()) for n in start) > 100 * TOLERANCE

    run_ranks(2, WORKER, tiny_qwen3_vl, source, tmp_path / "two", deadline_s=240)
    go_on(alone, chat, updates=1)
    wanted_later = weights_of(alone)
    for stage in STAGES:
        folder = tmp_path / "two" / f"zero{stage}" / "step-000005"
        assert Manifest.read(folder).ranks == 2
        assert_each_rank_wrote_its_share(folder)
        restored = checkpoint.load(alone, folder)
        assert restored.extra == {"rank": 0}
        other_stage = [f"zero_stage 0, was {stage}"] if stage else []
        assert restored.changes == [*other_stage, "ranks 1, was 2"]
        torch.testing.assert_close(weights_of(alone), wanted, atol=TOLERANCE, rtol=0)
        go_on(alone, chat, updates=1)
        torch.testing.assert_close(weights_of(alone), wanted_later, atol=TOLERANCE, rtol=0)
    alone.close()
    end_process_group()


def assert_each_rank_wrote_its_share(folder):
    keys, counts = [], []
    for rank in (0, 1):
        with safe_open(folder / "learner" / f"rank{rank}.safetensors", framework="pt") as file:
            keys.append(set(file.keys()))
            counts.append(sum(file.get_tensor(key).numel() for key in keys[-1]))
    assert not keys[0] & keys[1], "written twice"
    assert max(counts) < 0.7 * sum(counts)
