"""Two ranks do what one does, also when one of them has no picture, or nothing at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from learner_rank_worker import STAGES, two_updates
from learner_rows import make_policy, some_rows, weights_of

from tapo_train.learner.engine import end_process_group
from tapo_train.rollout.chat import ChatFormat

WORKER = Path(__file__).with_name("learner_rank_worker.py")
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-6
DEADLINE_S = 150


@pytest.mark.slow
def test_two_ranks_update_like_one_under_every_sharding(tiny_qwen3_vl, tmp_path):
    run_two_ranks(tiny_qwen3_vl, tmp_path)
    found = torch.load(tmp_path / "results.pt", weights_only=True)
    chat = ChatFormat(tiny_qwen3_vl)
    policy = make_policy(tiny_qwen3_vl, chat, learning_rate=0.1)
    rows = some_rows(chat, policy.layout)
    wanted_losses = two_updates(policy, chat, [rows, rows])
    wanted_weights = weights_of(policy)
    policy.close()
    end_process_group()
    assert set(found) == set(STAGES)
    for losses, weights in found.values():
        assert losses == pytest.approx(wanted_losses, abs=LOSS_TOLERANCE)
        torch.testing.assert_close(weights, wanted_weights, atol=WEIGHT_TOLERANCE, rtol=0)


def run_two_ranks(model: Path, out: Path) -> None:
    """The worker under torchrun, in a process group of its own so that a hang can be ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--standalone", str(WORKER), str(model), str(out)]
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent)}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output
