"""Every edge case of the specification of the credit stage, numbered as there."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from credit_rows import IMAGE, TEXT, ZOOM, population, row, search, text, zoom

from tapo_train.credit import CreditCall, CreditResult, CreditRow, Tapo, TapoOptions
from tapo_train.errors import CreditError
from tapo_train.types import ImageRef

UP, DOWN = population([1, 0])
"""+1 and -1: one success, one failing trajectory."""
MOVED = DOWN + 0.8
"""A failing step with similarity, support and reference advantage 1."""
QUERY = text("height of the tower")


def assign(rows: list[CreditRow], **options: Any) -> CreditResult:
    return Tapo(TapoOptions(**options))(rows)


def after(good: CreditCall, bad: CreditCall, **options: Any) -> float:
    """Advantage of a failing step `bad` beside a success that did `good`."""
    return float(assign([row("g", UP, good), row("b", DOWN, bad)], **options).step_advantages[1][0])


# 1
def test_without_a_success_nothing_moves_but_the_steps_are_counted() -> None:
    result = assign([row(str(i), -0.5, QUERY) for i in range(3)])
    assert [list(turns) for turns in result.step_advantages] == [[-0.5, -0.5]] * 3
    assert result.metrics["tapo/n_fail_steps"] == 3
    assert result.metrics["tapo/n_fail_steps_mixed"] == 0
    assert result.metrics["tapo/frac_fail_steps_corrected"] == 0
    assert "tapo/frac_fail_steps_corrected_mixed" not in result.metrics


# 2
@pytest.mark.parametrize(("correct", "count"), [(1.0, 4), (0.0, 4), (0.0, 1)])
def test_equal_rewards_and_lone_trajectories_are_left_alone(correct: float, count: int) -> None:
    result = assign([row(str(i), 0.0, QUERY, correct=correct) for i in range(count)])
    assert all(not turns.any() for turns in result.step_advantages)
    assert result.metrics["tapo/n_fail_traj"] == 0


# 3
def test_a_success_without_calls_lowers_the_support_of_the_others() -> None:
    up, down = population([1, 1, 0])[0], population([1, 1, 0])[2]
    idle = assign([row("a", up), row("b", up), row("c", down, QUERY)])
    assert idle.step_advantages[2][0] == down
    half = assign([row("a", up), row("b", up, QUERY), row("c", down, QUERY)])
    assert half.steps[2][0].support == 0.5


# 4
def test_the_calls_of_the_only_success_have_full_support() -> None:
    result = assign([row("g", UP, QUERY), row("b", DOWN, QUERY)])
    assert result.steps[1][0].support == 1.0
    nearly = text("height of the tall tower today")  # Jaccard 3/5
    assert after(QUERY, nearly, alpha_min=0.6) > DOWN
    assert after(QUERY, nearly, alpha_min=0.61) == DOWN


# 5
def test_an_empty_object_is_legal_for_a_tool_without_required_parameters() -> None:
    assert after(search(), search()) == MOVED


# 6
@pytest.mark.parametrize(
    "bad",
    [
        CreditCall(name=TEXT, arguments={}),
        CreditCall(name=ZOOM, arguments={}),
        text(""),
        text("  \n"),
        text(None),
        text([]),
        text(["tower", " "]),
        text(7),
        CreditCall(name=ZOOM, arguments={"bbox_2d": [0, 0, 10]}),
        CreditCall(name=ZOOM, arguments={"bbox_2d": [0, 0, "10", 10]}),
        CreditCall(name=ZOOM, arguments={"bbox_2d": [0, 0, True, 10]}),
    ],
)
def test_missing_or_empty_required_parameters_neither_teach_nor_learn(bad: CreditCall) -> None:
    assert after(bad, bad) == DOWN
    result = assign([row("g", UP, bad), row("b", DOWN, bad)])
    assert result.metrics["tapo/n_fail_steps"] == result.metrics["tapo/n_clusters"] == 0


# 7
@pytest.mark.parametrize("arguments", [None, "{}", {}, "null"])
def test_null_arguments_are_empty_ones(arguments: Any) -> None:
    moved = arguments != "null"  # a string that holds no object stays invalid
    bad = CreditCall(name=IMAGE, arguments=arguments)
    assert after(search(), bad) == (MOVED if moved else DOWN)


def test_a_string_with_an_object_in_it_is_parsed_once() -> None:
    once = json.dumps({"query": "height of the tower"})
    assert after(QUERY, CreditCall(name=TEXT, arguments=once)) == MOVED
    assert after(QUERY, CreditCall(name=TEXT, arguments=json.dumps(once))) == DOWN
    assert after(QUERY, CreditCall(name=TEXT, arguments="{'query': 1")) == DOWN
    assert after(QUERY, CreditCall(name=TEXT, arguments="[" * 100_000)) == DOWN


# 8
def test_an_invalid_call_keeps_its_penalty_and_teaches_nothing() -> None:
    broken = text("height of the tower", valid=False)
    assert after(QUERY, broken) == DOWN
    assert after(broken, QUERY) == DOWN


# 9
def test_extra_arguments_count_for_the_generic_similarity_only() -> None:
    extra = CreditCall(name=TEXT, arguments={"query": "height of the tower", "page": 2})
    assert after(QUERY, extra) == MOVED
    plain = CreditCall(name="lookup", arguments={"key": "tower"})
    more = CreditCall(name="lookup", arguments={"key": "tower", "page": 2})
    assert after(plain, more, theta=0.5) == pytest.approx(DOWN + 0.8 * 0.5)


# 10
def test_a_model_error_neither_teaches_nor_learns() -> None:
    failed = text("height of the tower", status="model_error")
    assert after(failed, QUERY) == DOWN
    assert after(QUERY, failed) == DOWN


# 11
def test_an_infrastructure_error_may_learn_but_not_teach() -> None:
    failed = text("height of the tower", status="infra_error")
    assert after(failed, QUERY) == DOWN
    assert after(QUERY, failed) == MOVED
    assert after(QUERY, failed, correct_infra_error=False) == DOWN


# 12
def test_no_results_is_an_answer_like_any_other() -> None:
    nothing = text("height of the tower", observation="No results found.")
    assert after(nothing, nothing) == MOVED


# 13
def test_a_call_repeated_in_one_success_counts_once() -> None:
    a = population([1.5, 1, 0, 0])
    rows = [row("a", a[0], QUERY, QUERY, QUERY), row("b", a[1], QUERY), row("c", a[2], QUERY)]
    record = assign(rows).steps[2][0]
    assert record.support == 1.0
    assert record.reference_advantage == pytest.approx((a[0] + a[1]) / 2)
    by_step = assign(rows, adv_agg="mean_step").steps[2][0]
    assert by_step.reference_advantage == pytest.approx((3 * a[0] + a[1]) / 4)


# 14
def test_every_copy_of_a_failing_call_is_corrected_unless_only_the_first_may() -> None:
    rows = [row("g", UP, QUERY, search()), row("b", DOWN, QUERY, search(), QUERY)]
    assert list(assign(rows).step_advantages[1]) == [MOVED] * 3 + [DOWN]
    first = assign(rows, correct_repeats="first")
    assert list(first.step_advantages[1]) == [MOVED, MOVED, DOWN, DOWN]
    assert first.metrics["tapo/n_fail_steps"] == 3


def test_a_first_copy_in_another_trajectory_does_not_count_as_a_repeat() -> None:
    a = population([1, 0, 0])
    rows = [row("g", a[0], QUERY), row("b", a[1], QUERY), row("c", a[2], QUERY)]
    result = assign(rows, correct_repeats="first")
    assert [steps[0].matched for steps in result.steps] == [False, True, True]


def test_another_way_to_ask_the_same_is_no_repeat() -> None:
    nearly = text("height of the tall tower")  # Jaccard 3/4: the same cluster, another call
    result = assign([row("g", UP, QUERY), row("b", DOWN, QUERY, nearly)], correct_repeats="first")
    assert [record.matched for record in result.steps[1]] == [True, True]


# 15
def test_clusters_never_mix_tools() -> None:
    assert after(QUERY, CreditCall(name="other_search", arguments=QUERY.arguments)) == DOWN
    rows = [row("g", UP, QUERY, search()), row("b", DOWN, zoom(0, 0, 10, 10))]
    record = assign(rows).steps[1][0]
    assert record.similarity is None and record.support is None and record.advantage == DOWN


def test_each_tool_of_a_group_has_its_own_support() -> None:
    a = population([1, 1, 0])
    good = [row("g", a[0], search(), QUERY), row("h", a[1], search())]
    records = assign([*good, row("b", a[2], QUERY, search())]).steps[2]
    assert [record.support for record in records] == [0.5, 1.0]


# 16
def test_aliases_of_arguments_and_tools_are_the_same_action() -> None:
    other = CreditCall(name=ZOOM, arguments={"bbox": [0, 0, 500, 500], "image_index": 0})
    assert after(zoom(0, 0, 500, 500), other) == MOVED
    renamed = CreditCall(name="crop", arguments={"bbox_2d": [0, 0, 500, 500]})
    assert after(zoom(0, 0, 500, 500), renamed) == DOWN
    assert after(zoom(0, 0, 500, 500), renamed, tool_aliases={"crop": ZOOM}) == MOVED


# 17
def test_parallel_calls_share_their_turns_correction() -> None:
    rows = [row("g", UP, [QUERY, search()]), row("b", DOWN, [QUERY, text("weather in paris")])]
    wanted = {"mean": DOWN + 0.4, "max": MOVED, "min": DOWN}
    for reduce, value in wanted.items():
        result = assign(rows, turn_reduce=reduce)
        assert result.step_advantages[1][0] == pytest.approx(value)
        assert result.call_advantages[1] == ()
    assert assign(rows).metrics["tapo/n_clusters"] == 2
    assert assign(rows).metrics["tapo/n_fail_steps"] == 1


def test_with_span_each_parallel_call_has_its_own_correction_and_the_thought_the_mean() -> None:
    rows = [row("g", UP, QUERY), row("b", DOWN, [QUERY, text("weather in paris")])]
    result = assign(rows, turn_reduce="span")
    assert result.step_advantages[1][0] == pytest.approx(DOWN + 0.4)
    assert [tuple(call) for call in result.call_advantages[1]] == [(0, 0, MOVED), (0, 1, DOWN)]


def test_calls_beyond_the_executed_ones_are_not_counted() -> None:
    rows = [row("g", UP, QUERY), row("b", DOWN, [QUERY, text("weather", executed=False)])]
    assert assign(rows).step_advantages[1][0] == MOVED


# 18
def test_a_call_beside_an_answer_counts_only_if_it_was_executed() -> None:
    assert after(QUERY, text("height of the tower", executed=True)) == MOVED
    assert after(QUERY, text("height of the tower", executed=False)) == DOWN


# 19
def test_a_call_the_budget_cut_off_keeps_its_advantage_unless_told_otherwise() -> None:
    last = text("height of the tower", executed=False)
    assert after(QUERY, last) == DOWN
    assert after(QUERY, last, correct_unexecuted=True) == MOVED
    assert after(last, QUERY, correct_unexecuted=True) == DOWN


# 21
def test_a_discarded_success_counts_for_support_and_teaches_nothing() -> None:
    a = population([1, 1, 0])
    bad = row("b", a[2], QUERY)
    gone = assign([row("g", a[0], QUERY), row("d", a[1], QUERY, discarded=True), bad])
    assert gone.steps[2][0].support == 0.5
    alone = assign([row("d", a[1], QUERY, discarded=True), bad])
    assert alone.steps[1][0].similarity is None


def test_a_discarded_failing_row_is_neither_corrected_nor_counted() -> None:
    result = assign([row("g", UP, QUERY), row("b", DOWN, QUERY, discarded=True)])
    assert list(result.step_advantages[1]) == [DOWN, DOWN]
    assert result.metrics["tapo/n_fail_traj"] == result.metrics["tapo/n_fail_steps"] == 0


# 22: the loss mask of an overlong trajectory is the learner's; here it is failing as usual.
def test_a_failing_row_without_an_answer_turn_is_corrected() -> None:
    cut = CreditRow(
        id="b",
        group="q",
        correct=0.0,
        advantage=DOWN,
        num_turns=1,
        steps=row("b", DOWN, QUERY).steps,
    )
    assert list(assign([row("g", UP, QUERY), cut]).step_advantages[1]) == [MOVED]


# 23
def test_a_correction_beyond_zero_is_cut_unless_switched_off() -> None:
    a = population([1, 0, 0, 0])
    rows = [row(str(i), value, QUERY) for i, value in enumerate(a)]
    cut, free = assign(rows), assign(rows, use_clip=False)
    assert cut.step_advantages[1][0] == 0.0 and cut.steps[1][0].clipped
    assert free.step_advantages[1][0] == a[1] + 0.8 * a[0] and not free.steps[1][0].clipped
    assert cut.metrics["tapo/clip_frac"] == 1.0 and free.metrics["tapo/clip_frac"] == 0.0


def test_a_correction_to_exactly_zero_is_not_a_cut() -> None:
    result = assign([row("g", UP, QUERY), row("b", DOWN, QUERY)], beta=1.0)
    assert result.step_advantages[1][0] == 0.0 and not result.steps[1][0].clipped
    assert result.metrics["tapo/clip_frac"] == 0.0


# 24
def test_a_closed_gate_leaves_the_old_value_bit_for_bit() -> None:
    odd = -0.1 - 0.2
    rows = [row("g", UP, QUERY), row("b", odd, QUERY)]
    for options in ({"theta_by_tool": {TEXT: 1.0}}, {"alpha_min": 1.0}):
        near = [rows[0], row("b", odd, text("height of the tall tower"))]
        assert assign(near, **options).step_advantages[1].tobytes() == np.full(2, odd).tobytes()
    assert assign(rows, beta=0.0).step_advantages[1].tobytes() == np.full(2, odd).tobytes()


# 25
def test_a_reference_no_better_than_average_transfers_nothing() -> None:
    rows = [row("g", -0.5, QUERY, correct=1.0), row("b", -1.0, QUERY, correct=0.0)]
    result = assign(rows, success_rule="outcome")
    assert result.steps[1][0].reference_advantage == -0.5
    assert result.steps[1][0].transfer == 0.0 and result.step_advantages[1][0] == -1.0


# 26
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_advantage_is_refused_by_name(value: float) -> None:
    with pytest.raises(CreditError, match="row 'b' of group 'q'"):
        assign([row("g", UP, QUERY), row("b", value, QUERY, correct=0.0)])


def test_an_overflowing_correction_is_refused() -> None:
    with pytest.raises(CreditError, match="not finite"):
        assign([row("g", 1e308, QUERY), row("b", -1.0, QUERY)], beta=10.0)


# 27
def test_image_search_without_argument_means_all_pictures_of_the_question() -> None:
    def attempt(name: str, advantage: float, call: CreditCall, *roots: str) -> CreditRow:
        images = [ImageRef(root=root) for root in roots]
        made = row(name, advantage, call, images=images)
        return CreditRow(
            id=made.id, group="q", correct=made.correct, advantage=advantage, num_turns=2,
            steps=made.steps, images=made.images, num_input_images=len(roots),
        )  # fmt: skip

    def moved(good: CreditRow, bad: CreditRow) -> bool:
        return assign([good, bad]).steps[1][0].matched

    first = CreditCall(name=IMAGE, arguments={"img_idx": 0})
    second = CreditCall(name=IMAGE, arguments={"img_idx": 1})
    assert moved(attempt("g", UP, search(), "x", "y"), attempt("b", DOWN, search(), "x", "y"))
    assert not moved(attempt("g", UP, search(), "x", "y"), attempt("b", DOWN, search(), "x", "z"))
    # Without an index the tool looks at the first picture.
    assert moved(attempt("g", UP, search(), "x", "y"), attempt("b", DOWN, first, "x", "y"))
    assert not moved(attempt("g", UP, search(), "x", "y"), attempt("b", DOWN, second, "x", "y"))
    there = attempt("g", UP, zoom(0, 0, 9, 9, img_idx=1), "x", "y")
    assert moved(there, attempt("b", DOWN, zoom(0, 0, 9, 9, img_idx=1), "z", "y"))
    assert not moved(there, attempt("b", DOWN, zoom(0, 0, 9, 9, img_idx=1), "x", "z"))


def test_pictures_that_tools_brought_are_no_part_of_an_image_search_without_argument() -> None:
    photo = ImageRef(root="photo")
    good = row("g", UP, search(), images=[photo, ImageRef(root="t")])
    bad = row("b", DOWN, search(), images=[photo, ImageRef(root="u")])
    assert assign([good, bad]).steps[1][0].similarity == 1.0


# 28
def test_without_pictures_image_calls_are_invalid_and_text_search_works() -> None:
    def rows(call: CreditCall) -> list[CreditRow]:
        return [row("g", UP, call, images=()), row("b", DOWN, call, images=())]

    assert assign(rows(search())).metrics["tapo/n_fail_steps"] == 0
    assert assign(rows(zoom(0, 0, 9, 9))).metrics["tapo/n_fail_steps"] == 0
    assert assign(rows(QUERY)).step_advantages[1][0] == MOVED


def test_a_text_only_question_can_search_the_first_picture_once_a_tool_has_brought_one() -> None:
    def attempt(name: str, advantage: float, root: str, visible: int) -> CreditRow:
        images = [ImageRef(root=root)]
        made = row(name, advantage, search(), images=images, num_images=visible)
        return replace(made, num_input_images=0)

    same = assign([attempt("g", UP, "t", 1), attempt("b", DOWN, "t", 1)])
    assert same.steps[1][0].similarity == 1.0
    other = assign([attempt("g", UP, "t", 1), attempt("b", DOWN, "u", 1)])
    assert other.steps[1][0].similarity == 0.0
    early = assign([attempt("g", UP, "t", 1), attempt("b", DOWN, "t", 0)])
    assert early.metrics["tapo/n_fail_steps"] == 0


# 29
def test_the_same_question_under_another_id_is_another_group() -> None:
    result = assign([row("g", UP, QUERY, group="q1"), row("b", DOWN, QUERY, group="q2")])
    assert result.step_advantages[1][0] == DOWN


# 30
def test_case_punctuation_and_articles_do_not_matter() -> None:
    record = assign([row("g", UP, QUERY), row("b", DOWN, text("HEIGHT, of a tower?!"))]).steps[1][0]
    assert record.similarity == 1.0


# 31
def test_a_query_in_another_language_keeps_its_advantage() -> None:
    assert after(QUERY, text("塔的高度")) == DOWN


# 32
def test_a_zoom_into_the_whole_picture_is_legal() -> None:
    whole = zoom(0, 0, 1000, 1000)
    assert after(whole, whole) == MOVED
    record = assign([row("g", UP, whole), row("b", DOWN, zoom(0, 0, 1000, 800))]).steps[1][0]
    assert record.similarity == pytest.approx(0.8)


# 33
def test_nested_crops_are_compared_in_the_frame_of_their_root() -> None:
    crop = ImageRef(root="photo", box=(0.1, 0.1, 0.5, 0.5))
    photo = ImageRef(root="photo")
    nested = row("g", UP, zoom(500, 500, 1000, 1000, img_idx=1), images=[photo, crop])
    direct = row("b", DOWN, zoom(300, 300, 500, 500))
    assert assign([nested, direct]).steps[1][0].similarity == 1.0
    flat = ImageRef(root="photo", box=(0.1, 0.2, 0.5, 0.4))
    inner = row("g", UP, zoom(500, 500, 1000, 1000, img_idx=1), images=[photo, flat])
    found = row("b", DOWN, zoom(300, 300, 500, 400))
    assert assign([inner, found]).steps[1][0].similarity == 1.0
    thumbnail = row(
        "b", DOWN, zoom(300, 300, 500, 500, img_idx=1), images=[photo, ImageRef(root="t")]
    )
    assert assign([nested, thumbnail]).steps[1][0].similarity == 0.0


def test_nested_crops_are_resolved_to_a_billionth_of_the_root() -> None:
    crop = ImageRef(root="photo", box=(0.1, 0.1, 0.5, 0.5))
    pictures = [ImageRef(root="photo"), crop]
    nested = row("g", UP, zoom(503, 3, 997, 997, img_idx=1), images=pictures)
    # 0.1 + 0.4 x 0.503, 0.1 + 0.4 x 0.003, 0.1 + 0.4 x 0.997.
    direct = row("b", DOWN, zoom(301.2, 101.2, 498.8, 498.8))
    assert assign([nested, direct]).steps[1][0].similarity == 1.0


def test_regions_are_not_rounded_to_what_a_policy_can_see() -> None:
    crop = ImageRef(root="photo", box=(0.1, 0.1, 0.5, 0.5))
    nested = row("g", UP, zoom(503, 3, 997, 997, img_idx=1), images=[ImageRef(root="photo"), crop])
    around = assign([nested, row("b", DOWN, zoom(301, 101, 499, 499))]).steps[1][0]
    # 0.3012 to 0.4988 and 0.1012 to 0.4988 of the root, inside a box with three decimals.
    assert around.similarity == pytest.approx(0.1976 * 0.3976 / (0.198 * 0.398), abs=1e-9)


def test_the_same_region_by_another_number_is_a_repeat() -> None:
    pictures = [ImageRef(root="photo"), ImageRef(root="photo")]
    box = (0, 0, 500, 500)
    good = row("g", UP, zoom(*box), images=pictures)
    bad = row("b", DOWN, zoom(*box), zoom(*box, img_idx=1), images=pictures)
    records = assign([good, bad], correct_repeats="first").steps[1]
    assert [record.matched for record in records] == [True, False]


def test_a_picture_that_came_later_cannot_be_indexed() -> None:
    pictures = [ImageRef(root="photo"), ImageRef(root="t")]
    bad = row("b", DOWN, zoom(0, 0, 9, 9, img_idx=1), images=pictures, num_images=1)
    good = row("g", UP, zoom(0, 0, 9, 9, img_idx=1), images=pictures)
    assert assign([good, bad]).metrics["tapo/n_fail_steps"] == 0


@pytest.mark.parametrize(
    ("box", "index"),
    [
        ((0, 0, 1001, 10), 0), ((-1, 0, 10, 10), 0), ((10, 0, 10, 10), 0), ((0, 20, 10, 10), 0),
        ((0, 0, math.nan, 10), 0), ((0, 0, 10, 10), 1), ((0, 0, 10, 10), -1),
        ((0, 0, 10, 10), 1.0), ((0, 0, 10, 10), 0.5), ((0, 0, 10, 10), True),
        ((0, 0, 10, 10), math.inf),
    ],
)  # fmt: skip
def test_an_impossible_zoom_is_invalid_and_not_clamped(box: Any, index: Any) -> None:
    assert after(zoom(*box, img_idx=index), zoom(*box, img_idx=index)) == DOWN


def test_an_integral_float_is_an_index() -> None:
    assert after(zoom(0, 0, 10, 10, img_idx=0), zoom(0, 0, 10.0, 10, img_idx=0.0)) == MOVED


# 34
def test_tools_outside_the_allow_list_are_ignored() -> None:
    result = assign([row("g", UP, QUERY, search()), row("b", DOWN, QUERY, search())], tools=(TEXT,))
    assert list(result.step_advantages[1]) == [MOVED, DOWN, DOWN]
    assert result.metrics["tapo/n_fail_steps"] == 1


# 35
@pytest.mark.parametrize(("correct", "teaches"), [(0.5, True), (0.49, False), (1.0, True)])
def test_partial_credit_counts_from_the_threshold_on(correct: float, teaches: bool) -> None:
    rows = [row("g", UP, QUERY, correct=correct), row("b", DOWN, QUERY)]
    assert assign(rows).steps[1][0].matched == teaches
    assert assign(rows, success_threshold=0.4).steps[1][0].matched


# 36: rows do not say which policy wrote them, so versions cannot matter.
def test_rows_hold_no_policy_version() -> None:
    assert "policy_version" not in CreditRow.__slots__
