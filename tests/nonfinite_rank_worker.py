"""One rank of the two-process test: updates in which rank 1 alone meets what is not finite.

    torchrun --nproc-per-node 2 nonfinite_rank_worker.py MODEL OUT

Each rank writes metrics, weights and its share of the learner's state, after healthy updates
alone and after the same with broken ones between them.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from learner_rows import make_policy, some_rows, weights_of
from torch import Tensor

from tapo_train.algos.metrics import finalise
from tapo_train.learner import distributed
from tapo_train.learner.batch import MicroBatch, join
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.nonfinite import NonFiniteGuard
from tapo_train.learner.objective import Objective, supervised
from tapo_train.rollout.chat import ChatFormat

SHARDED = {"persistent_elements": 0, "live_elements": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    f"{precision}, zero {stage}": {"precision": precision, "zero_stage": stage}
    | (SHARDED if stage == 3 else {})
    for precision, stage in (("fp32", 0), ("fp32", 1), ("fp32", 3), ("bf16", 1), ("bf16", 3))
}
ADAM = {"optimizer": "adamw", "learning_rate": 1e-3, "warmup_updates": 5, "max_grad_norm": 1.0}
BROKEN_ROW = "row-3"
"""In rank 1's second micro-batch."""


def broken(kind: str) -> Objective:
    """The supervised objective, but for one micro-batch of one rank."""

    def objective(batch: MicroBatch, logprobs: Tensor, entropy: Tensor | None) -> Any:
        output = supervised(batch, logprobs, entropy)
        if BROKEN_ROW not in batch.row_ids:
            return output
        # The second one is a loss of zero with a gradient that is no number.
        value = logprobs * torch.nan if kind == "loss" else (logprobs * 0).sqrt() * 0
        return replace(output, per_token=value)

    return objective


def outcome(model: Path, dumps: Path, settings: dict[str, Any], *, kinds: str) -> Any:
    """Metrics of each update, weights and state after them, on this rank."""
    chat = ChatFormat(model)
    policy = make_policy(model, chat, **ADAM, **settings)
    rows, rank = some_rows(chat, policy.layout), distributed.rank()
    batches = [join([row]) for row in (rows[:2] if rank == 0 else rows[2:])]
    guard = NonFiniteGuard(dumps, rank=rank, skip=True)
    learned = []
    for number, kind in enumerate(kinds.split()):
        objective = supervised if kind == "healthy" else broken(kind)
        update = partial(policy.update, batches, objective)
        learned.append(finalise(guard(update, batches, name=str(number))))
    answer = learned, weights_of(policy), policy.learner_state()[0]
    policy.close()
    return answer


def main(model: Path, out: Path) -> None:
    results = {
        name: [
            outcome(model, out / name, settings, kinds="healthy healthy"),
            outcome(model, out / name, settings, kinds="loss healthy gradient healthy"),
        ]
        for name, settings in VARIANTS.items()
    }
    torch.save(results, out / f"rank{distributed.rank()}.pt")
    end_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
