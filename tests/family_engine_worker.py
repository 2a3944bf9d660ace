"""Engine and learner over tiny random models of families, before and after three syncs.

Run by `test_families.py` in a process of its own, as vLLM takes the process group down with it; and
by hand for the table of docs/models.md:

    PYTHONPATH=.:tests python tests/family_engine_worker.py FOLDER KIND...
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from learner_rows import make_policy, make_row
from tiny_families import build

from tapo_train.learner.batch import TrainingRow, join
from tapo_train.learner.objective import supervised
from tapo_train.learner.policy import Policy
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.engine import Completion, GenerationRequest, Sampling
from tapo_train.rollout.vllm_engine import VllmEngine, VllmOptions
from tapo_train.types import Span

AGREEMENT = {"fp32": 1e-4, "bf16": 5e-2}
"""[nat] largest difference."""
TEMPERATURE = 0.8


def sampled_after(engine: VllmEngine, row: TrainingRow, *, max_tokens: int = 24) -> TrainingRow:
    """What the engine goes on with after a row, as a row to score."""
    request = GenerationRequest(
        id=row.id,
        tokens=row.tokens,
        images=row.images,
        max_tokens=max_tokens,
        sampling=Sampling(temperature=TEMPERATURE),
    )
    engine.submit(request)
    done: list[Completion] = []
    while engine.has_unfinished():
        done += engine.step()
    tokens = np.concatenate([row.tokens, done[0].tokens])
    return TrainingRow(
        id=row.id,
        tokens=tokens,
        images=row.images,
        spans=(Span(start=len(row.tokens), end=len(tokens)),),
        advantages=np.ones(len(done[0].tokens)),
        sampler_logprobs=done[0].logprobs,
    )


def apart(engine: VllmEngine, policy: Policy, rows: list[TrainingRow]) -> float:
    """[nat] the largest difference of what is sampled, and of the rows themselves."""
    found = [0.0]
    for row in rows:
        ours, theirs = (side.score(row.tokens, row.images) for side in (policy, engine))
        found.append(np.abs(ours - theirs).max())
        sampled = sampled_after(engine, row)
        ours = policy.logprobs(join([sampled])).numpy()
        found.append(np.abs(ours - sampled.sampler_logprobs).max())
    return float(max(found))


def measure(folder: Path, kind: str) -> None:
    """Compare before and after three updates and syncs."""
    chat = ChatFormat(build(kind, folder))
    # vLLM's linear attention takes nothing but bf16 on CPU.
    precision: Literal["fp32", "bf16"] = "fp32" if chat.family.packs else "bf16"
    dtype = "float32" if precision == "fp32" else "bfloat16"
    engine = VllmEngine(chat, VllmOptions(dtype=dtype, max_model_len=512, max_num_seqs=8))
    policy = make_policy(
        chat.model,
        chat,
        precision=precision,
        learning_rate=0.1,
        temperature=TEMPERATURE,
        banned_token_ids=chat.banned_token_ids,
    )
    sizes = [[(64, 96)], [], [(64, 64), (96, 64)]] if chat.family.sees else [[], [], []]
    rows = [make_row(chat, policy.layout, seed=i, sizes=size) for i, size in enumerate(sizes)]
    found = [apart(engine, policy, rows)]
    for version in range(1, 4):
        before = engine.score(rows[0].tokens, rows[0].images)
        policy.update([join([row]) for row in rows], supervised)
        engine.load_weights(policy.named_weights(), version=version)
        moved = np.abs(engine.score(rows[0].tokens, rows[0].images) - before).max()
        found.append(apart(engine, policy, rows))
        assert moved > 10 * max(found), f"the update did not reach the engine: {moved}, {found}"
    print(f"{kind}, {precision}: {' '.join(f'{value:.1e}' for value in found)}", flush=True)
    policy.close()
    engine.close()
    assert max(found) <= AGREEMENT[precision], kind


def one_by_one(measure: Callable[[Path, str], None], folder: Path, kinds: Sequence[str]) -> None:
    """Each in a fork of this process, so that the libraries are loaded once."""
    failed = []
    for kind in kinds:
        child = multiprocessing.get_context("fork").Process(
            target=measure, args=(folder / kind, kind)
        )
        child.start()
        child.join()
        failed += [kind] if child.exitcode else []
    assert not failed, failed
    print("agreed")


if __name__ == "__main__":
    one_by_one(measure, Path(sys.argv[1]), sys.argv[2:])
