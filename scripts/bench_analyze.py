"""Measure C6.analyze: the offline analyser on a file of 10,000 trajectories.

    python scripts/bench_analyze.py [--trajectories 10000] [--out FILE]

Eight trajectories per question and six calls each, every text search with an answer of 200 words
(for the determinism audit); the corrected rows are written too. CPU time and peak resident memory
are those of the command in a process of its own. Peer: reading the file with `json.loads` line by
line and nothing else, in the same way.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measures import RESULTS, Measure, append, load, versions

GROUP = 8
CALLS = 6
ANSWER_WORDS = 200
TARGET_S = 20.0
TARGET_MB = 1000.0

PLAIN_READING = "import json, sys; rows = [json.loads(line) for line in open(sys.argv[1])]"

USAGE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(done.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss)
"""
"""Runs a command and prints exit code, CPU seconds and peak resident memory [KiB]."""


def random_call(rng: random.Random, words: list[str], pages: list[str]) -> dict[str, Any]:
    """A text search (half of them), a zoom or an image search, answered."""
    kind = rng.random()
    if kind < 0.5:
        query = " ".join(rng.sample(words, rng.randint(3, 6)))
        return {
            "name": "text_search_tool",
            "arguments": {"query": query},
            "observation": rng.choice(pages),
        }
    if kind < 0.8:
        x0, y0 = rng.randint(0, 600), rng.randint(0, 600)
        box = [x0, y0, x0 + rng.randint(100, 400), y0 + rng.randint(100, 400)]
        return {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": box, "img_idx": 0}}
    return {"name": "image_search_tool", "arguments": {}, "observation": pages[0]}


def write_rollouts(path: Path, trajectories: int, *, seed: int = 0) -> None:
    """A rollout file whose calls overlap within a question."""
    rng = random.Random(seed)
    vocabulary = [f"keyword{i}" for i in range(4000)]
    with path.open("w", encoding="ascii") as file:
        for number in range(trajectories):
            if number % GROUP == 0:
                words = rng.sample(vocabulary, 8)
                pages = [" ".join(rng.choices(vocabulary, k=ANSWER_WORDS)) for _ in range(6)]
            steps = [{"turn": t, "calls": [random_call(rng, words, pages)]} for t in range(CALLS)]
            correct = rng.random() < 0.5
            line = {
                "id": f"t{number}",
                "group": f"q{number // GROUP}",
                "correct": correct,
                "reward": float(correct),
                "steps": steps,
            }
            file.write(json.dumps(line) + "\n")


def usage(command: list[str]) -> tuple[float, float]:
    """CPU time [s] and peak resident memory [MB] of a command."""
    done = subprocess.run(
        [sys.executable, "-c", USAGE, *command], check=True, stdout=subprocess.PIPE, text=True
    )
    code, seconds, kib = done.stdout.split()
    if int(code):
        raise SystemExit(f"{command} ended with {code}; nothing was measured")
    return float(seconds), float(kib) * 1024 / 1e6


def measures(trajectories: int) -> list[Measure]:
    """CPU time and memory of analyser and plain reading."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rollouts.jsonl"
        write_rollouts(path, trajectories)
        size = f"{path.stat().st_size / 1e6:.0f} MB file"
        out = str(Path(folder) / "corrected.jsonl")
        analyze = [sys.executable, "-m", "tapo_train", "analyze", str(path), "--out", out]
        ours = usage(analyze)
        plain = usage([sys.executable, "-c", PLAIN_READING, str(path)])
    targets = (("cpu", "s", TARGET_S), ("memory", "MB", TARGET_MB))
    return [
        Measure(
            id=f"C6.analyze.{name}",
            value=round(value, 2),
            unit=unit,
            peer=f"json.loads of every line of the {size}, {trajectories} trajectories",
            peer_value=round(peer, 2),
            ratio=round(peer / value, 2),
            target=f"value <= {target:g}",
            met=value <= target,
            versions=versions("numpy"),
            load=load(),
        )
        for (name, unit, target), value, peer in zip(targets, ours, plain, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    append(measures(arguments.trajectories), out=arguments.out)


if __name__ == "__main__":
    main()
