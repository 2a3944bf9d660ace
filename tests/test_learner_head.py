"""The chunked head against plain log_softmax."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tapo_train.learner.head import LogprobHead

TOLERANCE = 1e-5
ROWS, WIDTH, VOCABULARY = 7, 5, 11


@pytest.fixture
def case():
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, VOCABULARY, bias=False)
    hidden = torch.randn(ROWS, WIDTH)
    targets = torch.randint(0, 8, (ROWS,))
    return linear, hidden, targets, torch.tensor([8, 10])


def expected(linear, hidden, targets, banned, temperature):
    logits = linear(hidden) / temperature
    if banned is not None:
        keep = torch.ones(VOCABULARY, dtype=torch.bool)
        keep[banned] = False
        logits = logits.masked_fill(~keep, -1e30)
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("bans", [False, True])
def test_values_and_gradients_equal_log_softmax(case, chunk, temperature, bans):
    linear, hidden, targets, banned = case
    banned = banned if bans else None
    first, second = torch.randn(ROWS), torch.randn(ROWS)
    results = []
    for is_ours in (False, True):
        states = hidden.clone().requires_grad_()
        linear.weight.grad = None
        if is_ours:
            logprobs, entropy = LogprobHead.around(linear)(
                states,
                targets,
                temperature=temperature,
                banned=banned,
                chunk=chunk,
                with_entropy=True,
            )
        else:
            logprobs, entropy = expected(linear, states, targets, banned, temperature)
        (logprobs @ first + entropy @ second).backward()
        results.append((logprobs, entropy, states.grad, linear.weight.grad))
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def test_no_trained_position_gives_no_number_and_a_gradient_of_zeros(case):
    linear, hidden, targets, _ = case
    states = hidden[:0].clone().requires_grad_()
    logprobs, _ = LogprobHead.around(linear)(
        states, targets[:0], temperature=1.0, banned=None, chunk=4, with_entropy=False
    )
    logprobs.sum().backward()
    assert logprobs.shape == (0,)
    assert torch.equal(linear.weight.grad, torch.zeros_like(linear.weight))


def test_entropies_are_left_out_unless_asked_for(case):
    linear, hidden, targets, _ = case
    _, entropy = LogprobHead.around(linear)(
        hidden, targets, temperature=1.0, banned=None, chunk=4, with_entropy=False
    )
    assert entropy.tolist() == [0.0] * ROWS
