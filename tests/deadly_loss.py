"""A loss that kills its process when it is told to, as an out-of-memory killer would."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tapo_train.algos.losses import LossOutput, TokenBatch, grpo


def grpo_until_killed(batch: TokenBatch, *, mark: str) -> LossOutput:
    """GRPO; where the file `mark` holds this rank's number, it goes and so does the process."""
    path = Path(mark)
    if path.exists() and path.read_text() == os.environ["RANK"]:
        path.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return grpo(batch)
