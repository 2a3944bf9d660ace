"""Rows to packed micro-batches, without a model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tapo_train.errors import AlignmentError, LearnerError
from tapo_train.learner.batch import TrainingRow, join, pack, predicting_positions
from tapo_train.learner.idle import apart, counting
from tapo_train.learner.inputs import model_inputs
from tapo_train.learner.layout import ModelLayout
from tapo_train.types import Image, ImageRef, Span, StopReason, Task, Trajectory, Turn

IMAGE, START, END, VIDEO = 90, 91, 92, 93
PICTURE = Image(sha256="0", data=b"", width=2, height=2, ref=ImageRef(root="sha256:0"))
LAYOUT = ModelLayout(
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    opening=(START,),
    closing=(END,),
    merge_size=2,
    dummy_shape=(4, 3),
    dummy_grid=(1, 2, 2),
    padding_token_id=END,
    positions=lambda tokens, types, grids: torch.arange(len(tokens)).expand(3, -1),
)


def two_features(images):
    """Each picture: a grid of 2 x 4 patches, so 2 features."""
    return {
        "pixel_values": torch.ones(8 * len(images), 3),
        "image_grid_thw": torch.tensor([[1, 2, 4]] * len(images)),
    }


def row(name, tokens, spans, *, images=(), weights=None):
    return TrainingRow.supervised(
        id=name,
        tokens=np.array(tokens, dtype=np.int32),
        images=images,
        spans=tuple(Span(start=a, end=b) for a, b in spans),
        weights=weights,
    )


def inputs_of(batch):
    return model_inputs(batch, layout=LAYOUT, pixels=two_features)


def test_each_trained_token_is_predicted_one_position_before_it():
    batch = join(
        [
            row("a", [10, 11, 12, 13, 14, 15], [(2, 4), (5, 6)], weights=[0.5, -1.0]),
            row("b", [20, 21, 22], [(2, 3)], weights=[2.0]),
        ]
    )
    assert batch.input_ids.tolist() == [10, 11, 12, 13, 14, 15, 20, 21, 22]
    assert batch.boundaries == (0, 6, 9)
    assert batch.trained_index.tolist() == [1, 2, 4, 7]
    assert batch.targets.tolist() == [12, 13, 15, 22]
    assert batch.trajectory.tolist() == [0, 0, 0, 1]
    assert batch.turn.tolist() == [0, 0, 1, 0] and batch.num_turns == 2
    assert join([]).num_turns == 0
    assert batch.lengths.tolist() == [3, 1]
    assert batch.advantages.tolist() == [0.5, 0.5, -1.0, 2.0]
    assert batch.advantages.dtype == torch.float32


def test_positions_start_where_the_row_starts():
    spans = (Span(start=1, end=3), Span(start=6, end=7))
    assert predicting_positions(spans, offset=100).tolist() == [100, 101, 105]


def test_a_rows_own_sampled_tokens_carry_the_advantage_of_their_turn():
    turns = tuple(
        Turn(index=i, span=Span(start=a, end=b), text="")
        for i, (a, b) in enumerate([(2, 5), (7, 8)])
    )
    trajectory = Trajectory(
        id="t",
        task=Task(id="q", question="", images=(), answers=()),
        tokens=np.arange(9, dtype=np.int32),
        logprobs=np.array([-1, -2, -3, -4], dtype=np.float32),
        turns=turns,
        images=(),
        answer=None,
        stop=StopReason.ANSWER,
    )
    batch = join([TrainingRow.from_turns(trajectory, [0.25, -2.0])])
    assert batch.targets.tolist() == [2, 3, 4, 7]
    assert batch.advantages.tolist() == [0.25, 0.25, 0.25, -2.0]
    assert batch.sampler_logprobs.tolist() == [-1, -2, -3, -4]
    assert batch.old_logprobs.tolist() == [-1, -2, -3, -4]
    with pytest.raises(LearnerError, match=r"row t: turn_advantages has shape \(3,\)"):
        TrainingRow.from_turns(trajectory, [1.0, 2.0, 3.0])


@pytest.mark.parametrize("spans", [[(0, 2)], [(2, 4), (3, 5)], [(4, 7)]])
def test_spans_that_overlap_leave_the_tokens_or_start_at_the_first_token_are_refused(spans):
    with pytest.raises(LearnerError, match="row x: span"):
        row("x", range(6), spans, weights=[1.0] * len(spans))


def test_numbers_per_token_must_match_the_spans():
    with pytest.raises(LearnerError, match=r"row x: sampler_logprobs has shape \(1,\)"):
        TrainingRow(
            id="x",
            tokens=np.arange(4, dtype=np.int32),
            images=(),
            spans=(Span(start=1, end=3),),
            advantages=np.zeros(2),
            sampler_logprobs=np.zeros(1, dtype=np.float32),
        )


@given(st.lists(st.integers(2, 30), max_size=12), st.integers(1, 40))
def test_packing_holds_every_row_once_and_overfills_only_for_a_row_that_is_too_long(
    lengths, budget
):
    rows = [row(str(i), [1] * n, [(1, 2)]) for i, n in enumerate(lengths)]
    batches = pack(rows, budget_tokens=budget)
    assert sorted(name for b in batches for name in b.row_ids) == sorted(r.id for r in rows)
    assert all(b.num_tokens <= budget or len(b.row_ids) == 1 for b in batches)
    roomy = [b for b in batches if 2 * b.num_tokens <= budget]
    assert len(roomy) <= 1


def test_a_budget_below_one_token_is_refused():
    with pytest.raises(LearnerError, match="budget_tokens is 0"):
        pack([], budget_tokens=0)


def test_rows_without_trained_tokens_are_not_counted_as_sequences():
    batch = join([row("a", [1, 2], []), row("b", [1, 2], [(1, 2)])])
    assert (batch.num_sequences, batch.num_trained, batch.num_tokens) == (1, 1, 4)


def test_a_batch_without_pictures_ends_with_the_smallest_picture_untrained():
    batch = join([row("a", [1, 2, 3], [(1, 3)]), row("b", [4, 5], [(1, 2)])])
    inputs = inputs_of(batch)
    assert inputs.input_ids.tolist() == [[1, 2, 3, 4, 5, START, IMAGE, END]]
    assert inputs.token_types.tolist() == [[0, 0, 0, 0, 0, 0, 1, 0]]
    assert inputs.boundaries == (0, 3, 8)
    assert inputs.positions[1, 0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert inputs.pixel_values.shape == (4, 3)
    assert inputs.grids.tolist() == [[1, 2, 2]]
    assert batch.trained_index.max() < 4


def test_a_batch_with_a_picture_gets_no_other():
    pictured = row("a", [1, START, IMAGE, IMAGE, END, 3], [(5, 6)], images=(PICTURE,))
    inputs = inputs_of(join([row("b", [7, 8], [(1, 2)]), pictured]))
    assert inputs.input_ids.tolist() == [[7, 8, 1, START, IMAGE, IMAGE, END, 3]]
    assert inputs.boundaries == (0, 2, 8)
    assert inputs.grids.tolist() == [[1, 2, 4]]


def test_a_picture_that_rows_share_is_processed_once():
    pad = [START, IMAGE, IMAGE, END]
    other = replace(PICTURE, sha256="1")
    asked = []

    def pixels(images):
        asked.append([image.sha256 for image in images])
        return two_features(images)

    rows = [
        row("a", [1, *pad, 3], [(5, 6)], images=(PICTURE,)),
        row("b", [1, *pad, *pad, 3], [(9, 10)], images=(other, PICTURE)),
    ]
    inputs = model_inputs(join(rows), layout=LAYOUT, pixels=pixels)
    assert asked == [["0", "1"]]
    assert inputs.pictures == (0, 1, 0)
    assert inputs.grids.shape == (2, 3)


def test_an_empty_batch_is_the_smallest_picture_alone():
    inputs = inputs_of(join([]))
    assert inputs.input_ids.tolist() == [[START, IMAGE, END]]
    assert inputs.boundaries == (0, 3)


@pytest.mark.parametrize(
    ("tokens", "images", "message"),
    [
        ([1, START, IMAGE, END], (PICTURE,), r"lengths \[1\], the pictures have \[2\]"),
        ([1, START, IMAGE, IMAGE, END], (PICTURE,) * 2, r"lengths \[2\], .* \[2, 2\]"),
        ([1, IMAGE, IMAGE], (), r"lengths \[2\], the pictures have \[\]"),
        ([1, VIDEO], (), "video placeholder"),
    ],
)
def test_image_tokens_that_disagree_with_the_pictures_are_refused(tokens, images, message):
    with pytest.raises(AlignmentError, match=f"row odd: .*{message}"):
        inputs_of(join([row("odd", tokens, [], images=images)]))


def test_idle_rows_are_counted_and_left_out():
    chat_free = [
        TrainingRow(
            id=name,
            tokens=np.arange(length, dtype=np.int32),
            images=(),
            spans=(Span(start=1, end=1 + len(advantages)),),
            advantages=np.array(advantages, dtype=np.float64),
            sampler_logprobs=np.zeros(len(advantages), dtype=np.float32),
        )
        for name, length, advantages in (
            ("active", 6, [0.0, -1.0]),
            ("idle", 9, [0.0, 0.0, -0.0]),
            ("empty", 4, []),
            ("long", 30, [0.5]),
        )
    ]
    active, idle = apart(chat_free)
    assert [row.id for row in idle] == ["idle", "empty"]
    skipped = counting(pack(active, budget_tokens=20), idle)
    assert [batch.row_ids for batch in skipped] == [("long",), ("active",)]
    assert [(b.idle_tokens, b.idle_sequences) for b in skipped] == [(3, 1), (0, 0)]
    assert [(b.num_trained, b.num_sequences) for b in skipped] == [(1, 1), (2, 1)]
    (alone,) = counting([], idle)
    assert (alone.num_tokens, alone.idle_tokens, alone.idle_sequences) == (0, 3, 1)
    assert counting(skipped[1:], []) == skipped[1:]
