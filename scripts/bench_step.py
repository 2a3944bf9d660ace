"""Measure C11: a whole training step against TRL's GRPOTrainer, without and with slow tools.

    PEERS=DIR python scripts/bench_step.py [--policy demo] [--rollouts 8] [--pairs 2] [--out FILE]

PEERS is a folder with TRL: see bench_update.py. A step is 2 questions x ROLLOUTS trajectories of
four tool turns and an answer: rollout, reward, advantages, packing or padding, loss, backward,
AdamW.

The same on both sides, and checked before anything is timed: every token of every trajectory
(chat template, tool schema, observations, token by token), which of them are trained, the loss
and the gradient norm. The policy is that of bench_update.py (hidden 256, 4 layers) or, with
--policy demo, one of the demo's size (hidden 128, 4 layers), in float32 on one thread. The
lengths of the observations are log-normal, so half of TRL's batch is padding.

Left out on both sides: decoding. A script writes the turns, in no time: ours through an engine
that answers at once, TRL's in place of `GRPOTrainer._generate_single_turn`. So a step is what the
framework adds to generation, and its update. Left out too, on ours: handing weights to the engine,
dumps and logs; on TRL's: the data loader and logs.

Not the same: ours trains the language model of a Qwen3-VL policy (its vision tower sees no
picture), assigns TAPO credit on top and bounds its calls with deadlines; TRL's tool is a plain
function, as its documentation has it, so its calls run one after another, N x T x latency (its
`async def` tools run together only within one trajectory, which calls once per turn here).
The update is real work on a CPU: the smaller its share of a step, as on a GPU, the larger is that
of waiting, and with it the ratio. That is why there are two sizes.

`C11.0` and `C11.200ms` (`C11.demo.…`) are wall time. On a busy machine that counts other
programs' work as well, so beside them stand `.cpu`: CPU time plus the time asleep for tools,
which is exact for TRL (calls x latency) and for ours all of the rollout's wall time that was not
CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_update import find_trl
from measures import RESULTS, Measure, append, load, versions
from step_sides import SHAPES, Ours, Peer, Script, write_policy

from tapo_train.credit.assigners import NoTransfer, Tapo
from tapo_train.credit.options import TapoOptions

LATENCIES = {"0": (0.0, 3.0), "200ms": (0.2, 10.0)}
"""Latency of a call [s], and how many times faster than TRL a step is to be."""
TOLERANCE = 1e-5


def compare(ours: Ours, peer: Peer) -> None:
    """Stop unless both sides make the same step from the same weights."""
    mine, theirs = ours(0.0, NoTransfer()), peer(0.0)
    for (own, trained), (other, other_trained) in zip(mine.rows, theirs.rows, strict=True):
        if own != other or trained != other_trained:
            at = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), -1)
            raise SystemExit(f"{len(own)} and {len(other)} tokens, different from {at} on")
    tokens, count = (sum(len(row[i]) for row in mine.rows) for i in (0, 1))
    print(
        f"{len(mine.rows)} trajectories, {tokens} tokens, {peer.padding:.0%} padding when padded, "
        f"{count / tokens:.1%} trained; loss {mine.loss:.8f} and {theirs.loss:.8f}, "
        f"gradient norm {mine.norm:.8f} and {theirs.norm:.8f}",
        flush=True,
    )
    scale = max(theirs.norm, 1.0)
    if max(abs(mine.loss - theirs.loss), abs(mine.norm - theirs.norm)) > TOLERANCE * scale:
        raise SystemExit("the two sides disagree; nothing was measured")


def measure(arguments: argparse.Namespace, scratch: Path) -> list[Measure]:
    """Wall time and CPU time with waiting, for each latency."""
    from trl.chat_template_utils import qwen3_vl_chat_template

    script, shape = Script(arguments.rollouts), SHAPES[arguments.policy]
    folder = write_policy(scratch / "policy", qwen3_vl_chat_template, shape)
    ours, peer = Ours(folder, script), Peer(folder, script, shape, scratch)
    compare(ours, peer)
    credit, measures = Tapo(TapoOptions()), []
    prefix = "C11" if arguments.policy == "update" else f"C11.{arguments.policy}"
    for name, (latency, target) in LATENCIES.items():
        id = f"{prefix}.{name}"
        pairs = [(ours(latency, credit), peer(latency)) for _ in range(arguments.pairs)]
        wall = [(mine.wall_s, theirs.wall_s) for mine, theirs in pairs]
        busy = [(mine.busy_s, theirs.busy_s) for mine, theirs in pairs]
        measures.append(result(id, "s per step", wall, target))
        measures.append(result(f"{id}.cpu", "CPU s + s asleep per step", busy, target))
    ours.policy.close()
    return measures


def result(id: str, unit: str, pairs: Sequence[tuple[float, float]], target: float) -> Measure:
    """One line: medians, and the median of the ratios."""
    mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    return Measure(
        id=id,
        value=round(mine, 3),
        unit=unit,
        peer="TRL GRPOTrainer.training_step with tools=, and its optimizer; turns scripted",
        peer_value=round(theirs, 3),
        ratio=round(ratio, 2),
        target=f"ratio >= {target:g}",
        met=ratio >= target,
        versions=versions("torch", "transformers", "trl"),
        load=load(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", choices=SHAPES, default="update")
    parser.add_argument("--rollouts", type=int, default=8, help="of each of the two questions")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not find_trl():
        return
    with tempfile.TemporaryDirectory() as scratch:
        append(measure(arguments, Path(scratch)), arguments.out)


if __name__ == "__main__":
    main()
