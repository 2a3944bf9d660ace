"""The sampling engine and the learner agree, token by token, while the learner learns.

This is the seam where multimodal training goes wrong silently: positions, pictures,
tied heads, stale caches.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a learner in this process leaves in the environment."""
WORKER = Path(__file__).with_name("engine_and_learner_worker.py")


@pytest.mark.parametrize("family", ["tiny_qwen3_vl", "tiny_qwen2_5_vl"])
def test_engine_and_learner_agree_before_and_after_three_updates_and_syncs(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(WORKER), str(request.getfixturevalue(family)), str(tmp_path)],
        env={name: value for name, value in os.environ.items() if name not in GROUP_VARIABLES}
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "agreed" in done.stdout, done.stdout + done.stderr[-4000:]
