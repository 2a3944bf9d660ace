"""Rows and policies for the learner's tests."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.profiler import ProfilerActivity, profile

from tapo_train.learner import packed_model
from tapo_train.learner.batch import TrainingRow, join
from tapo_train.learner.inputs import model_inputs
from tapo_train.learner.layout import ModelLayout
from tapo_train.learner.policy import Policy
from tapo_train.learner.sequence import ALONE, SequenceGroup
from tapo_train.learner.settings import LearnerSettings
from tapo_train.rollout.chat import ChatFormat
from tapo_train.types import Image, ImageRef, Span

torch.set_num_threads(1)  # these matrices are small, and idle threads wait by spinning

SETTINGS = {"precision": "fp32", "zero_stage": 0, "optimizer": "sgd", "learning_rate": 1.0}
"""SGD at rate 1 without clipping: the change of the weights IS the gradient."""


def picture(seed: int, *, width: int = 64, height: int = 64) -> Image:
    """Random pixels as PNG."""
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise).save(buffer, "PNG")
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    ref = ImageRef(root=f"sha256:{digest}")
    return Image(sha256=digest, data=buffer.getvalue(), width=width, height=height, ref=ref)


def make_row(
    chat: ChatFormat, layout: ModelLayout, *, seed: int, sizes: Sequence[tuple[int, int]] = ()
) -> TrainingRow:
    """Random text with pictures of the given sizes between two trained spans."""
    random = np.random.default_rng(seed)
    images = tuple(picture(seed * 10 + i, width=w, height=h) for i, (w, h) in enumerate(sizes))
    length = int(random.integers(5, 12))
    tokens = random.integers(300, 1000, length + 6).tolist()
    first = Span(start=length, end=length + 6)
    for image in images:
        pads = [layout.image_token_id] * chat.image_tokens(image)
        tokens += [*layout.opening, *pads, *layout.closing]
        tokens += random.integers(300, 1000, 2).tolist()
    second = Span(start=len(tokens) + 1, end=len(tokens) + 5)
    tokens += random.integers(300, 1000, 7).tolist()
    num_trained = len(first) + len(second)
    return TrainingRow(
        id=f"row-{seed}",
        tokens=np.array(tokens, dtype=np.int32),
        images=images,
        spans=(first, second),
        advantages=random.normal(size=num_trained),
        sampler_logprobs=random.normal(-7, 0.1, num_trained).astype(np.float32),
    )


def some_rows(chat: ChatFormat, layout: ModelLayout) -> list[TrainingRow]:
    """Rows with one, no, three and two pictures, of different sizes; of a model that takes any."""
    sizes: list[list[tuple[int, int]]] = [
        [(64, 96)],
        [],
        [(64, 64), (128, 64), (96, 96)],
        [(96, 64), (64, 64)],
    ]
    return [
        make_row(chat, layout, seed=i, sizes=entry if chat.family.sees else ())
        for i, entry in enumerate(sizes)
    ]


def make_policy(folder: Path, chat: ChatFormat, **changes: Any) -> Policy:
    """A float32 policy without clipping; `changes` go to the settings or the policy."""
    names = ("temperature", "banned_token_ids", "measure_entropy", "on_progress")
    own = {name: changes.pop(name) for name in names if name in changes}
    settings = LearnerSettings(**(SETTINGS | {"max_grad_norm": 0.0} | changes))
    return Policy(folder, settings=settings, pixels=chat.pixels, **own)


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    """A copy of every weight."""
    return {name: tensor.clone() for name, tensor in policy.named_weights()}


def kept_bytes(model: Any, length: int, sequence: SequenceGroup = ALONE) -> int:
    """Of the distinct tensors that autograd keeps of a forward pass, weights left out."""
    row = TrainingRow.supervised(
        id="r",
        tokens=np.full(length, 300, dtype=np.int32),
        images=(),
        spans=(Span(start=1, end=3),),
    )
    batch = join([row])
    inputs = model_inputs(
        batch, layout=ModelLayout.of(model), pixels=None, multiple_of=sequence.size
    )
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    head = {"temperature": 1.0, "banned": None, "chunk": 64, "with_entropy": False}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed_model.PackedModel(model, sequence)(
            inputs, batch.trained_index, batch.targets, **head
        )
        return sum(kept.values())


def peak_allocated(call: Callable[[], Any]) -> int:
    """[B] of allocations at their highest during a call, over those before; seen one by one."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    results: Any = watched.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest
