"""Whole runs with the warm-started policy and a small world: here, or in processes of their own."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from process_environment import ROOT

RECIPE = "recipes/demo_cpu.yaml"
TIMEOUT_S = 240
SMALL = (
    "run.wandb=disabled",
    "run.eval_every=0",
    "data.questions_per_step=4",
    "rollout.rollouts_per_question=4",
)
LOSS_TOLERANCE = 1e-5
REAL_ROWS = ROOT.parent / "shared" / "data"
"""A few rows of FVQA and LiveVQA; they are not part of the repository."""
NOT_REPRODUCIBLE = (
    "time",
    "throughput/",
    "memory/",
    "wait/",
    "time/",
    "rollout/tool_latency_s",
    "tapo/time_",
)
"""Metrics that depend on the clock or the machine."""


def mixed_for(one_of: int) -> tuple[str, ...]:
    """A reward by which one of so many questions teaches: by its id, not by what is sampled."""
    path = "tests.rewarding:mixed_for_some"
    return (
        "reward.parts.accuracy.weight=0",
        "reward.parts.format.weight=0",
        f"reward.parts.mixed={{name: custom, path: '{path}', arguments: {{one_of: {one_of}}}}}",
    )


def arguments(world: Path, out: Path, *overrides: str) -> list[str]:
    """Of `python -m tapo_train`, for a run over `world` into `out`."""
    data = [
        f"data.train=[{world}/train.jsonl]",
        f"data.validation=[{world}/validation.jsonl]",
        f"tools.corpus={world}/corpus.jsonl",
        f"tools.image_index={world}/image_index.jsonl",
    ]
    return ["train", RECIPE, f"run.dir={out}", *SMALL, *data, *overrides]


def command(
    world: Path,
    out: Path,
    *overrides: str,
    ranks: int,
    nodes: Sequence[str] = ("--standalone",),
) -> list[str]:
    """The command line of a run by torchrun.

    Args:
        nodes: of torchrun, which machines take part.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", *nodes, f"--nproc-per-node={ranks}"]
    return [*launcher, "-m", "tapo_train", *arguments(world, out, *overrides)]


def train_here(world: Path, out: Path, *overrides: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a run in this process, which has loaded everything.

    One rank, the reference engine.
    """
    from tapo_train import runs
    from tapo_train.recipe.compose import load_recipe

    _, recipe, *named = arguments(world, out, "rollout/engine=hf", *overrides)
    runs.train(load_recipe(recipe, named))
    return read_rows(out)


def read_rows(out: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds, without what depends on the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if not name.startswith(NOT_REPRODUCIBLE)}
        for row in rows
    ]


def without_probe(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics without how far engine and learner are apart."""
    return {name: value for name, value in row.items() if not name.startswith("probe/")}


def digest_of_weights(folder: Path) -> str:
    """sha256 of an exported policy's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
