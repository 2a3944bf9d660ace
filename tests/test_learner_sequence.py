"""Ranks that share a micro-batch learn what one rank learns from all of it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_runs import run_ranks
from learner_rows import make_policy, some_rows
from sequence_rank_worker import kept_per_token, outcome
from test_config import sized
from transformers import AutoConfig

from tapo_train.errors import ConfigError, LearnerError
from tapo_train.learner import distributed
from tapo_train.learner.balance import same_place
from tapo_train.learner.batch import TrainingRow, join
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.inputs import model_inputs
from tapo_train.learner.memory import Plan, kept_bytes_per_token
from tapo_train.learner.sequence import SequenceGroup
from tapo_train.learner.settings import LearnerSettings
from tapo_train.learner.shape import ModelShape
from tapo_train.recipe.compose import batch_arithmetic
from tapo_train.rollout.chat import ChatFormat
from tapo_train.types import Span

WORKER = Path(__file__).with_name("sequence_rank_worker.py")
TOLERANCE = 1e-5
DEADLINE_S = 200


JOBS = (("qwen3_vl", 2, "zero 3 recomputing, grpo"), ("qwen2_5_vl", 4, "zero 2, gspo"))
"""Of four ranks: two groups of two; and one of more ranks than heads of keys."""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_that_share_a_micro_batch_learn_what_one_rank_learns(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    models: list[Path] = [request.getfixturevalue(f"tiny_{family}") for family, _, _ in JOBS]
    named = [f"{model}:{size}:{name}" for model, (_, size, name) in zip(models, JOBS, strict=True)]
    run_ranks(4, WORKER, tmp_path, *named, deadline_s=DEADLINE_S)
    found = torch.load(tmp_path / "results.pt", weights_only=True)
    for model, job, (_, _, name) in zip(models, named, JOBS, strict=True):
        theirs, ours = found[job], outcome(model, f"zero 0, {name.split(', ')[1]}", size=1)
        assert min(step["update/grad_norm"] for step in ours["steps"]) > 0.1
        for here, there in zip(ours["steps"], theirs["steps"], strict=True):
            assert there == pytest.approx(here, abs=TOLERANCE, rel=TOLERANCE), job
        for key in ("weights", "logprobs"):
            torch.testing.assert_close(theirs[key], ours[key], atol=TOLERANCE, rtol=0)
    assert found["heads"].startswith("sequence_parallel is 4 for 6 attention heads")
    # A rank keeps its share of a token, as the memory model says, and little more.
    keeps = kept_per_token(models[0], size=1)
    assert 1 / 2 < found["kept"] / keeps < 0.53
    shape = ModelShape.of(AutoConfig.from_pretrained(models[0]))
    alone, shared = (
        kept_bytes_per_token(shape, Plan(precision="fp32", sequence_parallel=size))
        for size in (1, 2)
    )
    assert found["kept"] / keeps == pytest.approx(shared / alone, rel=0.06)
    end_process_group()


def test_a_rank_computes_its_slice_and_padding_fills_the_last(tiny_qwen3_vl: Path) -> None:
    chat = ChatFormat(tiny_qwen3_vl)
    policy = make_policy(tiny_qwen3_vl, chat)
    batch = join([row(300, 5), row(400, 3)])
    inputs = model_inputs(batch, layout=policy.layout, pixels=chat.pixels, multiple_of=4)
    end = policy.layout.padding_token_id
    # 8 tokens, 3 of the smallest picture, 1 of padding that is a row of its own.
    assert inputs.input_ids[0, -2:].tolist() == [end, end]
    assert inputs.boundaries == (0, 5, 11, 12)
    assert inputs.positions[:, 0, -1].tolist() == [0, 0, 0]
    assert inputs.token_types.sum() == 1 and len(inputs.pictures) == 1
    policy.close()


def test_without_a_remainder_nothing_is_padded(tiny_qwen3_vl: Path) -> None:
    chat = ChatFormat(tiny_qwen3_vl)
    policy = make_policy(tiny_qwen3_vl, chat)
    rows = some_rows(chat, policy.layout)
    length = sum(len(r.tokens) for r in rows)
    inputs = model_inputs(
        join(rows),
        layout=policy.layout,
        pixels=chat.pixels,
        multiple_of=length,
    )
    assert inputs.boundaries[-1] == length and len(inputs.boundaries) == len(rows) + 1
    policy.close()


def row(first: int, length: int) -> TrainingRow:
    return TrainingRow.supervised(
        id=str(first),
        tokens=np.arange(first, first + length, dtype=np.int32),
        images=(),
        spans=(Span(start=1, end=2),),
    )


def test_a_row_goes_to_its_group_and_keeps_its_place_in_it() -> None:
    assert same_place([0, 1, 3, 2, 5], [1, 0, 1, 0, 2], ranks_per_group=2) == [2, 1, 3, 0, 5]
    assert same_place([0, 1, 2], [2, 1, 0], ranks_per_group=1) == [2, 1, 0]


def test_groups_that_the_ranks_or_the_heads_do_not_fill_are_refused() -> None:
    with pytest.raises(LearnerError, match="sequence_parallel is 2 on 1 ranks; wanted a divisor"):
        SequenceGroup(2)
    with pytest.raises(ConfigError, match=r"learner.sequence_parallel is 0; wanted >= 1"):
        LearnerSettings(sequence_parallel=0)
    group = SequenceGroup()
    group.size = 3
    with pytest.raises(LearnerError, match="sequence_parallel is 3 for 4 attention heads"):
        group.check_heads(4)
    group.check_heads(6)


def test_the_batch_arithmetic_counts_groups() -> None:
    text = batch_arithmetic(sized(sequence_parallel=2), 4)
    assert "at most 8 micro-batches × 2 groups of 2 ranks × 2 updates (32 trajectories" in text
    assert "per group and update" in text
    with pytest.raises(ConfigError, match=r"sequence_parallel: found 3 on 4 ranks, wanted a div"):
        batch_arithmetic(sized(sequence_parallel=3), 4)


@pytest.mark.parametrize("backend", [None, "gloo"])
def test_groups_of_ranks_wait_as_long_as_the_run_says(backend: str | None) -> None:
    end_process_group()
    distributed.init(timeout_s=77.0)
    group = distributed.neighbours(1, backend=backend)
    assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=77)
    end_process_group()
