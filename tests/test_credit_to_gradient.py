"""From corrected advantages to the gradient: what the credit stage means for the tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from algos_batches import LOSSES, MODES, NORM_LENGTH
from credit_rows import TEXT, population, row, text
from torch import Tensor

from tapo_train.algos.aggregation import aggregate
from tapo_train.algos.losses import TokenBatch
from tapo_train.credit import NoTransfer, Tapo, TapoOptions, token_advantages
from tapo_train.credit.assigners import CreditAssigner
from tapo_train.credit.result import CallAdvantage
from tapo_train.credit.steps import from_trajectory
from tapo_train.types import (
    Observation,
    Reward,
    Span,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
    Turn,
)

UP, DOWN = population([1, 0, 0, 0])[:2]
"""One success of four: 0.8 · 1.732 is more than 0.577, so a full match is cut to 0."""
STEP, STRANGER, ANSWER = slice(0, 4), slice(4, 7), slice(7, 9)
"""The trained tokens of the three turns of the failing trajectory."""


def failing() -> Trajectory:
    """Turns of 4, 3 and 2 tokens after a prompt of 2 and observations of 1: a call that the
    success made too, a call that it did not make, an answer."""

    def call(query: str, start: int) -> ToolCall:
        span, seen = Span(start=start, end=start + 2), Observation(text="found")
        arguments = {"query": query}
        return ToolCall(
            name=TEXT, arguments=arguments, valid=True, executed=True, span=span, observation=seen
        )

    spans = (Span(start=2, end=6), Span(start=7, end=10), Span(start=11, end=13))
    calls = ((call("height of tower", 3),), (call("weather", 8),), ())
    turns = tuple(
        Turn(index=i, span=span, text="", calls=own, num_images_before=0)
        for i, (span, own) in enumerate(zip(spans, calls, strict=True))
    )
    return Trajectory(
        id="b", task=Task(id="q", question="?", images=(), answers=("a",)),
        tokens=np.zeros(13, dtype=np.int32), logprobs=np.zeros(9, dtype=np.float32), turns=turns,
        images=(), answer="b", stop=StopReason.ANSWER, reward=Reward(total=0.0, accuracy=0.0),
    )  # fmt: skip


def advantages(assigner: CreditAssigner) -> Tensor:
    """[9] of the failing trajectory's tokens, beside one success and two idle failures."""
    rows = [row("g", UP, text("height of tower"), images=())]
    rows += [row(name, DOWN, images=()) for name in ("c", "d")]
    result = assigner([*rows, from_trajectory(failing(), DOWN)])
    found = token_advantages(failing(), result.step_advantages[3], result.call_advantages[3])
    return torch.from_numpy(found)


def gradient(name: str, mode: str, given: Tensor) -> Tensor:
    """[9] derivative of the step's loss by the log-probability of every token."""
    # Another ratio at each token, but their mean within GSPO's narrow clip.
    log_ratio = torch.tensor([0.1, -0.1, 0.05, -0.05, 0.02, -0.02, 0.0, 0.03, -0.03]) * 1e-2
    batch = TokenBatch(
        logprobs=log_ratio.double().requires_grad_(),
        old_logprobs=torch.zeros(9, dtype=torch.float64),
        advantages=given,
        trajectory=torch.zeros(9, dtype=torch.int64),
        lengths=torch.tensor([9]),
    )
    loss = aggregate(
        LOSSES[name](batch).per_token,
        batch.trajectory,
        batch.lengths,
        mode=mode,  # type: ignore[arg-type]
        step_tokens=9,
        step_sequences=1,
        norm_length=NORM_LENGTH,
    )
    return torch.autograd.grad(loss, batch.logprobs)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_cut_to_zero_has_no_gradient_and_all_other_tokens_keep_theirs(
    name: str, mode: str
) -> None:
    base, corrected = advantages(NoTransfer()), advantages(Tapo(TapoOptions()))
    assert base.tolist() == [DOWN] * 9
    assert corrected[STEP].tolist() == [0.0] * 4
    before, after = gradient(name, mode, base), gradient(name, mode, corrected)
    assert (before != 0).all()
    assert after[STEP].tolist() == [0.0] * 4
    for part in (STRANGER, ANSWER):
        assert torch.equal(after[part], before[part])


@pytest.mark.parametrize("name", LOSSES)
def test_half_the_blame_is_half_the_gradient_of_that_step_alone(name: str) -> None:
    # 0.577 - beta · 1.732 = 0.577 / 2 for beta = 1/6.
    base, halved = advantages(NoTransfer()), advantages(Tapo(TapoOptions(beta=1 / 6)))
    before, after = gradient(name, "token-mean", base), gradient(name, "token-mean", halved)
    torch.testing.assert_close(after[STEP], before[STEP] / 2, rtol=1e-9, atol=0)
    assert torch.equal(after[STEP.stop :], before[STEP.stop :])


# Edge case 20 of the specification: a response that was cut inside a step.
def test_a_cut_response_has_advantages_of_its_kept_tokens_only() -> None:
    whole = failing()
    cut = replace(
        whole,
        tokens=whole.tokens[:9],
        logprobs=whole.logprobs[:6],
        turns=(whole.turns[0], replace(whole.turns[1], span=Span(start=7, end=9))),
        stop=StopReason.MAX_TOKENS,
        answer=None,
    )
    # The last call's span reaches one token beyond what was kept.
    assert cut.turns[1].calls[0].span == Span(start=8, end=10)
    found = token_advantages(cut, np.array([-0.5, -1.0]), (CallAdvantage(1, 0, -0.1),))
    assert found.tolist() == [-0.5] * 4 + [-1.0, -0.1]
    result = Tapo(TapoOptions())([row("g", UP, text("weather")), from_trajectory(cut, DOWN)])
    assert result.step_advantages[1].tolist() == [DOWN, 0.0]
