"""Measure C5: policy losses on flat trained tokens against padded ones.

    python scripts/bench_losses.py [--rows 1024] [--length 16384] [--pairs 3] [--out FILE]

Peer: verl's own losses where `import verl` works (it is no dependency: run this with the
interpreter of an environment that has both), otherwise a padded formulation written here
from the same formulas. Loss and gradient are compared before anything is timed.

Time is CPU time of loss, average and backward on one thread; the two sides alternate in
one process, medians over the pairs. Memory is the peak above the inputs,
the gradient included, each side in a process of its own. One line per measure is
appended to bench/results.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measures import RESULTS, Measure, append, interleaved, load, versions
from torch import Tensor

from tapo_train.algos.aggregation import Aggregation, aggregate
from tapo_train.algos.losses import PolicyLoss, TokenBatch, grpo, gspo, sapo

CLIPS = {"grpo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "sapo": (0.2, 0.2)}
OURS: dict[str, PolicyLoss] = {
    "grpo": functools.partial(grpo, clip_low=0.2, clip_high=0.28, dual_clip=3.0),
    "gspo": gspo,
    "sapo": sapo,
}
MODES: dict[str, Aggregation] = {
    "grpo": "token-mean",
    "gspo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
}
TRAINED_SHARE = 0.12
TURNS = 4
TARGET_RATIO = 25.0
TARGET_MB = 50.0
LOSS_TOLERANCE = 1e-5
"""Relative; float32 sums of millions of tokens in two orders."""
GRADIENT_TOLERANCE = 1e-5
"""Relative to the largest gradient of a token."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """[B, T] with a mask for the peer, [K] for us; both hold the same tokens."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor


def padded_inputs(rows: int, length: int) -> Inputs:
    """Ragged turns that cover 12 % of each row on average, per-turn advantages."""
    rng = np.random.default_rng(0)
    mask = np.zeros((rows, length), dtype=np.float32)
    advantages = np.zeros((rows, length), dtype=np.float32)
    slot = length // TURNS
    for row in range(rows):
        base = rng.normal()
        for turn in range(TURNS):
            size = int(slot * TRAINED_SHARE * rng.uniform(0.5, 1.5))
            start = turn * slot + int(rng.integers(1, slot - size))
            mask[row, start : start + size] = 1.0
            advantages[row, start : start + size] = min(base + rng.normal() * 0.2, 2.0)
    generator = torch.Generator().manual_seed(0)
    old = torch.empty(rows, length).exponential_(1.0, generator=generator).neg_()
    new = torch.empty(rows, length).normal_(0.0, 0.1, generator=generator).add_(old)
    return Inputs(
        logprobs=new.requires_grad_(),
        old_logprobs=old,
        advantages=torch.from_numpy(advantages),
        mask=torch.from_numpy(mask),
    )


def flat_batch(inputs: Inputs) -> TokenBatch:
    """The trained tokens of `inputs`."""
    kept = inputs.mask > 0
    return TokenBatch(
        logprobs=inputs.logprobs.detach()[kept].requires_grad_(),
        old_logprobs=inputs.old_logprobs[kept],
        advantages=inputs.advantages[kept],
        trajectory=kept.nonzero()[:, 0].contiguous(),
        lengths=kept.sum(dim=1),
    )


def run_flat(name: str, batch: TokenBatch) -> float:
    """Loss, average and backward; the gradient is left in `batch.logprobs.grad`."""
    batch.logprobs.grad = None
    loss = aggregate(
        OURS[name](batch).per_token,
        batch.trajectory,
        batch.lengths,
        mode=MODES[name],
        step_tokens=batch.logprobs.shape[0],
        step_sequences=batch.lengths.shape[0],
    )
    torch.autograd.backward(loss)
    return loss.item()


def run_padded(name: str, inputs: Inputs, loss_of: Callable[[str, Inputs], Tensor]) -> float:
    """The same with the peer's loss."""
    inputs.logprobs.grad = None
    loss = loss_of(name, inputs)
    torch.autograd.backward(loss)
    return loss.item()


def masked_loss(name: str, inputs: Inputs) -> Tensor:
    """The three formulas on padded rows, with the metrics a trainer logs."""
    low, high = CLIPS[name]
    advantages, mask = inputs.advantages, inputs.mask
    lengths = mask.sum(dim=-1).clamp(min=1)
    log_ratio = inputs.logprobs - inputs.old_logprobs
    if name == "gspo":
        sequence = ((log_ratio * mask).sum(dim=-1) / lengths).detach().unsqueeze(-1)
        carrier = inputs.logprobs - inputs.logprobs.detach()
        ratio = (carrier + sequence).clamp(max=10.0).exp()
    else:
        ratio = log_ratio.clamp(-20.0, 20.0).exp()
    if name == "sapo":
        tau = torch.where(advantages > 0, torch.tensor(1.0), torch.tensor(1.05))
        losses = -torch.sigmoid(tau * (ratio - 1)) * (4.0 / tau) * advantages
    else:
        free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
        losses = torch.maximum(free, clipped)
        ((clipped > free).float() * mask).sum().item()
        if name == "grpo":
            bounded = torch.minimum(losses, -advantages * 3.0)
            losses = torch.where(advantages < 0, bounded, losses)
    (log_ratio.detach() * mask).sum().item()
    if MODES[name] == "token-mean":
        return (losses * mask).sum() / mask.sum()
    return ((losses * mask).sum(dim=-1) / lengths).mean()


