"""The sampling engine and the learner agree, token by token, while the learner learns.

This is the seam where multimodal training goes wrong silently: positions, pictures,
tied heads, stale caches.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from process_environment import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

WORKER = Path(__file__).with_name("engine_and_learner_worker.py")


@pytest.mark.parametrize(
    ("family", "trained"),
    [("tiny_qwen3_vl", "full"), ("tiny_qwen2_5_vl", "full"), ("tiny_qwen3_vl", "adapter")],
)
def test_engine_and_learner_agree_before_and_after_three_updates_and_syncs(
    family: str, trained: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(WORKER), str(request.getfixturevalue(family)), str(tmp_path), trained],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "agreed" in done.stdout, done.stdout + done.stderr[-4000:]


def test_streamed_and_refilled_groups_are_trained_once_with_the_log_probs_of_their_weights(
    tiny_qwen3_vl: Path, tmp_path: Path
) -> None:
    worker = WORKER.with_name("rounds_engine_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(tiny_qwen3_vl), str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "aligned" in done.stdout, done.stdout + done.stderr[-4000:]
