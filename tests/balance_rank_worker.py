"""One rank of the three-process test: rank 0 brings six rows, rank 1 two, rank 2 none.

torchrun --nproc-per-node 3 balance_rank_worker.py MODEL OUT
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from learner_rows import make_policy, some_rows, weights_of

from tapo_train.algos.metrics import finalise
from tapo_train.learner import balance, distributed
from tapo_train.learner.batch import join
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.objective import supervised
from tapo_train.learner.shape import ModelShape
from tapo_train.rollout.chat import ChatFormat


def main(model: Path, out: Path) -> None:
    chat = ChatFormat(model)
    policy = make_policy(model, chat, learning_rate=0.1)
    rank = distributed.rank()
    four = some_rows(chat, policy.layout)
    rows = [replace(row, id=f"{row.id}-{copy}") for copy in "ab" for row in four]
    brought = {0: rows[:6], 1: rows[6:], 2: []}[rank]
    cost = balance.RowCost(
        shape=ModelShape.of(policy.model.config), image_token_id=policy.layout.image_token_id
    )
    mine, evenness = balance.Balanced(cost=cost, budget_tokens=60)(brought)
    learned = finalise(policy.update([join(together) for together in mine], supervised))
    evenness = finalise(evenness)
    result = {
        "rows": [
            (row.id, [image.sha256 for image in row.images])
            for together in mine
            for row in together
        ],
        "batches": [sum(len(row.tokens) for row in together) for together in mine],
        "sampled": evenness["balance/sampled"],
        "trained": evenness["balance/trained"],
        "loss": learned["update/loss"],
        "weights": weights_of(policy),
    }
    torch.save(result, out / f"{rank}.pt")
    policy.close()
    end_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
