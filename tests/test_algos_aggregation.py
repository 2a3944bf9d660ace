"""One mean over the step, however its tokens are cut."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from algos_batches import LOSSES, MODES, NORM_LENGTH, Padded, padded_batch

from tapo_train.algos.aggregation import aggregate
from tapo_train.algos.metrics import Metrics, finalise, merge, pair
from tapo_train.errors import ConfigError, LearnerError

TOLERANCE = 1e-12
"""Rounding of float64."""
ADVANTAGES = [1.2, -0.8, 0.3, -1.5, 0.7, -0.2, 0.9]
CUTS = ([7], [1, 6], [2, 1, 4], [1, 1, 1, 1, 1, 1, 1], [3, 0, 4])


def share(padded: Padded, logp: torch.Tensor, name: str, mode: str, counts: tuple[int, int]):  # type: ignore[no-untyped-def]
    """This part's share of the loss, and its metrics."""
    batch = padded.flat(logp)
    output = LOSSES[name](batch)
    loss = aggregate(
        output.per_token,
        batch.trajectory,
        batch.lengths,
        mode=mode,  # type: ignore[arg-type]
        step_tokens=counts[0],
        step_sequences=counts[1],
        norm_length=NORM_LENGTH,
    )
    return loss, output.metrics


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", 2.0),
        ("seq-mean-token-sum", 6.0),
        ("seq-mean-token-sum-norm", 0.75),
        ("seq-mean-token-mean", 2.0),
    ],
)
def test_the_four_means_of_a_small_example(mode: str, expected: float) -> None:
    found = aggregate(
        torch.tensor([1.0, 3.0, 2.0, 2.0, 4.0, 0.0]),
        torch.tensor([0, 0, 1, 1, 1, 1]),
        torch.tensor([2, 4]),
        mode=mode,  # type: ignore[arg-type]
        step_tokens=6,
        step_sequences=2,
        norm_length=8,
    )
    assert found.item() == expected


def test_sequence_mean_weighs_sequences_alike_and_token_mean_tokens() -> None:
    arguments = {"step_tokens": 5, "step_sequences": 2}
    values = torch.tensor([6.0, 1.0, 2.0, 3.0, 2.0])
    trajectory, lengths = torch.tensor([0, 1, 1, 1, 1]), torch.tensor([1, 4])
    tokens = aggregate(values, trajectory, lengths, mode="token-mean", **arguments)
    sequences = aggregate(values, trajectory, lengths, mode="seq-mean-token-mean", **arguments)
    assert tokens.item() == pytest.approx(14 / 5)
    assert sequences.item() == pytest.approx((6 + 2) / 2)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_cutting_into_micro_batches_changes_neither_loss_nor_gradient_nor_metrics(
    name: str, mode: str, cut: list[int]
) -> None:
    padded = padded_batch(ADVANTAGES, per_token=True)
    counts = (padded.num_tokens, padded.num_sequences)
    whole = padded.logp.clone().requires_grad_()
    expected, expected_metrics = share(padded, whole, name, mode, counts)
    expected.backward()
    pieces = padded.logp.clone().requires_grad_()
    total, metrics, start = 0.0, Metrics(), 0
    for size in cut:
        part = slice(start, start + size)
        loss, part_metrics = share(padded.trajectories(part), pieces[part], name, mode, counts)
        loss.backward()
        total, start, metrics = total + loss.item(), start + size, merge(metrics, part_metrics)
    assert total == pytest.approx(expected.item(), abs=TOLERANCE)
    torch.testing.assert_close(pieces.grad, whole.grad, rtol=0, atol=TOLERANCE)
    assert finalise(metrics) == pytest.approx(finalise(expected_metrics))


@pytest.mark.parametrize("mode", MODES)
def test_a_micro_batch_without_trained_tokens_adds_zero_and_still_reaches_the_parameters(
    mode: str,
) -> None:
    parameter = torch.ones(3, requires_grad=True)
    logprobs = (parameter.sum() * torch.ones(0)).requires_grad_()
    loss = aggregate(
        logprobs,
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
        mode=mode,  # type: ignore[arg-type]
        step_tokens=4,
        step_sequences=1,
        norm_length=2,
    )
    loss.backward()
    assert loss.item() == 0.0
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [0.0, 0.0, 0.0]


def test_tokens_with_zero_loss_stay_in_the_denominator() -> None:
    found = aggregate(
        torch.tensor([0.0, 0.0, 3.0]),
        torch.tensor([0, 0, 0]),
        torch.tensor([3]),
        mode="token-mean",
        step_tokens=3,
        step_sequences=1,
    )
    assert found.item() == 1.0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"step_tokens": 0}, LearnerError, "0 trained tokens"),
        ({"step_sequences": 0}, LearnerError, "0 sequences"),
        ({"mode": "mean"}, ConfigError, "'mean'"),
        ({"mode": "seq-mean-token-sum-norm"}, ConfigError, "norm_length is None"),
        ({"mode": "seq-mean-token-sum-norm", "norm_length": 0.0}, ConfigError, "norm_length"),
    ],
)
def test_impossible_counts_and_settings_are_refused(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {"mode": "token-mean", "step_tokens": 1, "step_sequences": 1, **changes}
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(error, match=message):
        aggregate(one, zero, one, **arguments)  # type: ignore[arg-type]


def test_metric_pairs_add_up_and_an_empty_one_is_zero() -> None:
    first = {"a": pair(torch.tensor([1.0, 3.0])), "only": pair(torch.tensor([True, False]))}
    second = {"a": pair(torch.tensor([8.0])), "empty": pair(torch.zeros(0))}
    assert finalise(merge(first, second)) == {"a": 4.0, "only": 0.5, "empty": 0.0}
    assert first["a"].tolist() == [4.0, 2.0]
    assert finalise({}) == {}


def one_rank(rank: int, rendezvous: str, folder: str) -> None:
    """Two ranks with 2 and 5 of the trajectories; gradients and counts are added up."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    padded = padded_batch(ADVANTAGES, per_token=True)
    part = slice(0, 2) if rank == 0 else slice(2, 7)
    mine = padded.trajectories(part)
    counts = torch.tensor([mine.num_tokens, mine.num_sequences])
    dist.all_reduce(counts)
    results = {}
    for name in LOSSES:
        for mode in MODES:
            shift = torch.zeros(padded.logp.shape[1], dtype=torch.float64, requires_grad=True)
            loss, metrics = share(
                mine, mine.logp + shift, name, mode, (int(counts[0]), int(counts[1]))
            )
            loss.backward()
            assert shift.grad is not None
            reduced = [loss.detach(), shift.grad, *metrics.values()]
            for value in reduced:
                dist.all_reduce(value)
            results[name, mode] = reduced
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_cutting_into_two_ranks_changes_neither_loss_nor_gradient_nor_metrics(tmp_path) -> None:  # type: ignore[no-untyped-def]
    mp.spawn(one_rank, args=(str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "results.pt")
    padded = padded_batch(ADVANTAGES, per_token=True)
    counts = (padded.num_tokens, padded.num_sequences)
    assert len(found) == len(LOSSES) * len(MODES)
    for (name, mode), values in found.items():
        shift = torch.zeros(padded.logp.shape[1], dtype=torch.float64, requires_grad=True)
        loss, metrics = share(padded, padded.logp + shift, name, mode, counts)
        loss.backward()
        expected = [loss.detach(), shift.grad, *metrics.values()]
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-9)
