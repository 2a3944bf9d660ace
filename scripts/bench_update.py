"""Measure C4: an update on trained tokens only, against TRL's on the same ragged batch.

    PEERS=DIR python scripts/bench_update.py [--rows 16] [--pairs 3] [--out FILE]

Both train the same text model (hidden 256, 4 layers, vocabulary 1024: body and head in the
proportion of a 7 B model, about 12:1) in float32 on one thread: ours as the language model
of a Qwen3-VL policy through `Policy.update`, optimizer step included; the peer through
`GRPOTrainer._compute_loss` and its backward pass. More than half of the padded batch is
padding, an eighth of the real tokens is trained. Loss and gradient are compared first.

The floor is the batch's FLOP (matrix products only) at the speed at which this machine,
within the same run, multiplies matrices of the layers' own shapes, plus torch's attention
over the rows' own lengths, which is slower per FLOP than a plain product on a CPU; the line
above the results also names the floor at the layers' speed throughout.

TRL is no dependency. To provide it:

    python -m pip install --no-deps --target DIR trl==1.16.0 datasets pandas xxhash \\
        multiprocess dill
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measures import RESULTS, Measure, append, cpu_s, load, peak_mb, versions
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3VLConfig
from transformers import Qwen3VLForConditionalGeneration as Qwen3VL

from tapo_train.algos.losses import grpo
from tapo_train.demo.tiny.model import build_tiny_policy
from tapo_train.learner.batch import TrainingRow, pack
from tapo_train.learner.objective import policy_gradient
from tapo_train.learner.policy import Policy
from tapo_train.learner.settings import LearnerSettings
from tapo_train.learner.shape import ModelShape
from tapo_train.types import Span

TARGETS = {"cpu": 3.5, "memory": 12.0, "floor": 1.1}
SLOPE = (0.9, 1.1)
TOLERANCE = 1e-5
CLIP = 0.2
VOCABULARY = 1024
PAD = 1000
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 256,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
}
MARKS = {
    "image_token_id": 1001,
    "video_token_id": 1002,
    "vision_start_token_id": 1003,
    "vision_end_token_id": 1004,
}
PEER_OPTIONS: dict[str, Any] = {
    "loss_type": "bnpo",
    "epsilon": CLIP,
    "beta": 0.0,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
}
"""Of TRL's `GRPOConfig`: our loss, on this machine."""
MEDIAN_TOKENS = 560
TURNS = 4


