"""One rank of the two-process test: SGD updates under several ZeRO stages.

    torchrun --nproc-per-node 2 learner_rank_worker.py MODEL OUT

Rank 0 gets three rows and the most micro-batches, rank 1 one row without a picture, then
none at all. Rank 0 writes losses and weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from learner_rows import make_policy, some_rows, weights_of

from tapo_train.algos.losses import grpo
from tapo_train.algos.metrics import finalise
from tapo_train.learner import checkpoint, distributed
from tapo_train.learner.batch import TrainingRow, pack
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.objective import policy_gradient
from tapo_train.learner.policy import Policy
from tapo_train.rollout.chat import ChatFormat

STAGES = (0, 2, 3)


def rows_of_rank(rows: list[TrainingRow], rank: int, *, update: int) -> list[TrainingRow]:
    """Rank 1's share: the row without pictures in update 0, nothing in update 1."""
    mine = [rows[1]] if update == 0 else []
    return mine if rank == 1 else [row for row in rows if row not in mine]


def two_updates(policy: Policy, chat: ChatFormat, shares: list[list[TrainingRow]]) -> list[float]:
    """Losses of an update per share of rows."""
    losses = []
    for share in shares:
        batches = policy.with_old_logprobs(pack(share, budget_tokens=40))
        metrics = policy.update(batches, policy_gradient(grpo), aggregation="seq-mean-token-mean")
        losses.append(finalise(metrics)["update/loss"])
    return losses


def main(model: Path, out: Path) -> None:
    chat = ChatFormat(model)
    results = {}
    for stage in STAGES:
        policy = make_policy(model, chat, zero_stage=stage, learning_rate=0.1)
        rows = some_rows(chat, policy.layout)
        rank = distributed.rank()
        shares = [rows_of_rank(rows, rank, update=u) for u in (0, 1)]
        losses = two_updates(policy, chat, shares)
        weights = weights_of(policy)
        folder = checkpoint.save(policy, out / f"zero{stage}", step=1, extra={}, keep_last=1)
        checkpoint.load(policy, folder)
        results[stage] = (losses, weights)
        policy.close()
    if distributed.rank() == 0:
        torch.save(results, out / "results.pt")
    end_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
