"""Two ranks go on from a checkpoint of one, under several ZeRO stages.

    torchrun --nproc-per-node 2 checkpoint_rank_worker.py MODEL CHECKPOINT OUT

After the updates each stage writes a checkpoint of its own below OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path

from learner_rows import make_policy, some_rows

from tapo_train.learner import checkpoint, distributed
from tapo_train.learner.batch import pack
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.objective import supervised
from tapo_train.learner.policy import Policy
from tapo_train.rollout.chat import ChatFormat

STAGES = (0, 2, 3)
SETTINGS = {
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "eps": 1e-5,
    "warmup_updates": 3,
    "max_grad_norm": 1.0,
}
"""eps well above rounding: Adam would blow the noise of gradients that are zero up to full
steps, and no two orders of summation would agree."""


def go_on(policy: Policy, chat: ChatFormat, *, updates: int) -> None:
    """Updates on all rows, every second one to each rank if there are two."""
    rows = some_rows(chat, policy.layout)[distributed.rank() :: distributed.world_size()]
    for _ in range(updates):
        policy.update(pack(rows, budget_tokens=60), supervised)


def main(model: Path, source: Path, out: Path) -> None:
    chat = ChatFormat(model)
    for stage in STAGES:
        policy = make_policy(model, chat, zero_stage=stage, **SETTINGS)
        restored = checkpoint.load(policy, source)
        assert restored.extra == {"rank": 0}, restored
        go_on(policy, chat, updates=3)
        rank = distributed.rank()
        checkpoint.save(policy, out / f"zero{stage}", step=5, extra={"rank": rank})
        policy.close()
    end_process_group()


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
