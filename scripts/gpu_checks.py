"""Compare the learner on a GPU with itself on the CPU, packed with unpacked, and move its states.

    python scripts/gpu_checks.py reference FOLDER   # on the CPU, in float32: writes a tiny policy
    python scripts/gpu_checks.py compare FOLDER     # on the GPU, in bf16 with flash attention
    python scripts/gpu_checks.py compare FOLDER --cpu   # the same code in float32, to try it

Two processes, as DeepSpeed knows one kind of device in each. Lines of bench/results.jsonl.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from bench_gpu import figure, noise, phase, rows_of
from measures import RESULTS, Measure, append

from tapo_train.algos.losses import grpo
from tapo_train.algos.metrics import finalise
from tapo_train.demo.tiny.model import build_tiny_policy
from tapo_train.learner.batch import MicroBatch, TrainingRow, join, pack
from tapo_train.learner.objective import policy_gradient
from tapo_train.learner.policy import Policy
from tapo_train.learner.settings import LearnerSettings
from tapo_train.types import Image

PATCH_WIDTH = 1536
"""Numbers in a patch of the tiny policy: 3 colours, 2 frames, 16 x 16 pixels."""
TOKENS, BUDGET = 4096, 2048
MOST_NAT = 0.02
"""[nat] mean difference of log-probabilities that bf16 may make in a policy of two layers."""
MOST_LOSS = 0.02
"""Relative difference of the loss."""


def pixels(images: Sequence[Image]) -> dict[str, torch.Tensor]:
    """Noise by the picture's name, the same on every device and in any company."""
    made = []
    with torch.random.fork_rng(devices=[]):
        for image in images:
            torch.manual_seed(int(image.sha256))
            made.append(noise(PATCH_WIDTH, [image]))
    return {name: torch.cat([each[name] for each in made]) for name in made[0]}


def policy_of(folder: Path, *, gpu: bool) -> Policy:
    """The tiny policy under ZeRO-2."""
    settings = LearnerSettings(
        precision="bf16" if gpu else "fp32", zero_stage=2, learning_rate=1e-4
    )
    return Policy(folder, settings=settings, pixels=pixels, device="cuda" if gpu else "cpu")


def by_row(policy: Policy, batches: Sequence[MicroBatch]) -> dict[str, npt.NDArray[np.float64]]:
    """Log-probabilities of each row's trained tokens."""
    found = {}
    for batch in policy.with_old_logprobs(batches):
        for number, id in enumerate(batch.row_ids):
            found[id] = batch.old_logprobs[batch.trajectory == number].double().numpy()
    return found


def loss_of(policy: Policy, rows: Sequence[TrainingRow]) -> float:
    """Of one update, which is made."""
    batches = policy.with_old_logprobs(pack(rows, budget_tokens=BUDGET))
    return finalise(policy.update(batches, policy_gradient(grpo)))["update/loss"]


def distance(ours: dict[str, npt.NDArray[np.float64]], theirs: dict[str, object]) -> float:
    """[nat] mean |difference|."""
    pairs = [np.abs(ours[id] - np.asarray(theirs[id])) for id in ours]
    return float(np.concatenate(pairs).mean())


def reference(folder: Path) -> None:
    """The tiny policy, what it says row by row, and the loss of its first update."""
    build_tiny_policy(folder / "policy")
    policy = policy_of(folder / "policy", gpu=False)
    rows = rows_of(policy, TOKENS)
    said = by_row(policy, [join([row]) for row in rows])
    np.savez(folder / "reference.npz", loss=loss_of(policy, rows), **said)


def compare(folder: Path, *, gpu: bool) -> list[Measure]:
    """Lines, in the order of a step."""
    policy = policy_of(folder / "policy", gpu=gpu)
    rows = rows_of(policy, TOKENS)
    with np.load(folder / "reference.npz") as held:
        theirs = dict(held)
    alone = by_row(policy, [join([row]) for row in rows])
    packed = by_row(policy, pack(rows, budget_tokens=BUDGET))
    parity, packing = distance(packed, theirs), distance(packed, alone)
    loss = loss_of(policy, rows)
    off = abs(loss - float(theirs["loss"])) / max(abs(float(theirs["loss"])), 1e-6)
    _, full, _ = phase(functools.partial(loss_of, policy, rows))
    policy.offload_states()
    _, light, _ = phase(lambda: by_row(policy, pack(rows, budget_tokens=BUDGET)))
    policy.reload_states()
    again = loss_of(policy, rows)
    most = f"value <= {MOST_NAT}"
    return [
        figure("parity", parity, "nat, mean, to float32 on the CPU", most, parity <= MOST_NAT),
        figure("packing", packing, "nat, mean, packed to alone", most, packing <= MOST_NAT),
        figure("zero2.loss", off, "of the CPU's loss", f"value <= {MOST_LOSS}", off <= MOST_LOSS),
        figure("offload.freed", (full - light) / 1e6, "MB at the peak", "none", True),
        figure("reload.loss", again, "after the states came back", "finite", np.isfinite(again)),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """One of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("reference", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cpu", action="store_true", help="nothing is recorded")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.what == "reference":
        reference(arguments.folder)
        return
    found = compare(arguments.folder, gpu=not arguments.cpu)
    if arguments.cpu:
        print("\n".join(f"{m.id} {m.value} {m.unit}" for m in found))
    else:
        append(found, arguments.out)
    if not all(measure.met for measure in found):
        raise SystemExit("not as it should be: " + ", ".join(m.id for m in found if not m.met))


if __name__ == "__main__":
    main()
