"""Measure C6: the credit stage beside straightforward peers.

    python scripts/bench_credit.py [--pairs 5] [--out FILE]

Random questions, 8 or 16 trajectories each, 10 calls per trajectory (40 % text searches, 40 %
zooms, 20 % image searches; no call planned to be equal to another). Three peers, in the same
run:

    plain      the same transfer in plain Python, without caching; results are compared first
    difflib    pairing the text searches of a question by SequenceMatcher.ratio
    grouping   GiGPO's step returns with one scan of the batch per row, and its exact grouping

Time is CPU time of one process on one thread, median over interleaved pairs. The token cache is
empty before each call. One line per measure is appended to bench/results.jsonl.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path

import numpy as np
from measures import RESULTS, Measure, append, cpu_s, interleaved, load, versions

from tapo_train.credit import CreditCall, CreditRow, CreditStep, Tapo, TapoOptions
from tapo_train.credit.text import token_set
from tapo_train.types import ImageRef

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from reference_credit import reference_advantages

CALLS_PER_TRAJECTORY = 10
SIZES = {"1k": (12, 8), "4k": (50, 8), "16k": (200, 8)}
"""Calls to (questions, trajectories of each)."""
TARGETS_MS = {"1k": 25.0 / 4, "4k": 25.0, "16k": 100.0}
LARGE = (1024, 16)
LARGE_TARGET_S = 2.0
SLOPE_QUESTIONS = (64, 128, 256, 512)
SLOPE_TARGET = 1.1
TOLERANCE = 1e-9


def random_call(rng: random.Random, words: Sequence[str]) -> CreditCall:
    """A call of one of the three tools."""
    kind = rng.random()
    if kind < 0.2:
        return CreditCall(name="image_search_tool", arguments={})
    if kind < 0.6:
        query = " ".join(rng.sample(words, rng.randint(3, 7)))
        return CreditCall(name="text_search_tool", arguments={"query": query})
    x0, y0 = rng.randint(0, 600), rng.randint(0, 600)
    box = [x0, y0, x0 + rng.randint(100, 400), y0 + rng.randint(100, 400)]
    return CreditCall(name="image_zoom_in_tool", arguments={"bbox_2d": box, "img_idx": 0})


def random_rows(questions: int, trajectories: int, *, seed: int = 0) -> list[CreditRow]:
    """Groups with at least one success and one failure."""
    rng = random.Random(seed)
    vocabulary = [f"keyword{i}" for i in range(400)]
    rows = []
    for question in range(questions):
        words = rng.sample(vocabulary, 12)
        successes = rng.randint(1, trajectories - 1)
        up = math.sqrt((trajectories - successes) / successes)
        for i in range(trajectories):
            steps = tuple(
                CreditStep(turn=t, calls=(random_call(rng, words),))
                for t in range(CALLS_PER_TRAJECTORY)
            )
            row = CreditRow(
                id=f"{question}-{i}",
                group=str(question),
                correct=float(i < successes),
                advantage=up if i < successes else -1.0 / up,
                num_turns=CALLS_PER_TRAJECTORY + 1,
                steps=steps,
                images=(ImageRef(root=f"picture {question}"),),
                num_input_images=1,
            )
            rows.append(row)
    return rows


def difflib_pairing(rows: Sequence[CreditRow]) -> None:
    """Every failing text search against every successful one of its question."""
    queries: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for row in rows:
        for step in row.steps:
            for call in step.calls:
                if call.name == "text_search_tool":
                    queries[row.group][row.advantage > 0].append(call.arguments["query"])
    for failing, references in queries.values():
        for query in failing:
            max(SequenceMatcher(None, query, r).ratio() for r in references or [""])


def gigpo_grouping(rows: Sequence[CreditRow]) -> None:
    """Step returns by a scan per row, then exact grouping by anchor text, then group means."""
    names = np.array([row.id for row in rows for _ in range(CALLS_PER_TRAJECTORY)], dtype=object)
    rewards = np.array([row.correct for row in rows for _ in range(CALLS_PER_TRAJECTORY)])
    returns = np.zeros(len(names))
    for name in dict.fromkeys(names):
        running = 0.0
        for i in reversed(np.where(names == name)[0]):
            running = rewards[i] * (i % CALLS_PER_TRAJECTORY == 9) + 0.95 * running
            returns[i] = running
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    place = 0
    for row in rows:
        for step in row.steps:
            groups[row.group, str(step.calls[0].arguments)].append(place)
            place += 1
    for members in groups.values():
        returns[members] -= np.mean(returns[members])


PEERS: dict[str, tuple[str, Callable[[Sequence[CreditRow]], None]]] = {
    "difflib": ("text searches of a question paired by difflib", difflib_pairing),
    "grouping": ("GiGPO's step returns and grouping", gigpo_grouping),
}


def check(rows: Sequence[CreditRow], tapo: Tapo) -> None:
    """Stop unless ours and the plain transfer agree."""
    gap = max(
        abs(a - b)
        for ours, plain in zip(tapo(rows).step_advantages, reference_advantages(rows), strict=True)
        for a, b in zip(ours, plain, strict=True)
    )
    print(f"largest difference to the plain transfer: {gap:.1e}")
    if gap > TOLERANCE:
        raise SystemExit("the two sides disagree; nothing was measured")


def cold_s(function: Callable[[], object]) -> float:
    """CPU time of one call [s] with an empty token cache."""
    token_set.cache_clear()
    return cpu_s(function)


def slope(tapo: Tapo, count: int) -> float:
    """Exponent of time over questions, least squares on logarithms."""
    batches = [random_rows(questions, 8) for questions in SLOPE_QUESTIONS]
    times = [[cold_s(partial(tapo, rows)) for rows in batches] for _ in range(count)]
    best = [min(column) for column in zip(*times, strict=True)]
    return float(np.polyfit(np.log(SLOPE_QUESTIONS), np.log(best), 1)[0])


def measure(
    name: str,
    value: float,
    unit: str,
    target: float,
    *,
    peer: str | None = None,
    peer_value: float | None = None,
) -> Measure:
    """A line; met where the value is at most the target."""
    return Measure(
        id=name,
        value=round(value, 3),
        unit=unit,
        peer=peer,
        peer_value=None if peer_value is None else round(peer_value, 3),
        ratio=None if peer_value is None else round(peer_value / value, 2),
        target=f"value <= {target:g}",
        met=value <= target,
        versions=versions("numpy"),
        load=load(),
    )


def beside(
    name: str, peer: str, ours: Callable[[], object], other: Callable[[], object], pairs: int
) -> Measure:
    """A line with a peer, in ms; the size is the first part of the name."""
    value, peer_value = interleaved(ours, other, pairs=pairs, before=token_set.cache_clear)
    target = TARGETS_MS[name.split(".")[0]]
    return measure(f"C6.{name}", value * 1e3, "ms", target, peer=peer, peer_value=peer_value * 1e3)


def measures(count: int) -> Iterator[Measure]:
    """All lines, each as soon as it is measured."""
    tapo = Tapo(TapoOptions())
    for size, shape in SIZES.items():
        rows = random_rows(*shape)
        check(rows, tapo)
        plain = partial(reference_advantages, rows)
        yield beside(size, "plain Python transfer", partial(tapo, rows), plain, count)
    rows = random_rows(*SIZES["4k"])
    for name, (words, peer) in PEERS.items():
        yield beside(f"4k.{name}", words, partial(tapo, rows), partial(peer, rows), min(count, 3))
    large = random_rows(*LARGE)
    seconds = statistics.median(cold_s(partial(tapo, large)) for _ in range(3))
    yield measure("C6.164k", seconds, "s", LARGE_TARGET_S)
    yield measure("C6.slope", slope(tapo, count), "exponent in questions", SLOPE_TARGET)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for found in measures(arguments.pairs):
        append([found], out=arguments.out)


if __name__ == "__main__":
    main()
