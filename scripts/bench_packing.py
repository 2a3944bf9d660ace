"""Measure C8 and C9: what packing costs, how full it packs, how even ranks are.

    python scripts/bench_packing.py [--rows 16384] [--budget 32768] [--out FILE]

C8: CPU time of `pack` (rows to micro-batches, tensors included) per packed token, and the
share of the token budget that is filled. C9: what the ranks wait for over their mean work, the most
costly micro-batch of each micro-step, pictures counted: as dealt out and, as peer, where whole rows
go to the least busy rank and each packs for itself.
Trajectories are ragged like a search agent's: lognormal lengths, four trained turns, up to
eight pictures.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
from measures import RESULTS, Measure, append, cpu_s, load, versions

from tapo_train.learner.balance import RowCost
from tapo_train.learner.batch import TrainingRow, pack
from tapo_train.learner.dealing import Dealt, deal, evenness, rank_of
from tapo_train.learner.packing import best_fit
from tapo_train.learner.shape import QWEN3_VL_8B
from tapo_train.types import Span

TARGET_US = 0.1
TARGET_FILL = 0.95
TURNS = 4
TRAINED_SHARE = 0.12
MEDIAN_TOKENS = 2000
SPREAD = 0.6
LONGEST = 16_384
TARGET_IMBALANCE = 1.03
STEPS = ((256, 8), (1024, 8), (4096, 32))
"""(rows, ranks) of a step."""
AGENTS_MEDIAN, AGENTS_LONGEST = 7000, 32_768
"""[tokens] of the rows whose ranks are balanced, as in recipes/paper.yaml."""
GROUP = 8
"""Rollouts of a question; a rank samples whole groups."""
PICTURE = 151_655
PICTURE_TOKENS = 320


def ragged_rows(
    count: int, *, seed: int = 0, median: int = MEDIAN_TOKENS, longest: int = LONGEST
) -> list[TrainingRow]:
    """Rows of lognormal length whose four turns hold 12 % of the tokens."""
    random = np.random.default_rng(seed)
    lengths = np.exp(random.normal(np.log(median), SPREAD, count))
    return [_row(number, int(length)) for number, length in enumerate(lengths.clip(200, longest))]


def _row(number: int, length: int) -> TrainingRow:
    tokens = np.full(length, 7, dtype=np.int32)
    for start in range(0, min(number % 9, length // 400) * 400, 400):
        tokens[start + 40 : start + 40 + PICTURE_TOKENS] = PICTURE
    size, slot = int(length * TRAINED_SHARE / TURNS), length // TURNS
    spans = tuple(Span(start=t * slot + 1, end=t * slot + 1 + size) for t in range(TURNS))
    trained = TURNS * size
    return TrainingRow(
        id=str(number),
        tokens=tokens,
        images=(),
        spans=spans,
        advantages=np.ones(trained),
        sampler_logprobs=np.zeros(trained, dtype=np.float32),
    )


def packing(rows: list[TrainingRow], budget: int) -> list[Measure]:
    """C8: microseconds per token and the share of the budget that is filled."""
    batches = pack(rows, budget_tokens=budget)
    tokens = sum(batch.num_tokens for batch in batches)
    fill = tokens / (len(batches) * budget)
    seconds = statistics.median(cpu_s(lambda: pack(rows, budget_tokens=budget)) for _ in range(3))
    us = seconds / tokens * 1e6
    return [
        Measure(
            id="C8.packing.cpu",
            value=round(us, 4),
            unit="us/token",
            target=f"value <= {TARGET_US}",
            met=us <= TARGET_US,
            versions=versions("numpy", "torch"),
            load=load(),
        ),
        Measure(
            id="C8.packing.fill",
            value=round(fill, 4),
            unit="share of the budget",
            target=f"value >= {TARGET_FILL}",
            met=fill >= TARGET_FILL,
            versions=versions("numpy", "torch"),
            load=load(),
        ),
    ]


def balancing(budget: int) -> list[Measure]:
    """C9: evenness of the ranks' micro-steps for steps of several sizes."""
    cost = RowCost(shape=QWEN3_VL_8B, image_token_id=PICTURE)
    most = max(count for count, _ in STEPS)
    rows = ragged_rows(most, median=AGENTS_MEDIAN, longest=AGENTS_LONGEST)
    costs, lengths = [cost(row) for row in rows], [len(row.tokens) for row in rows]
    return [_evenness(costs[:count], lengths[:count], ranks, budget) for count, ranks in STEPS]


def packed_by_each(costs: list[float], lengths: list[int], ranks: int, budget: int) -> Dealt:
    """Costly rows first, each to the rank with the least work; then every rank packs its own."""
    work, own = [0.0] * ranks, [list[int]() for _ in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        rank = work.index(min(work))
        work[rank] += costs[i]
        own[rank].append(i)
    return [
        [
            [rows[i] for i in batch]
            for batch in best_fit([lengths[i] for i in rows], budget_tokens=budget)
        ]
        for rows in own
    ]


def _evenness(costs: list[float], lengths: list[int], ranks: int, budget: int) -> Measure:
    home = [(number // GROUP) % ranks for number in range(len(costs))]
    dealt: Dealt = []
    seconds = cpu_s(
        lambda: dealt.extend(deal(costs, lengths, budget_tokens=budget, num_ranks=ranks, home=home))
    )
    chosen = rank_of(dealt, count=len(costs))
    moved = sum(a != b for a, b in zip(home, chosen, strict=True)) / len(costs)
    print(f"{len(costs)} rows, {ranks} ranks: {seconds * 1e3:.1f} ms, {moved:.0%} of rows move")
    before = evenness(costs, packed_by_each(costs, lengths, ranks, budget))
    after = evenness(costs, dealt)
    return Measure(
        id=f"C9.balance.{len(costs)}_rows_{ranks}_ranks",
        value=round(after, 4),
        unit="waited/mean",
        peer="rows balanced, each rank packs its own",
        peer_value=round(before, 4),
        ratio=round(before / after, 4),
        target=f"value <= {TARGET_IMBALANCE}",
        met=after <= TARGET_IMBALANCE,
        versions=versions("numpy"),
        load=load(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16_384)
    parser.add_argument("--budget", type=int, default=32_768)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = ragged_rows(arguments.rows)
    append([*packing(rows, arguments.budget), *balancing(arguments.budget)], arguments.out)


if __name__ == "__main__":
    main()
