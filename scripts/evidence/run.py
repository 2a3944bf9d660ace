"""Make the runs of a table, one after the other; those that are recorded are not repeated.

    python scripts/evidence/run.py credit                    all seeds of a table
    python scripts/evidence/run.py credit rates --seeds 0 1  some of them
    python scripts/evidence/run.py credit --arms none tapo   some of its arms
    python scripts/evidence/run.py all --list                what is there and what is missing

One process and one engine for all runs of a call, one seed of all arms before the next seed. A
call that is stopped loses the run it is in. On one core: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import moody_search
from arms import RECIPE, RECORDS, ROOT, SCRATCH, SEEDS, TABLES, WORLD_SEED, WORLDS, Arm

from tapo_train.demo.world.build import SMALL, write_world
from tapo_train.recipe.compose import Recipe, load_recipe
from tapo_train.report.metrics_file import read_metrics

KEPT = (
    "reward/accuracy",
    "reward/format",
    "rollout/calls",
    "rollout/repeated_calls",
    "eval/accuracy",
    "eval/questions",
    "policy/entropy",
    "update/grad_norm",
    "tapo/frac_fail_traj_corrected",
    "tapo/frac_fail_traj_corrected_mixed",
    "tapo/frac_fail_traj_corrected_theta",
    "tapo/frac_fail_traj_corrected_theta_mixed",
    "tapo/frac_fail_steps_corrected",
    "tapo/frac_fail_steps_corrected_mixed",
    "tapo/frac_fail_steps_corrected_theta",
    "tapo/frac_fail_steps_corrected_theta_mixed",
    "tapo/n_fail_traj",
    "tapo/n_fail_traj_mixed",
    "placebo/hit_frac",
    "shrink/factor",
    "credit/observation_agreement",
)
"""Metrics of each step that a record keeps."""


def record_of(arm: Arm, seed: int) -> Path:
    """Where a run is recorded."""
    return RECORDS / arm.name / f"seed_{seed}.json"


def wanted(
    tables: Sequence[str], seeds: Sequence[int], names: Sequence[str] = ()
) -> list[tuple[Arm, int]]:
    """Runs of the tables, each once, table by table and seed by seed; only arms of `names`."""
    runs = [(arm, s) for name in tables for s in seeds for arm in TABLES[name].arms]
    return [run for run in dict.fromkeys(runs) if not names or run[0].name in names]


def recipe_of(arm: Arm, seed: int, folder: Path) -> Recipe:
    """The recipe of one run."""
    world = SCRATCH / "worlds" / arm.world
    if not (world / "world.json").is_file():
        write_world(world, WORLD_SEED, SMALL, chains=WORLDS[arm.world])
    moody_search.corpus = world / "corpus.jsonl"
    return load_recipe(
        RECIPE,
        [
            f"run.dir={folder}",
            f"run.seed={seed}",
            "run.resume=never",
            f"model.path={ROOT / 'assets' / 'chain_warm_start'}",
            f"data.train=[{world / 'train.jsonl'}]",
            f"data.validation=[{world / 'test.jsonl'}]",
            f"tools.corpus={world / 'corpus.jsonl'}",
            *arm.overrides,
        ],
    )


def make(arm: Arm, seed: int, lent: Any) -> None:
    """Train one run and record it."""
    from tapo_train import runs

    folder = SCRATCH / "runs" / arm.name / f"seed_{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    recipe = recipe_of(arm, seed, folder)
    started, before = time.perf_counter(), _cpu_s()
    if runs.train(recipe, engine=lent(recipe)) is None:
        raise SystemExit(f"stopped in {arm.name} seed {seed}, which is not recorded")
    rows = read_metrics(folder / "metrics.jsonl")
    record = {
        "arm": arm.name,
        "seed": seed,
        "world": arm.world,
        "overrides": list(arm.overrides),
        "commit": _commit(),
        "cpu_s": round(_cpu_s() - before, 1),
        "wall_s": round(time.perf_counter() - started, 1),
        "steps": {
            key: [_short(row.get(key)) for row in rows]
            for key in KEPT
            if any(key in row for row in rows)
        },
    }
    path = record_of(arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record) + "\n")
    partial.replace(path)
    shutil.rmtree(folder)


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+", choices=(*TABLES, "all"))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--arms", nargs="+", default=(), metavar="ARM", help="only these")
    parser.add_argument("--list", action="store_true", help="say what is missing, run nothing")
    arguments = parser.parse_args()
    tables = list(TABLES) if "all" in arguments.tables else arguments.tables
    runs = wanted(tables, arguments.seeds, arguments.arms)
    missing = [run for run in runs if not record_of(*run).is_file()]
    if arguments.list:
        for arm, seed in missing:
            print(f"{arm.name} seed {seed}")
    print(f"{len(missing)} of {len(runs)} runs are missing")
    if arguments.list or not missing:
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    lent = Lender()
    for arm, seed in missing:
        if record_of(arm, seed).is_file():
            continue  # another process was faster
        print(f"== {arm.name} seed {seed}", flush=True)
        make(arm, seed, lent)
    lent.close()


class Lender:
    """Keeps one engine for all runs: each hands it its own weights before it samples."""

    def __init__(self) -> None:
        self._engine: Any = None

    def __call__(self, recipe: Recipe) -> Any:
        """The engine; the first recipe's sizes hold for all."""
        from tapo_train import build

        if self._engine is None:
            self._engine = build.build_engine(recipe, build.build_chat(recipe))
        return self._engine

    def close(self) -> None:
        """End the engine."""
        if self._engine is not None:
            self._engine.close()


if __name__ == "__main__":
    main()