def ragged_rows(count: int, *, seed: int = 0) -> list[TrainingRow]:
    """Lognormal lengths around 560 tokens, four turns that hold an eighth of the tokens."""
    random = np.random.default_rng(seed)
    # Quantiles and not draws: the share of padding is the same for any number of rows.
    spread = np.array([statistics.NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
    lengths = np.exp(np.log(MEDIAN_TOKENS) + 0.55 * random.permutation(spread)).astype(int)
    return [_row(str(number), int(length), random) for number, length in enumerate(lengths)]


def _row(name: str, length: int, random: np.random.Generator) -> TrainingRow:
    slot, size = length // TURNS, round(length * 0.126 / TURNS)
    spans = tuple(
        Span(start=t * slot + slot // 3, end=t * slot + slot // 3 + size) for t in range(TURNS)
    )
    trained = TURNS * size
    return TrainingRow(
        id=name,
        tokens=random.integers(0, PAD, length).astype(np.int32),
        images=(),
        spans=spans,
        advantages=np.full(trained, random.normal()),
        sampler_logprobs=random.normal(-6.9, 0.1, trained).astype(np.float32),
    )


def write_model(folder: Path) -> Path:
    """A random Qwen3-VL policy whose language model is the one to be trained."""
    torch.manual_seed(0)
    rope = ROPE | {"mrope_section": [16, 8, 8], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=VISION,
        tie_word_embeddings=False,
        **MARKS,
    )
    Qwen3VL(config).save_pretrained(folder)
    return folder


class Ours:
    """`Policy.update` on packed micro-batches."""

    def __init__(self, folder: Path, rows: Sequence[TrainingRow], *, budget: int) -> None:
        settings = LearnerSettings(
            zero_stage=0,
            precision="fp32",
            optimizer="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
        )
        self.policy = Policy(folder, settings=settings, pixels=no_pictures, measure_entropy=True)
        self.batches = pack(rows, budget_tokens=budget)
        self._weights = [p.detach().clone() for p in self.policy.model.parameters()]
        self._objective = policy_gradient(
            functools.partial(grpo, clip_low=CLIP, clip_high=CLIP, dual_clip=None)
        )

    def __call__(self) -> float:
        """The loss; weights move by the gradient (SGD at rate 1) and are put back."""
        metrics = self.policy.update(self.batches, self._objective)
        loss = float(metrics["update/loss"][0])
        with torch.no_grad():
            torch._foreach_copy_(list(self.policy.model.parameters()), self._weights)
        return loss

    def gradient(self) -> dict[str, torch.Tensor]:
        """By the names of the language model alone."""
        before = {n: p.detach().clone() for n, p in self.policy.model.named_parameters()}
        self.policy.update(self.batches, self._objective)
        after = dict(self.policy.model.named_parameters())
        found = {n: before[n] - after[n].detach() for n in before}
        with torch.no_grad():
            for name, parameter in self.policy.model.named_parameters():
                parameter.copy_(before[name])
        return {n.replace("language_model.", ""): g for n, g in found.items()}


def no_pictures(images: Sequence[Any]) -> dict[str, torch.Tensor]:
    """These rows have none."""
    raise AssertionError(f"{len(images)} pictures in a batch of text")


class Peer:
    """TRL's loss and backward on the padded batch."""

    def __init__(self, folder: Path, rows: Sequence[TrainingRow], scratch: Path) -> None:
        GRPOConfig, GRPOTrainer, tokenizer = trl_parts(scratch)
        config = GRPOConfig(
            output_dir=str(scratch / "trl"),
            per_device_train_batch_size=len(rows),
            num_generations=len(rows),
            **PEER_OPTIONS,
        )
        from datasets import Dataset

        self.trainer = GRPOTrainer(
            model=text_model(folder, TEXT),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["a"] * len(rows)}),
            processing_class=tokenizer,
        )
        self.trainer.current_gradient_accumulation_steps = 1
        self.model = self.trainer.model
        self.model.train()
        self.inputs = padded(rows)

    def __call__(self) -> float:
        """The loss; gradients stay in the model."""
        self.model.zero_grad(set_to_none=True)
        loss = self.trainer._compute_loss(self.model, self.inputs)
        loss.backward()
        return float(loss.detach())

    def gradient(self) -> dict[str, torch.Tensor]:
        """Of the latest call."""
        self()
        return {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}


def text_model(folder: Path, text: dict[str, Any]) -> Qwen3ForCausalLM:
    """The language model of the policy in `folder`, which has these settings, as TRL trains it."""
    model = Qwen3ForCausalLM(Qwen3Config(**text, rope_parameters=ROPE))
    ours = Qwen3VL.from_pretrained(folder, dtype=torch.float32)
    state = ours.model.language_model.state_dict(prefix="model.")
    model.load_state_dict(state | {"lm_head.weight": ours.lm_head.weight})
    return model


def find_trl() -> bool:
    """Make the TRL in PEERS importable; False, and why on the console, if none is named."""
    if "PEERS" not in os.environ:
        print("skipped: PEERS names no folder with TRL; see the top of bench_update.py")
        return False
    sys.path.append(os.environ["PEERS"])
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    return True


def trl_parts(scratch: Path) -> tuple[Any, Any, Any]:
    """TRL's classes from PEERS, and a tokenizer that it asks for and does not use here."""
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(build_tiny_policy(scratch / "tokenizer"))
    return GRPOConfig, GRPOTrainer, tokenizer


def padded(rows: Sequence[TrainingRow]) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, completions on the right: as TRL's collator does."""
    starts = [row.spans[0].start for row in rows]
    prompt, completion = (
        max(starts),
        max(len(r.tokens) - s for r, s in zip(rows, starts, strict=True)),
    )
    out = {
        "prompt_ids": torch.full((len(rows), prompt), PAD),
        "prompt_mask": torch.zeros(len(rows), prompt, dtype=torch.long),
        "completion_ids": torch.full((len(rows), completion), PAD),
        "completion_mask": torch.zeros(len(rows), completion, dtype=torch.long),
        "tool_mask": torch.zeros(len(rows), completion, dtype=torch.long),
        "old_per_token_logps": torch.zeros(len(rows), completion),
        "advantages": torch.tensor([row.advantages[0] for row in rows], dtype=torch.float32),
    }
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        tokens, rest = (
            torch.from_numpy(row.tokens.astype(np.int64)),
            len(row.tokens) - start,
        )
        out["prompt_ids"][i, prompt - start :] = tokens[:start]
        out["prompt_mask"][i, prompt - start :] = 1
        out["completion_ids"][i, :rest] = tokens[start:]
        out["completion_mask"][i, :rest] = 1
        first = 0
        for span in row.spans:
            where = slice(span.start - start, span.end - start)
            out["tool_mask"][i, where] = 1
            values = row.sampler_logprobs[first : first + len(span)]
            out["old_per_token_logps"][i, where] = torch.from_numpy(values)
            first += len(span)
    return out


def compare(ours: Ours, peer: Peer) -> None:
    """Stop unless both sides give the same loss and gradient."""
    mine, theirs = ours(), peer()
    found, wanted = ours.gradient(), peer.gradient()
    scale = max(float(g.abs().max()) for g in wanted.values())
    gap = max(float((found[name] - wanted[name]).abs().max()) for name in wanted)
    print(f"loss {mine:.8f} and {theirs:.8f}, largest gradient gap {gap:.1e} at scale {scale:.1e}")
    if abs(mine - theirs) > TOLERANCE or gap > TOLERANCE * max(scale, 1.0):
        raise SystemExit("the two sides disagree; nothing was measured")


def flop_per_cpu_s(shape: ModelShape, tokens: int) -> float:
    """Speed of this machine at the products of one layer, forward and backward."""
    width, wide = shape.hidden, shape.intermediate
    across, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = [(width, across), (width, narrow), (width, narrow), (across, width)]
    sizes += [(width, wide), (width, wide), (wide, width)]
    products = [
        (torch.randn(tokens, k), torch.randn(n, k), torch.randn(tokens, n)) for k, n in sizes
    ]

    def layer() -> None:
        for states, weight, grad in products:
            states @ weight.t()
            grad @ weight
            grad.t() @ states

    layer()
    seconds = statistics.median(cpu_s(layer) for _ in range(5))
    return 6.0 * tokens * sum(k * n for k, n in sizes) / seconds


def attention_s(shape: ModelShape, lengths: Sequence[int]) -> float:
    """[s] CPU time of attention alone, forward and backward, over rows of these lengths."""

    def attention() -> None:
        for length in lengths:
            q, k, v = (
                torch.randn(1, heads, length, shape.head_dim, requires_grad=True)
                for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
            )
            mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            mixed.backward(torch.ones_like(mixed))

    return shape.layers * cpu_s(attention)


def floors_s(shape: ModelShape, rows: Sequence[TrainingRow], budget: int) -> tuple[float, float]:
    """[s] CPU time that the batch's matrix products alone would take.

    First with attention's products as slow as torch's attention is at these lengths, then with
    all products at the speed of the layers'.
    """
    lengths = [len(row.tokens) for row in rows]
    counts = [row.num_trained for row in rows]
    whole = sum(
        shape.update_flop(tokens=t, trained=k) for t, k in zip(lengths, counts, strict=True)
    )
    dense = 6.0 * (
        sum(lengths) * shape.layers * shape.layer_weights + sum(counts) * shape.head_weights
    )
    speed = flop_per_cpu_s(shape, budget)
    return dense / speed + attention_s(shape, lengths), whole / speed


def slope(folder: Path, budget: int) -> float:
    """Exponent of the time in the number of tokens, by least squares over batch sizes."""
    points = []
    for count in (8, 16, 32):
        rows = ragged_rows(count)
        ours = Ours(folder, rows, budget=budget)
        ours()
        seconds = statistics.median(cpu_s(ours) for _ in range(3))
        points.append((np.log(sum(len(r.tokens) for r in rows)), np.log(seconds)))
        ours.policy.close()
    x, y = np.array(points).T
    return float(np.polyfit(x, y, 1)[0])


def extra_mb(side: str, arguments: argparse.Namespace, *, budget: int, group: int) -> float:
    """Peak above the model and its batch [MB], in a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--peak-of",
        side,
        "--rows",
        str(arguments.rows),
    ]
    command += ["--budget", str(budget), "--group", str(group)]
    # Without the process group that this process's policy has described there.
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=alone)
    return float(done.stdout.splitlines()[-1])


def peak_of(side: str, arguments: argparse.Namespace, scratch: Path) -> float:
    """Of one call, after one on a small batch that makes what is made once."""
    folder, rows = write_model(scratch / "policy"), ragged_rows(arguments.rows)
    if side == "ours":
        ours = Ours(folder, rows[:1], budget=arguments.budget)
        ours()
        ours.batches = pack(rows, budget_tokens=arguments.budget)
        return peak_mb(ours)
    longest_first = sorted(rows, key=lambda row: -len(row.tokens))[: arguments.group]
    peer = Peer(folder, rows, scratch)
    peer.inputs = padded(rows[:1])
    peer()
    peer.inputs = padded(longest_first)
    return peak_mb(peer)


def measure(arguments: argparse.Namespace, scratch: Path) -> list[Measure]:
    """Time and memory against the peer, time against the floor, growth with the batch."""
    folder, rows = write_model(scratch / "policy"), ragged_rows(arguments.rows)
    describe(rows)
    ours = Ours(folder, rows, budget=arguments.budget)
    peer = Peer(folder, rows, scratch)
    compare(ours, peer)
    shape = ModelShape.of(ours.policy.model.config)
    times = [
        (cpu_s(ours), cpu_s(peer), *floors_s(shape, rows, arguments.budget))
        for _ in range(arguments.pairs)
    ]
    mine, theirs, floor, plain = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(t[1] / t[0] for t in times)
    print(
        f"ours {mine:.2f}, peer {theirs:.2f}, floor {floor:.2f}, at one speed {plain:.2f} CPU s",
        flush=True,
    )
    above = statistics.median(t[0] / t[2] for t in times)
    ours.policy.close()
    exponent = slope(folder, arguments.budget)
    everything = extra_mb("ours", arguments, budget=10**9, group=0)
    small = extra_mb("ours", arguments, budget=arguments.budget, group=0)
    batch, longest = (extra_mb("peer", arguments, budget=0, group=n) for n in (len(rows), 1))
    print(
        f"peak: ours {small:.0f} MB in micro-batches of {arguments.budget} tokens, "
        f"{everything:.0f} MB in one; peer {batch:.0f} MB, with its longest row alone "
        f"{longest:.0f} MB"
    )
    low, high = SLOPE
    return [
        result("cpu", mine, "CPU s", theirs, ratio=ratio, limit=TARGETS["cpu"]),
        result("memory", small, "MB", batch, ratio=batch / small, limit=TARGETS["memory"]),
        replace(
            result("floor", above, "times the floor", floor),
            peer="its matrix products alone [CPU s]",
            target=f"value <= {TARGETS['floor']}",
            met=above <= TARGETS["floor"],
        ),
        replace(
            result("slope", exponent, "exponent of the time in tokens"),
            target=f"value in [{low}, {high}]",
            met=low <= exponent <= high,
        ),
    ]


def result(
    name: str,
    value: float,
    unit: str,
    peer_value: float | None = None,
    *,
    ratio: float | None = None,
    limit: float = 0.0,
) -> Measure:
    """One line, for a target in times the peer."""
    return Measure(
        id=f"C4.update.{name}",
        value=round(value, 3),
        unit=unit,
        peer=None if peer_value is None else "TRL GRPOTrainer._compute_loss + backward",
        peer_value=None if peer_value is None else round(peer_value, 3),
        ratio=None if ratio is None else round(ratio, 2),
        target=f"ratio >= {limit:g}",
        met=ratio is not None and ratio >= limit,
        versions=versions("torch", "transformers", "trl"),
        load=load(),
    )


def describe(rows: Sequence[TrainingRow]) -> None:
    """How ragged the batch is."""
    real, trained = sum(len(r.tokens) for r in rows), sum(r.num_trained for r in rows)
    ends = padded(rows)
    total = ends["prompt_ids"].numel() + ends["completion_ids"].numel()
    print(
        f"{len(rows)} rows, {real} tokens, {1 - real / total:.0%} padding when padded, "
        f"{trained / real:.1%} trained"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--budget", type=int, default=2048, help="tokens of our micro-batches")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peak-of", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--group", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not find_trl():
        return
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.peak_of:
            print(peak_of(arguments.peak_of, arguments, Path(scratch)))
        else:
            append(measure(arguments, Path(scratch)), arguments.out)


if __name__ == "__main__":
    main()
