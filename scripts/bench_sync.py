"""C12: handing weights to an engine under ZeRO-3 on two ranks: what is whole, what it costs.

    python scripts/bench_sync.py

A random Qwen3-VL of 46 million parameters (float32) is sharded over two processes; every weight
is streamed out as after an update and copied into a buffer that stands for the engine's. The
figures do not depend on the speed of the machine: elements and layers that were whole at a
time, resident memory above what was resident before, messages, and whether every bit arrived.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measures import RESULTS, Measure, append, load, versions

HIDDEN, LAYERS, VOCABULARY = 512, 12, 16_384
BUCKET = 2**20
"""[elements] smaller than a layer, as a bucket is beside the layers of a large model."""
RANKS = 2
TARGET_BUCKETS = 2.0


def build_model(folder: Path) -> None:
    """A larger sister of the tiny policy."""
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration

    from tapo_train.demo.tiny.model import build_tiny_policy

    build_tiny_policy(folder)
    config = AutoConfig.from_pretrained(folder)
    text = config.text_config
    text.hidden_size, text.intermediate_size = HIDDEN, 4 * HIDDEN
    text.num_hidden_layers, text.vocab_size = LAYERS, VOCABULARY
    config.vision_config.out_hidden_size = HIDDEN
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)


def resident(field: str) -> float:
    """A size of this process from /proc [MB]."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}")


def work(folder: Path, out: Path) -> None:
    """One rank."""
    # Every block of 64 kB or more goes back to the system when freed, so that none is served,
    # unseen, from a pool that something else has left behind.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    from transformers import AutoModelForImageTextToText

    from tapo_train.learner import distributed, engine, weights
    from tapo_train.learner.policy import Policy
    from tapo_train.learner.settings import LearnerSettings
    from tapo_train.rollout.chat import ChatFormat

    weights.GATHER_ELEMENTS = BUCKET
    settings = LearnerSettings(
        precision="fp32", zero_stage=3, optimizer="sgd", persistent_elements=0, live_elements=1
    )
    policy = Policy(folder, settings=settings, pixels=ChatFormat(folder).pixels)
    buffers = {name: tensor.clone() for name, tensor in policy.named_weights()}
    found = shape_of_stream(policy, weights, engine)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    for name, tensor in policy.named_weights():
        buffers[name].copy_(tensor)
    found["peak_mb"] = resident("VmHWM") - before
    policy.close()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    wanted = dict(model.named_parameters()) | {"lm_head.weight": model.lm_head.weight}
    found["different"] = sum(not torch.equal(buffers[n], wanted[n]) for n in wanted)
    found["missing"] = len(set(wanted) ^ set(buffers))
    ranks = distributed.all_gather_objects(found)
    if distributed.rank() == 0:
        out.write_text(json.dumps({name: max(rank[name] for rank in ranks) for name in found}))
    engine.end_process_group()


def shape_of_stream(policy: Any, weights: Any, engine: Any) -> dict[str, float]:
    """What is whole at a time while the weights leave."""
    named = list(policy.model.named_parameters())
    sizes: dict[str, int] = {}
    for name, parameter in named:
        layer = weights.layer_of(name.rpartition(".")[0])
        sizes[layer] = sizes.get(layer, 0) + engine.full_size(parameter)
    buckets = list(weights._buckets(policy.model))
    most_layers = most_elements = 0
    for _ in policy.named_weights():
        whole = [name for name, parameter in named if parameter.numel()]
        layers = {weights.layer_of(name.rpartition(".")[0]) for name in whole}
        most_layers = max(most_layers, len(layers))
        most_elements = max(most_elements, sum(p.numel() for _, p in named))
    largest = max(sum(engine.full_size(p) for _, p in bucket) for bucket in buckets)
    return {
        "parameters": len(named),
        "elements": sum(sizes.values()),
        "messages": len(buckets),
        "layers_whole": most_layers,
        "elements_whole": most_elements,
        "largest_layer": max(sizes.values()),
        "bucket_mb": largest * 4 / 1e6,
    }


def measures(found: dict[str, float]) -> list[Measure]:
    """The figures as records."""
    common: dict[str, Any] = {"versions": versions("torch", "deepspeed"), "load": load()}
    share = found["elements_whole"] / found["elements"]
    # Pages of small objects make the third digit noise.
    buckets = round(found["peak_mb"] / found["bucket_mb"], 2)
    wrong = found["different"] + found["missing"]
    return [
        Measure(
            id="C12.layers_whole",
            value=found["layers_whole"],
            unit=f"layers whole at a time ({share:.1%} of the elements)",
            target="value <= 1",
            met=found["layers_whole"] <= 1,
            **common,
        ),
        Measure(
            id="C12.peak",
            value=buckets,
            unit=f"buckets of {found['bucket_mb']:.0f} MB above the resident memory",
            target=f"value <= {TARGET_BUCKETS:g}",
            met=buckets <= TARGET_BUCKETS,
            **common,
        ),
        Measure(
            id="C12.messages",
            value=found["messages"],
            unit="gathers",
            peer="one for each weight",
            peer_value=found["parameters"],
            ratio=round(found["parameters"] / found["messages"], 2),
            target="ratio > 1",
            met=found["messages"] < found["parameters"],
            **common,
        ),
        Measure(
            id="C12.exact",
            value=wrong,
            unit="weights that are not bit for bit those of the file",
            target="value = 0",
            met=wrong == 0,
            **common,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.work:
        work(*arguments.work)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "model", Path(scratch) / "found.json"
        build_model(folder)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(RANKS), __file__, "--work", str(folder), str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, timeout=600)
        append(measures(json.loads(out.read_text())), arguments.out)


if __name__ == "__main__":
    main()
