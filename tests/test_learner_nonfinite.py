"""Updates that are not finite: dumped, then stopped at or left out."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_runs import run_ranks
from learner_rows import make_policy, some_rows, weights_of
from nonfinite_rank_worker import VARIANTS

from tapo_train.algos.metrics import finalise
from tapo_train.errors import DataError, NonFiniteError
from tapo_train.learner import nonfinite
from tapo_train.learner.batch import join
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.nonfinite import NonFiniteGuard, read_dump, write_dump
from tapo_train.learner.objective import supervised
from tapo_train.rollout.chat import ChatFormat

WORKER = Path(__file__).with_name("nonfinite_rank_worker.py")


@pytest.fixture(scope="module")
def folder(tiny_qwen3_vl):
    yield tiny_qwen3_vl
    end_process_group()


@pytest.fixture(scope="module")
def chat(folder):
    return ChatFormat(folder)


def explosive(batch, logprobs, entropy):
    """A finite loss whose gradient is not."""
    return replace(supervised(batch, logprobs, entropy), per_token=(logprobs * 0).sqrt() * 0)


def poisoned(batch, logprobs, entropy):
    """A loss that is not finite."""
    return replace(supervised(batch, logprobs, entropy), per_token=logprobs * torch.nan)


OFFLOADED = {"precision": "bf16", "offload_optimizer": True}


@pytest.mark.parametrize(
    "sharding",
    [
        *({"zero_stage": stage} for stage in (0, 1, 2, 3)),
        *({"zero_stage": stage} | OFFLOADED for stage in (1, 2, 3)),
    ],
    ids=str,
)
def test_after_a_skipped_update_the_next_one_is_as_if_it_had_not_been_asked_for(
    folder, chat, sharding, tmp_path
):
    settings = sharding | {"optimizer": "adamw", "learning_rate": 1e-3}
    settings |= {"warmup_updates": 3, "max_grad_norm": 1.0}
    guard = NonFiniteGuard(tmp_path, rank=0, skip=True)
    results = []
    # Each kind is followed by a healthy update: the one would clear up after the other.
    for objectives in ([supervised] * 3, [supervised, poisoned, supervised, explosive, supervised]):
        policy = make_policy(folder, chat, **settings)
        rows = some_rows(chat, policy.layout)
        batches = [join(rows[:1]), join(rows[1:])]
        learned = []
        for number, objective in enumerate(objectives):
            update = partial(policy.update, batches, objective)
            learned.append(finalise(guard(update, batches, name=str(number))))
        skipped = [row.pop("update/skipped") for row in learned]
        assert skipped == [float(objective is not supervised) for objective in objectives]
        assert [bool(row) for row in learned] == [not one for one in skipped]
        results.append(([row for row in learned if row], weights_of(policy)))
        policy.close()
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[1][1], results[0][1], atol=0, rtol=0)


def test_a_dump_gives_the_micro_batches_back_and_their_loss(folder, chat, tmp_path):
    policy = make_policy(folder, chat)
    rows = some_rows(chat, policy.layout)
    broken = replace(rows[1], advantages=np.full(rows[1].num_trained, np.inf))
    batches = [join([rows[0]]), join([broken, rows[2]])]
    assert any(batch.images[0] for batch in batches), "no picture to lose"
    guard = NonFiniteGuard(tmp_path / "nonfinite", rank=1, skip=False)
    with pytest.raises(NonFiniteError, match=r"loss of the step is .*/a\.rank_1\.npz"):
        guard(lambda: policy.update(batches, supervised), batches, name="a")
    message, found = read_dump(tmp_path / "nonfinite" / "a.rank_1.npz")
    assert "micro-batch of rows row-1, row-2" in message
    for ours, theirs in zip(found, batches, strict=True):
        for field in fields(ours):
            left, right = getattr(ours, field.name), getattr(theirs, field.name)
            if field.name == "images":
                assert [[i.data for i in row] for row in left] == [
                    [i.data for i in row] for row in right
                ]
            elif isinstance(left, torch.Tensor):
                assert torch.equal(left, right) and left.dtype == right.dtype
            else:
                assert left == right
        torch.testing.assert_close(policy.logprobs(ours), policy.logprobs(theirs), atol=0, rtol=0)
    policy.close()


def failing() -> dict[str, torch.Tensor]:
    raise NonFiniteError("the loss is nan")


def test_dumps_are_bounded_and_healthy_updates_leave_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nonfinite, "MOST_DUMPS", 2)
    guard = NonFiniteGuard(tmp_path / "dumps", rank=0, skip=True)
    healthy = finalise(guard(dict, [], name="good"))
    assert healthy == {"update/skipped": 0.0} and not (tmp_path / "dumps").exists()
    for number in range(3):
        assert finalise(guard(failing, [], name=str(number))) == {"update/skipped": 1.0}
    assert sorted(path.name for path in (tmp_path / "dumps").iterdir()) == [
        "0.rank_0.npz",
        "1.rank_0.npz",
    ]
    assert "not written, as" in capsys.readouterr().err.splitlines()[-1]
    assert NonFiniteGuard(tmp_path, rank=0, skip=False)(dict, [], name="x") == {}


@pytest.mark.parametrize("damage", ["text", "cut", "pickle", "other"])
def test_a_file_that_is_no_dump_is_refused(tmp_path, damage):
    path = tmp_path / "x.npz"
    write_dump(path, [join([])], message="m")
    if damage == "text":
        path.write_text("no archive")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "pickle":
        np.savez(path, message=np.array([{}], dtype=object))
    else:
        np.savez(path, message=np.array("m"), **{"0/input_ids": np.zeros(2)})
    with pytest.raises(DataError, match=r"x\.npz: no dump"):
        read_dump(path)


@pytest.mark.slow
def test_what_is_not_finite_on_one_rank_is_left_out_on_all_and_leaves_no_trace(folder, tmp_path):
    """Metrics, weights and optimizer state are those of the healthy updates alone, to the bit."""
    run_ranks(2, WORKER, folder, tmp_path, deadline_s=200)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name in VARIANTS:
        weights = []
        for rank, results in enumerate(ranks):
            (plain, *healthy), (learned, *after) = results[name]
            skipped = [row.pop("update/skipped") for row in learned]
            assert skipped == [1, 0, 1, 0], (name, rank)
            assert [row for row in learned if row] == [
                {k: v for k, v in row.items() if k != "update/skipped"} for row in plain
            ], name
            torch.testing.assert_close(after, healthy, atol=0, rtol=0, msg=f"{name}, rank {rank}")
            weights.append(after[0])
        torch.testing.assert_close(weights[0], weights[1], atol=0, rtol=0, msg=name)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            f"{number}.rank_{rank}.npz" for number in (0, 2) for rank in (0, 1)
        ]
