"""Rows move between ranks until their work is even; what is learned stays the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_runs import run_ranks
from learner_rows import make_policy, picture, some_rows, weights_of
from transformers import AutoModelForImageTextToText

from tapo_train.algos.metrics import finalise
from tapo_train.families.vision_shape import VisionShape
from tapo_train.learner.balance import (
    Balanced,
    Description,
    Kept,
    Parcel,
    RowCost,
    pack_parcels,
)
from tapo_train.learner.batch import TrainingRow, pack
from tapo_train.learner.dealing import deal, evenness, imbalance, rank_of
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.objective import supervised
from tapo_train.learner.packing import best_fit
from tapo_train.learner.shape import ModelShape
from tapo_train.rollout.chat import ChatFormat
from tapo_train.types import Span

WORKER = Path(__file__).with_name("balance_rank_worker.py")
DEADLINE_S = 120
WEIGHT_TOLERANCE = 1e-6

SHAPE = ModelShape(
    layers=2,
    hidden=8,
    intermediate=16,
    heads=2,
    kv_heads=1,
    head_dim=4,
    vocabulary=100,
    is_tied=True,
    vision=VisionShape(
        layers=3,
        hidden=4,
        intermediate=8,
        mlp_matrices=2,
        patch_width=6,
        merge_size=2,
        out=8,
        mergers=1,
        window=None,
        full_layers=3,
        positions=5,
    ),
)


def row(tokens) -> TrainingRow:
    return TrainingRow.supervised(
        id="r", tokens=np.array(tokens, dtype=np.int32), images=(), spans=(Span(start=1, end=3),)
    )


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_a_models_weights_are_counted_from_its_configuration(request, family):
    folder = request.getfixturevalue(f"tiny_{family}")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    shape = ModelShape.of(model.config)
    matrices = {n: p.numel() for n, p in model.named_parameters() if p.ndim > 1}
    assert shape.weights == sum(matrices.values())
    assert shape.vision.weights == sum(n for name, n in matrices.items() if "visual" in name)


def test_the_cost_of_a_row_is_its_matrix_products_written_out():
    tokens = [1, 2, 90, 90, 3, 90, 4]
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    attention = 2 * 2 * (1 + 2 + 3 + 4 + 5 + 6 + 7) * 8 * 2
    text = 2 * 7 * 2 * layer + attention + 2 * 2 * 100 * 8
    tower = 0
    for patches in (8, 4):
        block = 4 * 4 * 4 + 2 * 4 * 8
        merged = (16 * 16 + 16 * 8) * patches // 4
        tower += 2 * patches * (3 * block + 6 * 4) + 2 * merged + 3 * 4 * patches * patches * 4
    cost = RowCost(shape=SHAPE, image_token_id=90)
    assert cost(row(tokens)) == pytest.approx(3 * (text + tower), rel=1e-12)


def test_a_windowed_tower_sees_the_whole_picture_in_few_layers_only(tiny_qwen2_5_vl):
    config = AutoModelForImageTextToText.from_pretrained(tiny_qwen2_5_vl).config
    vision = ModelShape.of(config).vision
    dense = vision.forward_flop(1) - 4 * 96 * 2
    # One of two layers is full; the other's windows are of 4 x 4 patches.
    assert vision.forward_flop(64) == pytest.approx(64 * (dense + 4 * 96 * (64 + 16)), rel=1e-12)


def test_costly_rows_are_dealt_out_first_each_to_the_micro_batch_with_the_least_work():
    costs = [3, 7, 5, 4, 6]
    dealt = deal(costs, [10] * 5, budget_tokens=30, num_ranks=2, home=[1, 0, 0, 0, 0])
    # In one micro-step 14 of a mean of 12.5 would be waited for; in two it is 7 and 6.
    assert dealt == [[[1], [4]], [[3, 0], [2]]]
    assert evenness(costs, dealt) == pytest.approx(13 / 12.5)
    assert imbalance(costs, [0] * 5, num_ranks=2) == 2.0


def test_a_micro_batch_goes_where_most_of_its_rows_are():
    # Rows that fill a micro-batch each.
    dealt = deal([3, 3, 3], [10] * 3, budget_tokens=10, num_ranks=3, home=[2, 0, 1])
    assert dealt == [[[1]], [[2]], [[0]]]
    assert rank_of(dealt, count=3) == [2, 0, 1]


def test_micro_batches_of_like_cost_meet_in_one_micro_step():
    # Four rows that fill a micro-batch each: 9 beside 8 and 2 beside 1.
    dealt = deal([9, 2, 8, 1], [10] * 4, budget_tokens=10, num_ranks=2, home=[0, 0, 0, 0])
    assert [sorted(rows[0] for rows in step) for step in zip(*dealt, strict=True)] == [
        [0, 2],
        [1, 3],
    ]
    assert evenness([9, 2, 8, 1], dealt) == pytest.approx((9 + 2) / 10)


def test_what_the_ranks_wait_for_is_the_most_costly_micro_batch_of_each_micro_step():
    # The sums are even, 8 each, but at either step one rank waits for the other.
    assert evenness([6, 2, 2, 6], [[[0], [1]], [[2], [3]]]) == pytest.approx((6 + 6) / 8)
    assert evenness([6, 2, 2, 6], [[[0], [1]], [[3], [2]]]) == 1.0
    assert evenness([6, 2], [[[0], [1]], []]) == pytest.approx(8 / 4)


@pytest.mark.parametrize("seed", range(40))
def test_every_row_is_trained_once_and_no_micro_batch_exceeds_the_budget(seed):
    random = np.random.default_rng(seed)
    rows, num_ranks = int(random.integers(0, 40)), int(random.integers(1, 10))
    lengths = random.integers(1, 50, rows).tolist()
    costs = (random.random(rows) * random.choice([0.0, 1.0, 1e15], rows)).tolist()
    home = random.integers(0, num_ranks, rows).tolist()
    dealt = deal(costs, lengths, budget_tokens=30, num_ranks=num_ranks, home=home)
    assert len(dealt) == num_ranks
    assert sorted(i for batches in dealt for batch in batches for i in batch) == [*range(rows)]
    for batch in (batch for batches in dealt for batch in batches):
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= 30
    # At most one micro-step more than full micro-batches would need.
    fewest = -(-len(best_fit(lengths, budget_tokens=30)) // num_ranks)
    assert max(map(len, dealt)) <= fewest + 1


@pytest.mark.parametrize(("rows", "ranks", "worst"), [(1024, 8, 1.03), (2048, 32, 1.06)])
def test_micro_steps_are_even_to_a_few_per_cent_whatever_a_rank_has_sampled(rows, ranks, worst):
    random = np.random.default_rng(0)
    lengths = np.exp(random.normal(np.log(6000), 0.6, rows)).clip(500, 32_768).astype(int)
    # Attention grows with the square.
    costs = [(n * (1 + n / 50_000)) for n in lengths.tolist()]
    # Three quarters of the rows are at two ranks; the others hold little.
    home = np.where(
        random.random(rows) < 0.75, random.integers(0, 2, rows), np.arange(rows) % ranks
    )
    dealt = deal(costs, lengths.tolist(), budget_tokens=32_768, num_ranks=ranks, home=home.tolist())
    assert evenness(costs, dealt) <= worst


def test_without_work_the_ranks_are_even():
    assert imbalance([], [], num_ranks=3) == 1.0
    assert deal([], [], budget_tokens=5, num_ranks=3, home=[]) == [[], [], []]
    assert evenness([], [[], [], []]) == 1.0
    assert imbalance([2, 4], [0, 1], num_ranks=4) == pytest.approx(4 / 1.5)


def test_alone_a_rank_keeps_its_rows_and_logs_nothing():
    rows = [row([1, 2, 3, 4]), row([5, 6, 7]), row([8, 9, 8, 9])]
    balanced = Balanced(cost=RowCost(shape=SHAPE, image_token_id=90), budget_tokens=8)
    kept = [[rows[0], rows[2]], [rows[1]]]
    assert balanced(rows) == (kept, {}) == Kept(budget_tokens=8)(rows)


def test_a_picture_is_sent_once_and_only_to_a_rank_that_lacks_it():
    red, green, blue = (picture(seed) for seed in range(3))
    pictured = [(red, green), (red,), (blue, red), (), (green,)]
    rows = [replace(row([1, 2, 3]), id=str(i), images=p) for i, p in enumerate(pictured)]
    told = [
        Description(cost=1.0, tokens=3, pictures=tuple(image.sha256 for image in shown))
        for shown in pictured
    ]
    brought = [told[:4], [], told[4:]]
    to_none, first, last = pack_parcels(rows[:4], brought, [0, 1, 1, 2, 1], rank=0)
    assert to_none == Parcel(rows=(), shown=(), pictures=())
    assert [r.id for r in first.rows] == ["1", "2"]
    assert all(r.images == () for r in first.rows)
    assert first.shown == ((red.sha256,), (blue.sha256, red.sha256))
    assert first.pictures == (red, blue)
    assert [r.id for r in last.rows] == ["3"] and last.pictures == ()
    (_, from_last, _) = pack_parcels(rows[4:], brought, [0, 1, 1, 2, 1], rank=2)
    assert from_last.pictures == (green,)
    # Had rank 0 brought green to rank 1 before, rank 2 would not.
    (_, again, _) = pack_parcels(rows[4:], brought, [1, 1, 1, 2, 1], rank=2)
    assert again.shown == ((green.sha256,),) and again.pictures == ()


@pytest.mark.slow
def test_rows_reach_a_rank_without_any_and_the_update_is_that_of_one_rank(tiny_qwen3_vl, tmp_path):
    run_ranks(3, WORKER, tiny_qwen3_vl, tmp_path, deadline_s=DEADLINE_S)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    chat = ChatFormat(tiny_qwen3_vl)
    policy = make_policy(tiny_qwen3_vl, chat, learning_rate=0.1)
    rows = some_rows(chat, policy.layout) * 2
    metrics = finalise(policy.update(pack(rows, budget_tokens=60), supervised))
    wanted = weights_of(policy)
    policy.close()
    end_process_group()
    held = [name for result in found for name, _ in result["rows"]]
    assert sorted(held) == sorted(f"row-{i}-{copy}" for i in range(4) for copy in "ab")
    assert found[2]["rows"]
    # Every row has its pictures again, in its order.
    pictures = {row.id: [image.sha256 for image in row.images] for row in rows}
    for result in found:
        for name, digests in result["rows"]:
            assert digests == pictures[name[:-2]]
    for result in found:
        assert result["loss"] == pytest.approx(metrics["update/loss"], abs=1e-6)
        assert result["trained"] < result["sampled"] == found[0]["sampled"]
        torch.testing.assert_close(result["weights"], wanted, atol=WEIGHT_TOLERANCE, rtol=0)
