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

FOLDER = Path(__file__).parent


def said(worker: str, policy: Path, work: Path) -> str:
    """What the worker printed."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / worker), str(policy), str(work)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def one_engine(tiny_qwen3_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What was shown with one engine, which takes long to start."""
    return said("rounds_engine_worker.py", tiny_qwen3_vl, tmp_path_factory.mktemp("rounds"))


@pytest.mark.parametrize("trained", ["full", "adapter"])
def test_engine_and_learner_agree_before_and_after_three_updates_and_syncs(
    trained: str, one_engine: str
) -> None:
    assert f"{trained}: agreed" in one_engine


def test_engine_and_learner_agree_on_qwen2_5_vl(tiny_qwen2_5_vl: Path, tmp_path: Path) -> None:
    assert "full: agreed" in said("engine_and_learner_worker.py", tiny_qwen2_5_vl, tmp_path)


def test_streamed_and_refilled_groups_are_trained_once_with_the_log_probs_of_their_weights(
    one_engine: str,
) -> None:
    assert "aligned" in one_engine
