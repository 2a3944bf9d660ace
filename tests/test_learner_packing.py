"""Packed = unpacked = Hugging Face, for any rows, in any order, cut in any way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from learner_rows import make_policy, make_row, weights_of
from transformers import AutoModelForImageTextToText

from tapo_train.learner.batch import TrainingRow, pack
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.objective import supervised
from tapo_train.learner.packing import best_fit
from tapo_train.learner.policy import Policy
from tapo_train.rollout.chat import ChatFormat

TOLERANCE = 1e-5
SIZES = ((64, 64), (96, 64), (64, 128))
BUDGETS = (1, 70, 10_000)
"""[tokens] each row alone, a few rows together, all in one."""

rows_with_pictures = st.lists(
    st.tuples(st.integers(1, 3), st.lists(st.sampled_from(SIZES), max_size=3)),
    min_size=1,
    max_size=4,
)
"""(seed, sizes of the pictures); equal seeds share tokens and pictures."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A policy, Hugging Face's model with the same weights, and their format."""

    policy: Policy
    model: torch.nn.Module
    chat: ChatFormat

    def rows(self, entries) -> list[TrainingRow]:
        made = [
            make_row(self.chat, self.policy.layout, seed=seed, sizes=sizes)
            for seed, sizes in entries
        ]
        return [replace(row, id=str(number)) for number, row in enumerate(made)]

    def wanted(self, row: TrainingRow) -> torch.Tensor:
        """[K] by the model's ordinary forward pass on the row alone."""
        tokens = torch.from_numpy(row.tokens.astype(np.int64))[None]
        is_image = (tokens == self.model.config.image_token_id).long()
        extra = self.chat.pixels(row.images) if row.images else {}
        logits = self.model(input_ids=tokens, mm_token_type_ids=is_image, **extra).logits[0]
        logprobs = logits[:-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        return torch.cat([logprobs[span.start - 1 : span.end - 1] for span in row.spans])

    def gradient(self, rows, *, budget_tokens: int) -> dict[str, torch.Tensor]:
        """Of one update; the weights are put back."""
        before = weights_of(self.policy)
        self.policy.update(pack(rows, budget_tokens=budget_tokens), supervised)
        after = weights_of(self.policy)
        with torch.no_grad():
            for name, parameter in self.policy.model.named_parameters():
                parameter.copy_(before[name])
        return {name: before[name] - after[name] for name in before}


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def pair(request):
    folder: Path = request.getfixturevalue(f"tiny_{request.param}")
    chat = ChatFormat(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    made = Pair(policy=make_policy(folder, chat), model=model, chat=chat)
    yield made
    made.policy.close()
    end_process_group()


def bounded(examples: int):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@bounded(30)
@given(entries=rows_with_pictures, budget=st.sampled_from(BUDGETS), data=st.data())
def test_packed_logprobs_are_hugging_faces_in_any_order_and_cut(pair, entries, budget, data):
    rows = pair.rows(entries)
    batches = pack(data.draw(st.permutations(rows)), budget_tokens=budget)
    with torch.no_grad():
        wanted = {row.id: pair.wanted(row) for row in rows}
    for batch in batches:
        found = pair.policy.logprobs(batch).split(batch.lengths.tolist())
        for name, logprobs in zip(batch.row_ids, found, strict=True):
            torch.testing.assert_close(logprobs, wanted.pop(name), atol=TOLERANCE, rtol=0)
    assert not wanted


@bounded(10)
@given(entries=rows_with_pictures, data=st.data())
def test_packed_gradients_are_hugging_faces_in_any_order_and_cut(pair, entries, data):
    rows = pair.rows(entries)
    count = sum(row.num_trained for row in rows)
    pair.model.zero_grad()
    for row in rows:
        (-(pair.wanted(row) * torch.from_numpy(row.advantages)).sum() / count).backward()
    for budget in BUDGETS:
        found = pair.gradient(data.draw(st.permutations(rows)), budget_tokens=budget)
        for name, parameter in pair.model.named_parameters():
            # A picture-free batch reaches the tower through a stand-in: its gradient is 0.
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[name], grad, atol=TOLERANCE, rtol=1e-4, msg=name)


def test_a_row_goes_where_the_least_room_is_left():
    assert best_fit([60, 55, 42, 3], budget_tokens=100) == [[0], [1, 2, 3]]
    assert best_fit([3, 42, 55, 60], budget_tokens=100) == [[3], [2, 1, 0]]


def test_a_row_that_fills_the_room_exactly_fits_and_one_token_more_does_not():
    assert best_fit([6, 4], budget_tokens=10) == [[0, 1]]
    assert best_fit([6, 5], budget_tokens=10) == [[0], [1]]


def test_equal_rows_keep_their_order():
    assert best_fit([5, 5, 5], budget_tokens=10) == [[0, 1], [2]]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=200), st.integers(100, 400))
def test_no_two_micro_batches_would_fit_in_one(lengths, budget):
    chosen = best_fit(lengths, budget_tokens=budget)
    assert sorted(i for batch in chosen for i in batch) == list(range(len(lengths)))
    filled = sorted(sum(lengths[i] for i in batch) for batch in chosen)
    assert filled[-1] <= budget
    assert len(filled) == 1 or filled[0] + filled[1] > budget
