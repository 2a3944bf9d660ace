"""One rank of the tests of sequence parallelism: three SGD steps with a KL penalty.

    torchrun --nproc-per-node 2 sequence_rank_worker.py OUT JOB...

A job is a model's folder, how many ranks share a micro-batch and a variant, as
`tiny:2:zero 3, gspo`. Rank 0 writes losses, gradient norms, metrics and weights of each, and what
autograd keeps with the model and the ranks of the first job, and how other heads are refused.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from learner_rows import kept_bytes, make_policy, some_rows, weights_of

from tapo_train.algos.losses import grpo, gspo
from tapo_train.errors import LearnerError
from tapo_train.learner import distributed, packed_model
from tapo_train.learner.balance import Balanced, RowCost
from tapo_train.learner.batch import TrainingRow, join, pack
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.objective import policy_gradient
from tapo_train.learner.reference import FrozenReference
from tapo_train.learner.sequence import SequenceGroup
from tapo_train.learner.settings import LearnerSettings
from tapo_train.learner.shape import ModelShape
from tapo_train.rollout.chat import ChatFormat
from tapo_train.training.step_metrics import means_over_ranks

# Without these two a tiny model is never sharded, and what hangs with a large one does not here.
SHARDED = {"zero_stage": 3, "persistent_elements": 0, "live_elements": 1}
STAGES: dict[str, tuple[int, dict[str, Any]]] = {
    "zero 0": (10_000, {"zero_stage": 0}),
    "zero 2": (60, {"zero_stage": 2}),
    "zero 3": (10_000, SHARDED),
    "zero 3 recomputing": (60, SHARDED | {"gradient_checkpointing": True}),
}
"""Name -> [tokens] in a micro-batch, settings."""
# Wide enough that no ratio stands on a clip's edge, where 1e-7 decides.
LOSSES = {"grpo": grpo, "gspo": partial(gspo, clip_low=0.02, clip_high=0.02)}
VARIANTS = {
    f"{stage}, {loss}": (*settings, loss) for stage, settings in STAGES.items() for loss in LOSSES
}

SHARES = (
    ((0,), (1,), (2,), (3,)),
    ((1,), (), (), ()),
    ((), (2,), (0, 3), (1,)),
)
"""Rows each of four ranks brings to each update, two of them the first two and the last two;
row 1 has no picture, and is alone in the second update."""

EPOCHS = 2
"""Ratios are 1 in the first, and all losses alike."""


def outcome(model: Path, name: str, *, size: int) -> dict[str, Any]:
    """Means over the step of three updates, and the weights after them."""
    budget, settings, loss = VARIANTS[name]
    chat = ChatFormat(model)
    policy = make_policy(model, chat, learning_rate=0.05, sequence_parallel=size, **settings)
    reference = FrozenReference(
        model,
        settings=policy.settings,
        pixels=chat.pixels,
        device=policy.device,
        distribution=policy.distribution,
        sequence=policy.sequence,
    )
    cost = RowCost(
        shape=ModelShape.of(policy.model.config), image_token_id=policy.layout.image_token_id
    )
    exchange = Balanced(cost=cost, budget_tokens=budget, sequence=policy.sequence)
    rows = some_rows(chat, policy.layout)
    objective = policy_gradient(
        LOSSES[loss], kl_kind="k3+", kl_coefficient=0.5, entropy_coefficient=0.1
    )
    steps = []
    for share in SHARES:
        mine, _ = exchange(brought(rows, share))
        batches = reference(policy.with_old_logprobs([join(together) for together in mine]))
        for _ in range(EPOCHS):
            metrics = policy.update(batches, objective, aggregation="seq-mean-token-mean")
            steps.append(means_over_ranks(metrics))
    rows_seen = policy.logprobs_of_all(pack(rows, budget_tokens=budget))
    weights = weights_of(policy)
    reference.close()
    policy.close()
    return {"steps": steps, "weights": weights, "logprobs": torch.cat(rows_seen)}


def brought(rows: list[TrainingRow], share: tuple[tuple[int, ...], ...]) -> list[TrainingRow]:
    """What this rank brings; in a process alone, what all would."""
    ranks = distributed.world_size()
    own = share[distributed.rank() * 4 // ranks : (distributed.rank() + 1) * 4 // ranks]
    return [rows[i] for i in sorted(i for part in own for i in part)]


def kept_per_token(folder: Path, *, size: int) -> float:
    """[B] that autograd keeps on this rank per token of a micro-batch."""
    settings = LearnerSettings(precision="fp32")
    model = packed_model.load(folder, settings=settings, device=torch.device("cpu")).train()
    group = SequenceGroup(size)
    return (kept_bytes(model, 768, group) - kept_bytes(model, 256, group)) / 512


def refusal_of_heads(source: Path, folder: Path) -> str:
    """What is said of a model with 6 heads for groups of 4 ranks; its folder holds no weights."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["num_attention_heads"] = 6
    (folder / "config.json").write_text(json.dumps(config))
    try:
        make_policy(folder, ChatFormat(source), sequence_parallel=4)
    except LearnerError as error:
        return str(error)
    return "nothing"


def main(out: Path, jobs: list[str]) -> None:
    results: dict[str, Any] = {}
    for job in jobs:
        model, size, name = job.rsplit(":", 2)
        results[job] = outcome(Path(model), name, size=int(size))
    first, size, _ = jobs[0].rsplit(":", 2)
    results["kept"] = kept_per_token(Path(first), size=int(size))
    results["heads"] = refusal_of_heads(Path(first), out / f"heads_{distributed.rank()}")
    if distributed.rank() == 0:
        torch.save(results, out / "results.pt")
    end_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
