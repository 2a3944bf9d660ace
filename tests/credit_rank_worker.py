"""Credit of a step's rows on one rank of two, for what must not depend on their number.

    torchrun --nproc-per-node 2 credit_rank_worker.py OUT

Writes, per rank and stage, the advantages of each of its rows and the counts of the step.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from credit_rows import golden_rows, population, row, text

from tapo_train.credit.assigners import Tapo
from tapo_train.credit.controls import Placebo, PlaceboOptions, Shrink, ShrinkOptions
from tapo_train.credit.options import TapoOptions
from tapo_train.credit.steps import CreditRow
from tapo_train.data.sampler import shard
from tapo_train.learner import distributed
from tapo_train.training.credit_over_ranks import OverRanks

STAGES = {
    "tapo": Tapo(TapoOptions(scope="batch", cluster="leader", theta=0.4)),
    "placebo": Placebo(PlaceboOptions()),
    "shrink": Shrink(ShrinkOptions()),
}


def questions() -> list[list[CreditRow]]:
    """Two with successes and failures, one whose attempts all fail with calls of the others."""
    golden = golden_rows()
    again = [replace(r, id=f"again{r.id}", group="again") for r in golden[::-1]]
    lost = [
        row(f"lost{number}", -1.0, text(query), group="lost")
        for number, query in enumerate(["Eiffel Tower height", "tower height", "the Eiffel"])
    ]
    up, down = population([1, 0])
    short = [row("up", up, text("tower"), group="short"), row("down", down, group="short")]
    return [golden, lost, again, short]


def credited() -> dict[str, Any]:
    """By stage, what it makes of this rank's questions."""
    mine = shard(questions(), distributed.rank(), distributed.world_size())
    rows = [row for question in mine for row in question]
    ids = [row.id for row in rows]
    results = {}
    for name, assigner in STAGES.items():
        found = OverRanks(assigner)(rows)
        turns = [values.tolist() for values in found.step_advantages]
        steps = [[list(record) for record in own] for own in found.steps]
        results[name] = {
            "turns": dict(zip(ids, turns, strict=True)),
            "steps": dict(zip(ids, steps, strict=True)),
            "sums": dict(found.sums),
        }
    return results


def main(out: Path) -> None:
    """This rank's part."""
    distributed.init()
    (out / f"{distributed.rank()}.json").write_text(json.dumps(credited()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
