"""Show that a run that is killed again and again is the run that never was.

    python scripts/prove_resume.py --world runs/world --out runs/resume --steps 20 --kills 4
    python scripts/prove_resume.py ... --ranks 1,2      # each start on another number of ranks

Trains a recipe with the reference engine to its end, and once more with `kill -9` of all its
processes at random moments, going on each time with the same command; then compares metrics
and exported weights. On one number of ranks both must be equal to the bit. The moments are
drawn from --seed, so a failure can be repeated (machine load moves them a little).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

CLOCK = ("time", "throughput/", "memory/", "wait/", "rollout/tool_latency_s", "tapo/time_")
"""Beginnings of the names of metrics that depend on the clock or the machine."""
POLL_S = 0.05


def main() -> int:
    """Run and compare; 0 if the runs are equal."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="recipes/demo_cpu.yaml")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--ranks", type=_numbers, default=[1], metavar="N,M")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    whole, killed = arguments.out / "whole", arguments.out / "killed"
    finish(arguments, whole, arguments.ranks[0])
    kill_and_finish(arguments, killed)
    return compare(whole, killed, is_exact=len(set(arguments.ranks)) == 1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def command(arguments: argparse.Namespace, out: Path, ranks: int) -> list[str]:
    """The same for every start."""
    world = arguments.world
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [
        *(sys.executable, *(launcher if ranks > 1 else ())),
        *("-m", "tapo_train", "train", arguments.recipe, f"run.dir={out}", "rollout/engine=hf"),
        f"data.train=[{world}/train.jsonl]",
        f"data.validation=[{world}/validation.jsonl]",
        f"tools.corpus={world}/corpus.jsonl",
        f"tools.image_index={world}/image_index.jsonl",
        *("run.wandb=disabled", "run.eval_every=0", f"run.steps={arguments.steps}"),
        *("run.save_every=3", *arguments.overrides),
    ]


def start(arguments: argparse.Namespace, out: Path, ranks: int) -> subprocess.Popen[bytes]:
    """A run in a process group of its own, its output appended to a file."""
    out.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            command(arguments, out, ranks), stdout=log, stderr=log, start_new_session=True
        )


def finish(arguments: argparse.Namespace, out: Path, ranks: int) -> None:
    """Run to the end."""
    started = time.monotonic()
    status = start(arguments, out, ranks).wait()
    if status != 0:
        sys.exit(f"the run ended with {status}: see {out.with_suffix('.log')}")
    print(f"{out.name}: finished on {ranks} ranks in {time.monotonic() - started:.0f} s")


def kill_and_finish(arguments: argparse.Namespace, out: Path) -> None:
    """Kill the run --kills times at random moments, each time going on; then let it finish."""
    draw, ranks = random.Random(arguments.seed), cycle(arguments.ranks)
    borders = sorted(draw.sample(range(1, arguments.steps), arguments.kills))
    for border in borders:
        number = next(ranks)
        process = start(arguments, out, number)
        began, seen = time.monotonic(), len(rows_of(out))
        while len(rows_of(out)) < border and process.poll() is None:
            time.sleep(POLL_S)
        steps = max(1, len(rows_of(out)) - seen)
        time.sleep(draw.random() * (time.monotonic() - began) / (steps + 1))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        left = sorted(path.name for path in (out / "checkpoints").glob("*step-*"))
        print(f"killed on {number} ranks after {len(rows_of(out))} steps; on the disk: {left}")
    finish(arguments, out, next(ranks))


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Whole rows of metrics, without what depends on the clock."""
    path = out / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(CLOCK)}
        for line in lines
    ]


def compare(whole: Path, killed: Path, *, is_exact: bool) -> int:
    """Print the largest differences; 0 if they are what they must be."""
    ours, theirs = rows_of(killed), rows_of(whole)
    weights = [load_file(out / "export" / "model.safetensors") for out in (killed, whole)]
    weight = max(
        float((weights[0][n].double() - weights[1][n].double()).abs().max()) for n in weights[1]
    )
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    print(f"steps logged: {[row['step'] for row in ours] == [row['step'] for row in theirs]}")
    print(f"metrics equal to the bit: {ours == theirs} (first difference at step {first})")
    print(f"largest difference of a weight: {weight:.3g}")
    names = ("reward/mean", "update/loss", "update/grad_norm")
    for name in names:
        pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True)]
        print(f"largest difference of {name}: {max(abs(a - b) for a, b in pairs):.3g}")
    return 0 if (weight == 0 and ours == theirs) or (not is_exact and weight < 1e-5) else 1


if __name__ == "__main__":
    sys.exit(main())
