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


def log_probability(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def likely_states(weight: torch.Tensor, targets: torch.Tensor, *, logit: float) -> torch.Tensor:
    """[K, h] states of rms 1 and more whose target has about the given logit, in bf16."""
    rows = weight[targets].float()
    noise = torch.randn(rows.shape)
    return (noise + logit * rows / rows.square().sum(-1, keepdim=True)).bfloat16()


def half_precision_head(width: int, vocabulary: int) -> nn.Linear:
    """Random rows, one in 64 of them drawn and the others the same turned around."""
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.in_features, linear.out_features = width, vocabulary
    drawn = torch.randn(vocabulary // 64, width).mul_(0.02).bfloat16()
    weight = torch.cat([drawn.roll(shift, dims=1) for shift in range(64)])
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@pytest.mark.slow
def test_bf16_weights_give_the_log_probabilities_of_float32_logits_at_the_shape_of_8_b():
    """In bf16 logits of 8 to 16 stand 1/16 apart."""
    torch.manual_seed(0)
    linear = half_precision_head(4096, 151_936)
    targets = torch.randint(0, 151_936, (16,))
    hidden = likely_states(linear.weight, targets, logit=13.0)
    found, entropy = LogprobHead.around(linear)(
        hidden, targets, temperature=0.7, banned=None, chunk=16, with_entropy=True
    )
    logits = torch.cat(
        [nn.functional.linear(hidden.float(), rows.float()) for rows in linear.weight.split(8192)],
        dim=1,
    )
    # In float64, as log_softmax in float32 loses 1e-4 over so many words.
    exact = logits.double() / 0.7
    wanted = log_probability(exact, targets).float()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    chances = exact.softmax(-1)
    wanted_entropy = -(chances * chances.log()).sum(-1).float()
    torch.testing.assert_close(entropy, wanted_entropy, atol=1e-4, rtol=0)
    rounded = log_probability(logits.bfloat16().double() / 0.7, targets).float()
    assert (rounded - wanted).abs().mean() > 100 * (found - wanted).abs().mean()


def test_rounding_alone_takes_no_sequence_ratio_out_of_the_clip_of_gspo():
    """32 trajectories of 32 tokens before and after a change of the states by four thousandths.

    The share of ratios outside [1 - 3e-4, 1 + 4e-4]: by float64, by logits rounded to bf16, and
    by the head: .19, .59 and .19. The states are the same bf16 numbers for all three.
    """
    torch.manual_seed(0)
    linear = half_precision_head(1024, 4096)
    targets = torch.randint(0, 4096, (32 * 32,))
    before = likely_states(linear.weight, targets, logit=9.0)
    after = (before.float() * (1 + 4e-3 * torch.randn(before.shape))).bfloat16()
    head = LogprobHead.around(linear)
    ways = {
        "exact": lambda h: log_probability(h.double() @ linear.weight.double().t(), targets),
        "rounded": lambda h: log_probability(
            nn.functional.linear(h, linear.weight).float(), targets
        ),
        "head": lambda h: head(
            h, targets, temperature=1.0, banned=None, chunk=400, with_entropy=False
        )[0],
    }
    ratios = {
        name: (way(after) - way(before)).double().reshape(32, 32).mean(1).exp()
        for name, way in ways.items()
    }
    outside = {
        name: float(((ratio < 1 - 3e-4) | (ratio > 1 + 4e-4)).double().mean())
        for name, ratio in ratios.items()
    }
    assert outside["head"] == outside["exact"]
    torch.testing.assert_close(ratios["head"], ratios["exact"], atol=1e-6, rtol=0)
    assert outside["rounded"] > outside["exact"] + 0.3
