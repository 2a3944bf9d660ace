"""One rank of the four-process test: three SGD updates under every ZeRO stage, with a KL penalty.

    torchrun --nproc-per-node 4 learner_equality_worker.py MODEL OUT

The ranks get different numbers of rows and pictures, some none at all. Rank 0 writes losses,
gradient norms and weights.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from learner_rows import make_policy, some_rows, weights_of

from tapo_train.algos.losses import grpo
from tapo_train.algos.metrics import finalise
from tapo_train.learner import distributed
from tapo_train.learner.batch import TrainingRow, pack
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.objective import policy_gradient
from tapo_train.learner.reference import AdapterFree, FrozenReference
from tapo_train.learner.settings import AdapterSettings
from tapo_train.rollout.chat import ChatFormat

# Without these two a tiny model is never sharded, and what hangs with a large one does not here.
SHARDED = {"zero_stage": 3, "persistent_elements": 0, "live_elements": 1}
ADAPTER = AdapterSettings(rank=4, alpha=8.0, targets=("q_proj", "down_proj"))
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero 0": (60, {"zero_stage": 0}),
    "zero 1": (10_000, {"zero_stage": 1, "offload_optimizer": True}),
    "zero 2": (1, {"zero_stage": 2}),
    "zero 3": (60, SHARDED),
    "zero 3 offloaded": (
        10_000,
        SHARDED | {"offload_optimizer": True, "offload_parameters": True},
    ),
}
ADAPTED: dict[str, tuple[int, dict[str, Any]]] = {
    "adapters, zero 2": (60, {"zero_stage": 2, "adapter": ADAPTER}),
    "adapters, zero 3": (1, SHARDED | {"adapter": ADAPTER}),
}
"""Name -> [tokens] in a micro-batch, settings."""

SHARES = (
    ((0,), (1,), (2,), (3,)),
    ((0, 1, 3), (), (2,), ()),
    ((), (2,), (0, 3), (1,)),
)
"""Rows of each rank in each update; row 1 has no picture."""

Outcome = tuple[list[tuple[float, float]], dict[str, torch.Tensor]]


def outcome(model: Path, budget: int, settings: dict[str, Any]) -> Outcome:
    """(loss, gradient norm) of three updates, and the weights after them."""
    chat = ChatFormat(model)
    policy = make_policy(model, chat, learning_rate=0.05, **settings)
    reference = (
        AdapterFree(policy)
        if policy.settings.adapter
        else FrozenReference(
            model,
            settings=policy.settings,
            pixels=chat.pixels,
            device=policy.device,
            distribution=policy.distribution,
        )
    )
    rows = some_rows(chat, policy.layout)
    objective = policy_gradient(grpo, kl_kind="k3+", kl_coefficient=0.5)
    steps = []
    for share in SHARES:
        batches = policy.with_old_logprobs(pack(mine(rows, share), budget_tokens=budget))
        metrics = finalise(policy.update(reference(batches), objective))
        steps.append((metrics["update/loss"], metrics["update/grad_norm"]))
    weights = weights_of(policy)
    reference.close()
    policy.close()
    return steps, weights


def mine(rows: list[TrainingRow], share: tuple[tuple[int, ...], ...]) -> list[TrainingRow]:
    """This rank's rows; all of them in a process alone."""
    if distributed.world_size() == 1:
        return [rows[i] for i in sorted(i for part in share for i in part)]
    return [rows[i] for i in share[distributed.rank()]]


def main(model: Path, out: Path) -> None:
    results = {
        name: outcome(model, budget, settings)
        for name, (budget, settings) in (VARIANTS | ADAPTED).items()
    }
    if distributed.rank() == 0:
        torch.save(results, out / "results.pt")
    end_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
