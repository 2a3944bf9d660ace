"""One rank of the two-process test: SGD updates under several ZeRO stages, of several models.

    torchrun --nproc-per-node 2 learner_rank_worker.py OUT MODEL...

The first model is saved and loaded under every stage as well. Rank 0 gets three rows and the most
micro-batches, rank 1 one row without a picture, then none at all. Rank 0 writes losses and weights.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

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
SHARDED = {"zero_stage": 3, "persistent_elements": 0, "live_elements": 1}
"""Of the models after the first: every weight is gathered where it is used, so that a rank that
leaves one out hangs. A tiny model would not be divided otherwise."""

Outcome = tuple[list[float], dict[str, torch.Tensor]]


def rows_of_rank(rows: list[TrainingRow], rank: int, *, update: int) -> list[TrainingRow]:
    """Rank 1's share: the row without pictures in update 0, nothing in update 1."""
    mine = [rows[1]] if update == 0 else []
    return mine if rank == 1 else [row for row in rows if row not in mine]


def two_updates(policy: Policy, chat: ChatFormat, shares: list[list[TrainingRow]]) -> list[float]:
    """Losses of an update per share of rows."""
    losses = []
    for share in shares:
        budget_tokens = 40 if chat.family.packs else 1
        batches = policy.with_old_logprobs(pack(share, budget_tokens=budget_tokens))
        metrics = policy.update(batches, policy_gradient(grpo), aggregation="seq-mean-token-mean")
        losses.append(finalise(metrics)["update/loss"])
    return losses


def on_this_rank(model: Path, saved: Path | None, **settings: Any) -> Outcome:
    """Losses of two updates, and the weights after them."""
    chat = ChatFormat(model)
    policy = make_policy(model, chat, learning_rate=0.1, **settings)
    rows, rank = some_rows(chat, policy.layout), distributed.rank()
    losses = two_updates(policy, chat, [rows_of_rank(rows, rank, update=u) for u in (0, 1)])
    weights = weights_of(policy)
    if saved is not None:
        folder = checkpoint.save(policy, saved, step=1, extra={}, keep_last=1)
        checkpoint.load(policy, folder)
    policy.close()
    return losses, weights


def main(out: Path, *models: Path) -> None:
    """Everything, one after the other."""
    first, *others = models
    results = {
        f"{first.name} {stage}": on_this_rank(first, out / f"zero{stage}", zero_stage=stage)
        for stage in STAGES
    }
    results |= {model.name: on_this_rank(model, None, **SHARDED) for model in others}
    if distributed.rank() == 0:
        torch.save(results, out / "results.pt")
    end_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
