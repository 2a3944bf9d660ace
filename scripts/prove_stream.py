"""The demo over one engine server with slow tools: taking turns, and as a stream.

    python scripts/prove_stream.py --world runs/world --out runs/stream [--staleness 0 2]

Every call of a tool takes half a second longer. Starts `serve-engine` and, for each max_staleness,
one learner rank beside it; then measures what was trained on the test split. Updates per hour are
of the steps between the first five and the last two, so that neither the start nor the end, at
which nothing new is begun, counts; the whole run is given beside it. A run that was stopped goes on
with the same command.

The server is nice: it has what the learner leaves of cores that both are on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx

RECIPE = "recipes/demo_cpu.yaml"
TOOL_S = 0.5
FIRST, LAST = 5, 2
"""Steps in which the stream fills and the engine warms, and in which the stream runs dry."""
SECRET = "TAPO_ENGINE_SECRET"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--slow", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="of the recipe, for all runs")
    arguments = parser.parse_intermixed_args()
    if arguments.slow:
        return train_slowly(arguments.overrides)
    os.environ.setdefault(SECRET, secrets.token_hex(16))
    os.environ["OMP_NUM_THREADS"] = "1"
    found = []
    for staleness in arguments.staleness:
        folder = arguments.out / f"staleness_{staleness}"
        with server(folder.with_suffix(".server.log")) as url:
            train(arguments, folder, staleness, url)
        found.append(measured(arguments.world, folder, staleness))
        print(json.dumps(found[-1]), flush=True)
    for row in found[1:]:
        ratio = row["updates_per_hour"] / found[0]["updates_per_hour"]
        print(f"max_staleness {row['max_staleness']}: {ratio:.2f} times the updates per hour")


def train_slowly(overrides: list[str]) -> None:
    """One learner rank, every call of a tool `TOOL_S` later."""
    from tapo_train import build, runs
    from tapo_train.recipe.compose import load_recipe

    plain = build.build_toolbox

    def slowed(*positional: Any, **named: Any) -> Any:
        toolbox = plain(*positional, **named)
        for policy in toolbox._policies.values():
            policy.tool.run = partial(later, policy.tool.run)
        return toolbox

    async def later(run: Any, *positional: Any) -> Any:
        await asyncio.sleep(TOOL_S)
        return await run(*positional)

    build.build_toolbox = slowed
    runs.train(load_recipe(RECIPE, overrides))


@contextmanager
def server(log: Path) -> Iterator[str]:
    """Its address, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.parent.mkdir(parents=True, exist_ok=True)
    command = ["nice", "-n", "10", sys.executable, "-m", "tapo_train"]
    command += ["serve-engine", RECIPE, "--port", str(port)]
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, process, log)
        yield url
    finally:
        process.terminate()
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 300) -> None:
    ends = time.monotonic() + seconds
    headers = {"Authorization": f"Bearer {os.environ[SECRET]}"}
    while time.monotonic() < ends and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", headers=headers).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    sys.exit(f"the engine server did not answer: see {log}")


def train(arguments: argparse.Namespace, folder: Path, staleness: int, url: str) -> None:
    world = arguments.world
    command = [
        *(sys.executable, __file__, "--world", str(world), "--out", str(arguments.out), "--slow"),
        *(f"run.dir={folder}", "run.wandb=disabled", "rollout/engine=server"),
        *(f"rollout.engine.urls=[{url}]", f"rollout.max_staleness={staleness}"),
        *(("algo/importance=truncate",) if staleness else ()),
        *(f"data.train=[{world}/train.jsonl]", f"data.validation=[{world}/validation.jsonl]"),
        *(f"tools.corpus={world}/corpus.jsonl", f"tools.image_index={world}/image_index.jsonl"),
        *arguments.overrides,
    ]
    if status := subprocess.run(command).returncode:
        sys.exit(f"the run ended with {status}")


def measured(world: Path, folder: Path, staleness: int) -> dict[str, float]:
    """Updates per hour, waiting, and accuracy on the test split."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    whole_s = sum(row["time/step_s"] for row in rows)
    rows = rows[FIRST:-LAST]
    seconds = sum(row["time/step_s"] for row in rows)
    command = [sys.executable, "-m", "tapo_train", "eval", "--model", str(folder / "export")]
    command += ["--tasks", str(world / "test.jsonl"), "--recipe", RECIPE]
    command += [f"tools.corpus={world}/corpus.jsonl"]
    command += [f"tools.image_index={world}/image_index.jsonl"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = re.search(r"^accuracy: ([0-9.]+).*n=(\d+)", printed, re.MULTILINE)
    if line is None:
        sys.exit(f"eval printed no accuracy:\n{printed}")
    return {
        "max_staleness": staleness,
        "updates_per_hour": round(3600 * len(rows) / seconds, 1),
        "whole_run_s": round(whole_s, 1),
        "accuracy": float(line[1]),
        "questions": int(line[2]),
        "waiting": round(sum(row["wait/rollouts"] for row in rows) / len(rows), 3),
    }


if __name__ == "__main__":
    main()