def verl_loss() -> Callable[[str, Inputs], Tensor] | None:
    """verl's registered losses behind the same signature; None where verl is not there."""
    try:
        from verl.trainer.ppo.core_algos import get_policy_loss_fn
        from verl.workers.config import ActorConfig
    except ImportError:
        return None

    def loss_of(name: str, inputs: Inputs) -> Tensor:
        low, high = CLIPS[name]
        config = ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=1,
            clip_ratio_low=low,
            clip_ratio_high=high,
        )
        function = get_policy_loss_fn("vanilla" if name == "grpo" else name)
        loss, _ = function(
            inputs.old_logprobs,
            inputs.logprobs,
            inputs.advantages,
            inputs.mask,
            MODES[name],
            config,
        )
        return loss

    return loss_of


def compare(name: str, inputs: Inputs, batch: TokenBatch, loss_of: Any) -> None:
    """Stop unless both sides give the same loss and gradient."""
    ours, peers = run_flat(name, batch), run_padded(name, inputs, loss_of)
    assert batch.logprobs.grad is not None
    assert inputs.logprobs.grad is not None
    kept = inputs.mask > 0
    gap = (inputs.logprobs.grad[kept] - batch.logprobs.grad).abs().max().item()
    scale = batch.logprobs.grad.abs().max().item()
    print(f"{name}: loss {ours:.8f} and {peers:.8f}, largest gradient gap {gap / scale:.1e}")
    if abs(ours - peers) > LOSS_TOLERANCE * max(abs(ours), 1.0) or gap > GRADIENT_TOLERANCE * scale:
        raise SystemExit(f"{name}: the two sides disagree; nothing was measured")


def extra_mb(side: str, name: str, rows: int, length: int) -> float:
    """Peak resident memory above the inputs [MB], measured in a fresh process."""
    command = [sys.executable, __file__, "--peak-of", side, name]
    command += ["--rows", str(rows), "--length", str(length)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def peak_of(side: str, name: str, rows: int, length: int) -> float:
    """Peak of one call above what was resident before it [MB]; Linux with glibc."""
    # Every block of 64 kB or more goes back to the system when freed, so that none is
    # served, unseen, from a pool that the making of the inputs has left behind.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    loss_of = verl_loss() or masked_loss
    small = padded_inputs(4, 512)
    run_flat(name, flat_batch(small))
    run_padded(name, small, loss_of)
    inputs = padded_inputs(rows, length)
    if side == "flat":
        batch = flat_batch(inputs)
        del inputs
        call: Callable[[], object] = functools.partial(run_flat, name, batch)
    else:
        call = functools.partial(run_padded, name, inputs, loss_of)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    call()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """A size of this process from /proc [MB]."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(name: str, arguments: argparse.Namespace) -> list[Measure]:
    """Time and memory of one loss."""
    loss_of, peer = verl_loss(), "verl"
    if loss_of is None:
        loss_of, peer = masked_loss, "the same formulas"
    inputs = padded_inputs(arguments.rows, arguments.length)
    batch = flat_batch(inputs)
    compare(name, inputs, batch, loss_of)
    ours_s, peer_s = interleaved(
        functools.partial(run_flat, name, batch),
        functools.partial(run_padded, name, inputs, loss_of),
        pairs=arguments.pairs,
    )
    sizes = [extra_mb(side, name, arguments.rows, arguments.length) for side in ("flat", "padded")]
    tokens = batch.logprobs.shape[0]
    line = functools.partial(
        Measure,
        peer=f"{peer}, padded {arguments.rows} x {arguments.length}, {tokens} tokens trained",
        versions=versions("torch") | verl_version(),
        load=load(),
    )
    return [
        line(
            id=f"C5.{name}.cpu",
            value=round(ours_s * 1e3, 2),
            unit="ms",
            peer_value=round(peer_s * 1e3, 2),
            ratio=round(peer_s / ours_s, 2),
            target=f"ratio >= {TARGET_RATIO:g}",
            met=peer_s / ours_s >= TARGET_RATIO,
        ),
        line(
            id=f"C5.{name}.memory",
            value=round(sizes[0], 1),
            unit="MB",
            peer_value=round(sizes[1], 1),
            ratio=round(sizes[1] / max(sizes[0], 0.1), 2),
            target=f"value <= {TARGET_MB:g}",
            met=sizes[0] <= TARGET_MB,
        ),
    ]


def verl_version() -> dict[str, str]:
    """verl's, where it is installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return {"verl": metadata.version("verl")}
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peak-of", nargs=2, metavar=("SIDE", "LOSS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak_of:
        print(peak_of(*arguments.peak_of, arguments.rows, arguments.length))
        return
    for name in OURS:
        append(measure(name, arguments), out=arguments.out)


if __name__ == "__main__":
    main()
