"""Measure an update of a 4 B model on a GPU: tokens per second, MFU, peak memory by phase.

    python scripts/bench_gpu.py [--tokens 65536] [--peak-tflops 989] [--out FILE]
    python scripts/bench_gpu.py --cpu       # the same code with a tiny model, to try the script

The model has the shape of Qwen3-VL-4B-Instruct and random weights, in bf16 with gradient
checkpointing and ZeRO-2 on one device. Rows are ragged, an eighth of their tokens is trained,
each shows a picture. MFU counts the FLOP of the model, nothing twice, over --peak-tflops.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measures import RESULTS, Measure, append, load, versions
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tapo_train.algos.losses import grpo
from tapo_train.demo.tiny.model import build_tiny_policy
from tapo_train.learner.batch import TrainingRow, pack
from tapo_train.learner.memory import Plan, peak_bytes
from tapo_train.learner.objective import policy_gradient
from tapo_train.learner.policy import Policy
from tapo_train.learner.settings import LearnerSettings
from tapo_train.learner.shape import QWEN3_VL_4B, ModelShape
from tapo_train.types import Image, ImageRef, Span

TARGET_MFU = 0.4
GRID = (1, 16, 20)
"""Patches of each picture."""
PICTURE_TOKENS = 80
MARKS = {
    "image_token_id": 151_655,
    "video_token_id": 151_656,
    "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653,
}


def write_model(folder: Path, shape: ModelShape) -> Path:
    """Random weights of the given shape, made on the GPU, in bf16."""
    text = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.is_tied,
        "max_position_embeddings": 262_144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": shape.vision.layers,
        "hidden_size": shape.vision.hidden,
        "intermediate_size": shape.vision.intermediate,
        "num_heads": 16,
        "out_hidden_size": shape.hidden,
        "num_position_embeddings": shape.vision.positions,
        "deepstack_visual_indexes": [5, 11, 17],
    }
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=shape.is_tied, **MARKS
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    torch.cuda.empty_cache()
    return folder


def rows_of(policy: Policy, tokens: int) -> list[TrainingRow]:
    """Rows of a sixteenth of `tokens` on average, until they hold as many."""
    random, layout = np.random.default_rng(0), policy.layout
    rows: list[TrainingRow] = []
    while sum(len(row.tokens) for row in rows) < tokens:
        length = int(tokens / 16 * np.exp(random.normal(-0.1, 0.45)))
        ids = random.integers(300, 1000, length)
        (start,), (end,) = layout.opening, layout.closing
        shown = [start, *[layout.image_token_id] * PICTURE_TOKENS, end]
        ids[8 : 8 + len(shown)] = shown
        first, size = 20 + len(shown), length // 8
        rows.append(
            TrainingRow(
                id=str(len(rows)),
                tokens=ids.astype(np.int32),
                images=(_picture(len(rows)),),
                spans=(Span(start=first, end=first + size),),
                advantages=random.normal(size=size),
                sampler_logprobs=np.full(size, -6.0, dtype=np.float32),
            )
        )
    return rows


def _picture(number: int) -> Image:
    name = str(number)
    return Image(sha256=name, data=b"", width=1, height=1, ref=ImageRef(root=name))


def noise(width: int, images: Sequence[Image]) -> dict[str, torch.Tensor]:
    """Random patches of each picture."""
    count = int(np.prod(GRID)) * len(images)
    grids = torch.tensor([GRID] * len(images))
    return {"pixel_values": torch.randn(count, width), "image_grid_thw": grids}


def phase(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """[s] wall time, [B] peak of the device's memory (0 without one), and the answer."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    answer = call()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return seconds, float(torch.cuda.max_memory_allocated()) if cuda else 0.0, answer


def measure(arguments: argparse.Namespace, folder: Path) -> list[Measure]:
    """Scoring and update, after one of each that is not counted."""
    gpu = not arguments.cpu
    width = QWEN3_VL_4B.vision.patch_width
    settings = LearnerSettings(
        precision="bf16" if gpu else "fp32", zero_stage=2, gradient_checkpointing=True
    )
    policy = Policy(
        folder,
        settings=settings,
        pixels=functools.partial(noise, width),
        device="cuda" if gpu else "cpu",
        measure_entropy=False,
    )
    rows = rows_of(policy, arguments.tokens)
    batches = pack(rows, budget_tokens=arguments.budget)
    update = functools.partial(policy.update, objective=policy_gradient(grpo))
    update(policy.with_old_logprobs(batches))
    score_s, score_peak, scored = phase(lambda: policy.with_old_logprobs(batches))
    update_s, update_peak, _ = phase(lambda: update(scored))
    shape = ModelShape.of(policy.model.config)
    patches = int(np.prod(GRID))
    flop = sum(
        shape.update_flop(tokens=len(r.tokens), trained=r.num_trained, patches=[patches])
        for r in rows
    )
    mfu = flop / update_s / (arguments.peak_tflops * 1e12)
    plan = Plan(precision=settings.precision, zero_stage=2)
    largest = max(batches, key=lambda batch: batch.num_tokens)
    shown = patches * len(largest.row_ids)
    computed = peak_bytes(shape, plan, tokens=largest.num_tokens, patches=shown)
    tokens = sum(len(row.tokens) for row in rows)
    print(f"score {score_s:.2f} s, update {update_s:.2f} s, {tokens} tokens")
    return [
        figure("mfu", mfu, "share of the peak", f"value >= {TARGET_MFU}", mfu >= TARGET_MFU),
        figure("tokens", tokens / update_s, "tokens/s", "none", True),
        figure("score.memory", score_peak / 1e9, "GB", "none", True),
        figure(
            "update.memory",
            update_peak / 1e9,
            "GB",
            f"value <= {computed / 1e9:.1f} (docs/memory.md)",
            update_peak <= computed,
        ),
    ]


def figure(name: str, value: float, unit: str, target: str, met: bool) -> Measure:
    """One line."""
    return Measure(
        id=f"gpu.{name}",
        value=round(value, 4),
        unit=unit,
        target=target,
        met=met,
        versions=versions("torch", "transformers", "deepspeed"),
        load=load(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--budget", type=int, default=16_384, help="tokens of a micro-batch")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the device, bf16")
    parser.add_argument("--cpu", action="store_true", help="a tiny model, nothing is recorded")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not arguments.cpu and not torch.cuda.is_available():
        print("skipped: this bench needs a CUDA device (--cpu tries the script without one)")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "policy"
        if arguments.cpu:
            found = measure(arguments, build_tiny_policy(folder))
            print("\n".join(f"{m.id} {m.value} {m.unit}" for m in found))
        else:
            append(measure(arguments, write_model(folder, QWEN3_VL_4B)), arguments.out)


if __name__ == "__main__":
    main()
