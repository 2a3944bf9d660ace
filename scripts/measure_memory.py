"""Measure on the CPU what a scoring pass, an update and a sync hold, beside what was planned.

    python scripts/measure_memory.py [--ranks 1 2] [--stages 2 3] [--tokens 1024]

A Qwen3-VL of 36 M random parameters in bf16 (hidden 512, 6 layers, vocabulary 16,000) with
gradient checkpointing under DeepSpeed and gloo. Every allocation is seen by torch's profiler, and
tensors that live on are found by the garbage collector; nothing is estimated. With small buckets,
as the default of 500 M gradients would hide everything else at this size. Beside it, the engine:
keys and values that vLLM holds in one GiB.

On the CPU `a += b` of float32 and bf16 makes a float32 copy of b, which a GPU does not: the head's
gradient is planned with 10 bytes per element here, with 6 there.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tapo_train.algos.losses import grpo
from tapo_train.learner import distributed, memory
from tapo_train.learner.batch import MicroBatch, TrainingRow, join
from tapo_train.learner.memory import Plan
from tapo_train.learner.objective import policy_gradient
from tapo_train.learner.policy import Policy
from tapo_train.learner.settings import LearnerSettings
from tapo_train.learner.shape import ModelShape
from tapo_train.types import Span

CHUNK, BUCKET = 32, 1_000_000
CAST = 4
"""[B] per element of the head that the CPU alone takes."""
TOLERANCE = 0.10


def write_model(folder: Path) -> None:
    """Random weights in bf16."""
    text = {
        "vocab_size": 16_000,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": 512,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    marks = {name: 1000 + number for number, name in enumerate(names)}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **marks)
    Qwen3VLForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)


def micro_batch(tokens: int) -> MicroBatch:
    """One row, its last eighth trained."""
    span = Span(start=tokens - tokens // 8, end=tokens)
    row = TrainingRow(
        id="row",
        tokens=np.full(tokens, 300, dtype=np.int32),
        images=(),
        spans=(span,),
        advantages=np.ones(len(span)),
        sampler_logprobs=np.full(len(span), -6.0, dtype=np.float32),
    )
    return join([row])


def living() -> int:
    """[B] of all tensors."""
    gc.collect()
    held = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for item in gc.get_objects():
            if isinstance(item, torch.Tensor) and item.device.type == "cpu":
                storage = item.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def peak(call: Callable[[], Any]) -> int:
    """[B] of allocations at their highest, over those before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    results: Any = watched.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def planned(shape: ModelShape, plan: Plan, tokens: int) -> dict[str, float]:
    """[B] of each phase; between updates ZeRO-2 has no gradients."""
    states = memory.weight_bytes(shape, plan) + memory.optimizer_bytes(shape, plan)
    gradients = memory.gradient_bytes(shape, plan)
    buckets = memory.bucket_bytes(shape, plan)
    resting = states + (gradients if plan.zero_stage == 3 else 0.0) + buckets
    gathered = memory.gathered_bytes(shape, plan)
    kept, at_work = memory.activation_bytes(shape, plan, tokens=tokens)
    scored, layer = memory.scoring_bytes(shape, plan, tokens=tokens)
    head = memory.head_bytes(shape, plan) + CAST * shape.head_weights
    sync = 2.0 * shape.head_weights * memory.ELEMENT["bf16"] if plan.zero_stage == 3 else 0.0
    return {
        "resting": resting,
        "scoring": resting + gathered + scored + max(layer, memory.scored_head_bytes(shape, plan)),
        "update": states + gradients + buckets + gathered + kept + max(at_work, head),
        "sync": resting + sync,
    }


def measure(folder: Path, stage: int, tokens: int) -> None:
    """Print a row of the table for each phase, on rank 0."""
    torch.set_num_threads(1)
    settings = LearnerSettings(
        zero_stage=stage,
        gradient_checkpointing=True,
        freeze_vision=True,
        head_chunk_tokens=CHUNK,
        bucket_elements=BUCKET,
        live_elements=1,
    )
    before = living()
    policy = Policy(folder, settings=settings, pixels=lambda images: {}, measure_entropy=False)
    objective, batch = policy_gradient(grpo), micro_batch(tokens)
    policy.update([micro_batch(64)] * 2, objective)
    resting = living() - before
    found = {
        "resting": resting,
        "scoring": resting + peak(lambda: policy.logprobs(batch)),
        "update": resting + peak(lambda: policy.update([batch] * 2, objective)),
        "sync": resting + peak(lambda: [None for _ in policy.named_weights()]),
    }
    shape = ModelShape.of(policy.model.config)
    plan = Plan(
        zero_stage=stage,
        num_ranks=distributed.world_size(),
        freeze_vision=True,
        head_chunk_tokens=CHUNK,
        bucket_elements=BUCKET,
        live_elements=1,
    )
    if distributed.rank() == 0:
        for name, wanted in planned(shape, plan, tokens).items():
            ratio = wanted / found[name]
            mark = "" if abs(ratio - 1) <= TOLERANCE else "  MORE THAN 10 % OFF"
            print(
                f"| {plan.num_ranks} | {stage} | {name} | {wanted / 1e6:.0f} | "
                f"{found[name] / 1e6:.0f} | {ratio:.2f} |{mark}",
                flush=True,
            )
    policy.close()


def cache_of_engine() -> None:
    """Print the row of vLLM's keys and values in one GiB, with the demo's policy."""
    from transformers import AutoConfig

    from tapo_train.rollout.chat import ChatFormat
    from tapo_train.rollout.vllm_engine import VllmEngine, VllmOptions

    folder = Path(__file__).resolve().parent.parent / "assets" / "warm_start"
    engine = VllmEngine(ChatFormat(folder), VllmOptions(dtype="float32", max_model_len=1024))
    shape = ModelShape.of(AutoConfig.from_pretrained(folder))
    wanted = 2**30 / (2 * shape.layers * shape.kv_heads * shape.head_dim * 4)
    found = engine.capacity_tokens() or 0
    print(f"| 1 | vLLM | tokens in 1 GiB | {wanted:.0f} | {found} | {wanted / found:.2f} |")
    engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        folder, stage = arguments.worker
        measure(Path(folder), int(stage), arguments.tokens)
        return
    print("| ranks | ZeRO | phase | planned MB | measured MB | planned / measured |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch))
        for ranks in arguments.ranks:
            for stage in arguments.stages:
                launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
                worker = [__file__, "--tokens", str(arguments.tokens), "--worker"]
                command = [sys.executable, *launch, str(ranks), *worker, scratch, str(stage)]
                done = subprocess.run(
                    command, capture_output=True, text=True, check=True, env=os.environ
                )
                print("\n".join(x for x in done.stdout.splitlines() if x[:1] == "|"), flush=True)
    cache_of_engine()


if __name__ == "__main__":
    main()
