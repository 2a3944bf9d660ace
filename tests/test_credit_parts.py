"""Parts of the credit stage: text, similarities, linkage, options, tokens, audit, GiGPO."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from credit_rows import TEXT, population, row, search, text, zoom

from tapo_train.credit import CreditCall, CreditRow, Tapo, TapoOptions, token_advantages
from tapo_train.credit.gigpo import GiGPO, GiGPOOptions, relative, step_return
from tapo_train.credit.library import cluster
from tapo_train.credit.regions import iou
from tapo_train.credit.result import CallAdvantage
from tapo_train.credit.setsim import set_space
from tapo_train.credit.similarity import Similarity, load, registry
from tapo_train.credit.steps import CreditStep, from_trajectory
from tapo_train.credit.text import jaccard, token_set, words
from tapo_train.errors import ConfigError, CreditError, TapoError
from tapo_train.types import (
    Image,
    ImageRef,
    Observation,
    Outcome,
    Reward,
    Span,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
    Turn,
)

UP, DOWN = population([1, 0])
PHOTO = ImageRef(root="photo")


# --- text ---


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("The  Eiffel_Tower's (height)", ["eiffel", "tower", "s", "height"]),
        ("Straße ＡＢＣ １２", ["strasse", "abc", "12"]),
        ("café naïve", ["café", "naïve"]),
        ("東京 tower です", ["東", "京", "tower", "で", "す"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("a an the", []),
        ("C++ costs 5 $!", ["c", "costs", "5"]),
        ("C++ costs 5 €…", ["c", "costs", "5"]),
        ("한국어 tower", ["한", "국", "어", "tower"]),
        ("\U00020bb7\U00020bbe", ["\U00020bb7", "\U00020bbe"]),
    ],
)
def test_words_are_normalised(given: str, wanted: list[str]) -> None:
    assert words(given) == wanted


def test_case_does_not_matter_where_a_letter_has_several_code_points() -> None:
    # Iota with two marks is one code point in lower case and two in upper case.
    assert words("\u03aa\u0301") == words("\u0390") == ["\u0390"]


def test_texts_without_words_are_equal_only_verbatim() -> None:
    assert token_set(" THE ") == token_set("the") != token_set("?!")
    assert token_set("?!") == token_set(" ?!") != token_set("!")


# --- similarities ---


def compare(name: str, left: dict[str, Any], right: dict[str, Any], **where: Any) -> float:
    similarity = registry()[name]
    holder = row("r", 1.0, search(), **where)
    keys = [similarity.key(a, holder, holder.steps[0]) for a in (left, right)]
    assert None not in keys
    return float(similarity.space(keys, 2)(1, 2)[0, 0])


def test_alternative_text_similarities_have_their_textbook_values() -> None:
    left, right = {"query": "eiffel tower height"}, {"query": "tower height"}
    assert compare("text_jaccard", left, right) == 2 / 3
    assert compare("text_dice", left, right) == 4 / 5
    assert compare("text_ratio", left, right) == 2 * 12 / (19 + 12)
    # " tower height " is a suffix of " eiffel tower height ": 12 of 19 trigrams.
    assert compare("text_trigram", left, right) == 12 / 19
    # difflib finds "e" one way round and "de" the other: 2/8 and 4/8.
    assert compare("text_ratio", {"query": "tide"}, {"query": "diet"}) == 3 / 8
    rare = 1 + np.log(3 / 2)
    assert compare("text_tfidf", left, right) == pytest.approx(2**0.5 / (2 + rare**2) ** 0.5)


def test_the_tfidf_similarity_of_equal_queries_is_exactly_one() -> None:
    for count in range(1, 20):
        query = {"query": " ".join(f"w{i}" for i in range(count))}
        assert compare("text_tfidf", query, query) == 1.0


def test_lists_of_queries_have_the_symmetric_mean_of_their_best_matches() -> None:
    left, right = {"query": ["tower height", "paris"]}, {"query": "tower"}
    assert compare("text_jaccard", left, right) == (0.25 + 0.5) / 2
    assert compare("text_jaccard", {"query": ["tower", "Tower?"]}, right) == 1.0
    assert compare("text_jaccard", {"query": ["a b", "c"]}, {"query": ["c", "b"]}) == 1.0


def test_set_similarities_are_exact_for_large_vocabularies() -> None:
    generator = np.random.default_rng(0)
    sets = [frozenset(str(i) for i in generator.integers(0, 300, size=40)) for _ in range(20)]
    found = set_space(sets, 20, measure="jaccard")(0, 20)
    assert len(frozenset().union(*sets)) > 128
    for i, left in enumerate(sets):
        for j, right in enumerate(sets):
            assert found[i, j] == jaccard(left, right)


def test_box_similarities_have_their_textbook_values() -> None:
    left, right = {"bbox_2d": [0, 0, 400, 1000]}, {"bbox_2d": [200, 0, 600, 1000]}
    apart = {"bbox_2d": [600, 0, 1000, 1000]}
    assert compare("zoom_iou", left, right) == pytest.approx(1 / 3)
    assert compare("zoom_giou", left, right) == pytest.approx(1 / 3)
    ragged = {"bbox_2d": [0, 0, 600, 500]}
    # Union 0.5, hull 0.6.
    assert compare("zoom_giou", left, ragged) == pytest.approx(0.2 / 0.5 - 0.1 / 0.6)
    assert compare("zoom_giou", left, apart) == compare("zoom_iou", left, apart) == 0.0


def test_boxes_without_an_area_overlap_only_with_themselves() -> None:
    dot, other = {"bbox_2d": [0, 0, 1e-9, 1e-9]}, {"bbox_2d": [500, 0, 500.0000001, 1e-9]}
    assert compare("zoom_iou", dot, dot) == compare("zoom_giou", dot, dot) == 1.0
    assert compare("zoom_iou", dot, other) == 0.0
    assert compare("zoom_iou", dot, {"bbox_2d": [0, 0, 1000, 1000]}) == 0.0


def test_the_same_region_by_two_numbers_differs_only_where_the_number_counts() -> None:
    where = {"images": [PHOTO, PHOTO]}
    left = {"bbox_2d": [0, 0, 400, 400], "img_idx": 0}
    right = {"bbox_2d": [0, 0, 400, 400], "img_idx": 1}
    assert compare("zoom_iou", left, right, **where) == 1.0
    assert compare("zoom_iou_same_index", left, right, **where) == 0.0
    assert compare("zoom_iou_same_index", left, left, **where) == 1.0


def test_indexed_image_searches_compare_the_pictures_regions() -> None:
    half = ImageRef(root="photo", box=(0.0, 0.0, 0.5, 1.0))
    where = {"images": [PHOTO, half, ImageRef(root="x")]}
    assert compare("image_iou", {"img_idx": 0}, {"image_index": 1}, **where) == 0.5
    assert compare("image_exact", {"img_idx": 0}, {"img_idx": 1}, **where) == 0.0
    assert compare("image_iou", {"img_idx": 0}, {"img_idx": 2}, **where) == 0.0
    assert compare("image_iou", {}, {"img_idx": 0}, **where) == 1.0
    # The same crop by two chains: 0.1 + 0.2 and 0.3 differ in their last bit.
    chains = [ImageRef(root="p", box=(0.0, 0.0, 0.1 + 0.2, 1.0))]
    chains.append(ImageRef(root="p", box=(0.0, 0.0, 0.3, 1.0)))
    assert compare("image_exact", {"img_idx": 0}, {"img_idx": 1}, images=chains) == 1.0


@pytest.mark.parametrize(
    ("left", "right", "value"),
    [
        ({}, {}, 1.0),
        ({"n": 1}, {"n": 1.0}, 1.0),
        ({"n": 1}, {"n": True}, 0.0),
        ({"n": 1}, {"n": "1"}, 0.0),
        ({"q": "tower height"}, {"q": "the height"}, 0.5),
        ({"q": "x", "n": 1}, {"q": "x"}, 0.5),
        ({"tags": ["a", "b"]}, {"tags": ["b", "c"]}, 1 / 3),
        ({"tags": []}, {"tags": []}, 1.0),
        ({"my_box": [0, 0, 4, 10]}, {"my_box": [2, 0, 6, 10]}, 1 / 3),
        ({"my_box": [0, 0, 10**400, 1]}, {"my_box": [0, 0, 1, 1]}, 2 / 3),
        ({"points": [0, 0, 4, 10]}, {"points": [2, 0, 6, 10]}, 2 / 5),
        ({"o": {"a": 1}}, {"o": {"a": 1}}, 1.0),
        ({"o": {"a": 1}}, {"o": {"a": 2}}, 0.0),
        ({"o": None}, {"o": None}, 1.0),
        ({"tags": ["a"]}, {"tags": "a"}, 0.0),
        ({"BBox": [0, 0, 4, 10]}, {"BBox": [2, 0, 6, 10]}, 1 / 3),
    ],
)
def test_the_generic_similarity_goes_by_the_type_of_each_argument(
    left: dict[str, Any], right: dict[str, Any], value: float
) -> None:
    assert compare("generic", left, right) == pytest.approx(value)
    assert compare("exact", left, left) == 1.0
    assert compare("exact", left, right) == float(left == right and repr(left) == repr(right))


def test_the_order_of_arguments_does_not_matter() -> None:
    left, right = {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}
    assert compare("exact", left, right) == compare("generic", left, right) == 1.0


def test_arguments_nested_beyond_reason_are_invalid() -> None:
    deep: Any = 0
    for _ in range(5000):
        deep = [deep]
    bad = CreditCall(name="lookup", arguments={"x": deep})
    assert Tapo(TapoOptions())([row("b", DOWN, bad)]).metrics["tapo/n_fail_steps"] == 0


def half(left: dict[str, Any], right: dict[str, Any]) -> float:
    """A similarity of the user's own."""
    return 0.5 if left["query"][0] == right["query"][0] else 0.0


def above_one(left: dict[str, Any], right: dict[str, Any]) -> float:
    """An impossible similarity."""
    return 1.5


def below_zero(left: dict[str, Any], right: dict[str, Any]) -> float:
    """Another impossible similarity."""
    return -0.1


def test_a_similarity_is_plugged_in_by_its_import_path() -> None:
    rows = [row("g", UP, text("tower")), row("b", DOWN, text("train"))]
    own = TapoOptions(similarity={TEXT: f"{__name__}:half"})
    assert Tapo(own)(rows).steps[1][0].similarity == 0.5
    bad = TapoOptions(similarity={TEXT: f"{__name__}:above_one"})
    with pytest.raises(CreditError, match=r"above_one returned 1\.5"):
        Tapo(bad)(rows)
    with pytest.raises(CreditError, match=r"below_zero returned -0\.1"):
        Tapo(TapoOptions(similarity={TEXT: f"{__name__}:below_zero"}))(rows)
    whole = "tapo_train.credit.similarity:registry"
    assert isinstance(load("text_dice", registry()), Similarity)
    assert callable(load(whole, registry()).key)


@pytest.mark.parametrize("name", ["nothing", "no.such.module:x", f"{__name__}:missing", "math:pi"])
def test_an_unknown_similarity_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(ConfigError, match=r"credit\.similarity"):
        Tapo(TapoOptions(similarity={TEXT: name}))


def test_boxes_in_pixels_are_divided_by_the_size_of_their_picture() -> None:
    def sized(made: CreditRow, *sizes: tuple[float, float]) -> CreditRow:
        return replace(made, image_sizes=sizes)

    rows = [
        sized(row("g", UP, zoom(0, 0, 100, 100)), (400, 200)),
        sized(row("b", DOWN, zoom(0, 0, 50, 50)), (200, 100)),
    ]
    record = Tapo(TapoOptions(box_unit="pixels"))(rows).steps[1][0]
    assert record.similarity == 1.0
    # The lower right quarter of the middle half, by pictures of other shapes and by a crop.
    wide = sized(row("g", UP, zoom(200, 100, 300, 150)), (400, 200))
    tall = sized(row("b", DOWN, zoom(50, 400, 75, 600)), (100, 800))
    crop = ImageRef(root="photo", box=(0.25, 0.25, 0.75, 0.75))
    inner = row("b", DOWN, zoom(100, 50, 200, 100, img_idx=1), images=[PHOTO, crop])
    # The middle of nine fields, directly and as a quarter of a crop.
    middle = sized(row("g", UP, zoom(100, 100, 200, 200)), (300, 300))
    part = ImageRef(root="photo", box=(0.0, 0.0, 2 / 3, 2 / 3))
    quarter = row("b", DOWN, zoom(100, 100, 200, 200, img_idx=1), images=[PHOTO, part])
    records = Tapo(TapoOptions(box_unit="pixels"))([middle, sized(quarter, (300, 300), (200, 200))])
    assert records.steps[1][0].similarity == 1.0
    for other in (tall, sized(inner, (400, 200), (200, 100))):
        assert Tapo(TapoOptions(box_unit="pixels"))([wide, other]).steps[1][0].similarity == 1.0
    outside = [rows[0], sized(row("b", DOWN, zoom(0, 0, 201, 50)), (200, 100))]
    assert Tapo(TapoOptions(box_unit="pixels"))(outside).metrics["tapo/n_fail_steps"] == 0
    with pytest.raises(CreditError, match=r"size of picture 0 is unknown; credit\.box_unit=pixels"):
        Tapo(TapoOptions(box_unit="pixels"))([row("b", DOWN, zoom(0, 0, 5, 5))])


def test_iou_of_disjoint_touching_and_flat_boxes() -> None:
    assert iou([0, 100, 10, 300], [0, 200, 10, 400]) == 1 / 3
    assert iou([0, 0, 1, 1], [1, 0, 2, 1]) == 0.0
    assert iou([0, 0, 1, 1], [2, 2, 3, 3]) == 0.0
    assert iou([0, 0, 0, 0], [0, 0, 0, 0]) == 1.0
    assert iou([0, 0, 0, 0], [1, 1, 1, 1]) == 0.0


# --- linkage ---

CHAIN = np.array([[1, 0.8, 0.1, 0], [0.8, 1, 0.7, 0], [0.1, 0.7, 1, 0], [0, 0, 0, 1]], dtype=float)


@pytest.mark.parametrize(
    ("linkage", "labels"),
    [
        ("single", [0, 0, 0, 1]),
        ("leader", [0, 0, 1, 2]),
        ("complete", [0, 0, 1, 2]),
        ("exact", [0, 1, 2, 3]),
    ],
)
def test_linkage_decides_what_a_chain_becomes(linkage: Any, labels: list[int]) -> None:
    rows = lambda low, high: CHAIN[low:high]  # noqa: E731
    assert cluster(rows, 4, threshold=0.7, linkage=linkage) == labels
    assert cluster(rows, 4, threshold=0.9, linkage=linkage) == [0, 1, 2, 3]


@pytest.mark.parametrize("linkage", ["single", "leader", "complete"])
def test_every_linkage_includes_its_threshold(linkage: Any) -> None:
    values = np.array([[1.0, 0.5], [0.5, 1.0]])
    labels = cluster(lambda a, b: values[a:b], 2, threshold=0.5, linkage=linkage)
    assert labels == [0, 0]


def test_complete_linkage_joins_the_closest_pair_first() -> None:
    values = np.array([[1, 0.7, 0.0], [0.7, 1, 0.9], [0.0, 0.9, 1]])
    found = cluster(lambda a, b: values[a:b], 3, threshold=0.7, linkage="complete")
    assert found == [0, 1, 1]
    inclusive = cluster(lambda a, b: values[a:b], 3, threshold=0.9, linkage="complete")
    assert inclusive == [0, 1, 1]


def test_a_library_larger_than_one_chunk_gives_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [row(str(i), UP if i < 5 else DOWN, *(zoom(10 * j, 0, 10 * j + 300, 100 + 20 * i)
            for j in range(6))) for i in range(9)]  # fmt: skip
    whole = Tapo(TapoOptions())(rows)
    monkeypatch.setattr("tapo_train.credit.library._CELLS", 50)
    parts = Tapo(TapoOptions())(rows)
    assert whole.steps == parts.steps and whole.sums == parts.sums
    assert whole.sums["fail_steps_corrected"] > 0


# --- switches ---


def test_ties_go_to_the_better_supported_cluster() -> None:
    a = population([1, 1, 1, 0])
    one, two = zoom(0, 0, 400, 1000), zoom(400, 0, 800, 1000)
    rows = [row("a", a[0], one), row("b", a[1], two), row("c", a[2], two)]
    bad = row("d", a[3], zoom(200, 0, 600, 1000))
    record = Tapo(TapoOptions(theta=0.3, cluster_theta=0.9, alpha_min=0.0))([*rows, bad]).steps[3][
        0
    ]
    assert record.similarity == pytest.approx(1 / 3) and record.support == pytest.approx(2 / 3)


def test_ties_in_support_go_to_the_higher_advantage() -> None:
    rows = [row("a", 0.5, zoom(0, 0, 400, 1000)), row("b", 1.5, zoom(400, 0, 800, 1000))]
    bad = row("d", -2.0, zoom(200, 0, 600, 1000))
    record = Tapo(TapoOptions(theta=0.3, alpha_min=0.0))([*rows, bad]).steps[2][0]
    assert record.reference_advantage == 1.5


def test_ties_in_everything_go_to_the_first_cluster() -> None:
    # Both references share two of three words with the failing query and one with each other.
    good = row("g", UP, text("tower height"), text("tower weight"))
    bad = row("b", DOWN, text("tower height weight"))
    result = Tapo(TapoOptions())([good, bad])
    assert result.metrics["tapo/n_clusters"] == 2
    assert result.steps[1][0].similarity == 2 / 3
    assert result.metrics["credit/turn_gap"] == 0.0


def test_matching_by_similarity_times_support_prefers_a_farther_common_cluster() -> None:
    a = population([1, 1, 1, 0])
    asked = [f"w{i}" for i in range(10)]
    near, far = text(" ".join(asked[:9])), text(" ".join(asked[:5]))
    rows = [row("a", a[0], near), row("b", a[1], far), row("c", a[2], far)]
    rows.append(row("d", a[3], text(" ".join(asked))))
    by_sim = Tapo(TapoOptions(cluster_theta=1.0))(rows).steps[3][0]
    by_both = Tapo(TapoOptions(cluster_theta=1.0, match_by="sim_sup"))(rows).steps[3][0]
    assert by_sim.similarity == 0.9 and by_sim.support == pytest.approx(1 / 3)
    assert by_both.similarity == 0.5 and by_both.support == pytest.approx(2 / 3)


def test_similarity_leaves_the_transfer_but_not_the_gates_without_its_weight() -> None:
    rows = [row("g", UP, text("one two three")), row("b", DOWN, text("one two three four"))]
    record = Tapo(TapoOptions(use_sim_weight=False))(rows).steps[1][0]
    assert record.transfer == 1.0 and record.similarity == 0.75
    closed = Tapo(TapoOptions(use_sim_weight=False, alpha_min=0.76))(rows).steps[1][0]
    assert closed.transfer == 0.0 and closed.theta and not closed.alpha


def test_the_library_of_the_batch_helps_questions_without_a_success() -> None:
    a = population([1, 1, 0])
    rows = [row("a", a[0], text("tower")), row("b", a[1])]
    rows.append(row("c", -1.0, text("tower"), group="other"))
    assert not Tapo(TapoOptions())(rows).steps[2][0].matched
    record = Tapo(TapoOptions(scope="batch"))(rows).steps[2][0]
    assert record.matched and record.support == 0.5


def test_the_similarity_gate_of_boxes_is_inclusive() -> None:
    rows = [row("g", UP, zoom(100, 100, 800, 1000)), row("b", DOWN, zoom(100, 100, 590, 1000))]
    assert Tapo(TapoOptions(theta=0.7))(rows).steps[1][0].matched
    assert not Tapo(TapoOptions(theta=0.7001))(rows).steps[1][0].matched


@pytest.mark.parametrize(
    ("rule", "references", "failing"),
    [("both", [0], [3]), ("outcome", [0, 1, 4], [3]), ("advantage", [0, 2], [1, 3])],
)
def test_the_success_rule_says_who_teaches_and_who_learns(
    rule: Any, references: list[int], failing: list[int]
) -> None:
    rows = [
        row("right, good format", 1.0, text("one"), correct=1.0),
        row("right, bad format", -0.2, text("two"), correct=1.0),
        row("wrong, good format", 0.3, text("three"), correct=0.0),
        row("wrong", -1.0, text("four"), correct=0.0),
        row("right, no better than average", 0.0, text("five"), correct=1.0),
    ]
    result = Tapo(TapoOptions(success_rule=rule))(rows)
    assert result.metrics["tapo/n_clusters"] == len(references)
    assert [i for i, steps in enumerate(result.steps) if steps[0].eligible] == failing


def test_repeats_keep_their_advantage_also_where_each_call_has_its_own() -> None:
    rows = [row("g", UP, text("one")), row("b", DOWN, [text("one"), text("one")])]
    options = TapoOptions(turn_reduce="span", correct_repeats="first")
    calls = Tapo(options)(rows).call_advantages[1]
    assert [call.advantage for call in calls] == [DOWN + 0.8, DOWN]


def test_with_span_call_only_the_calls_tokens_move() -> None:
    rows = [row("g", UP, text("one")), row("b", DOWN, text("one"))]
    result = Tapo(TapoOptions(span="call"))(rows)
    assert list(result.step_advantages[1]) == [DOWN, DOWN]
    assert [tuple(call) for call in result.call_advantages[1]] == [(0, 0, DOWN + 0.8)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", -0.1), ("beta", float("nan")), ("beta", float("inf")), ("theta", 1.1),
        ("alpha_min", -0.1), ("cluster_theta", 2.0), ("success_threshold", 0.0),
        ("span", "token"), ("scope", "question"), ("use_clip", "yes"), ("beta", "0.8"),
        ("theta_by_tool", {"x": 3.0}),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_path(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"credit.{name}"):
        TapoOptions(**{name: value})


def test_an_empty_batch_is_an_empty_result() -> None:
    result = Tapo(TapoOptions())([])
    assert result.step_advantages == [] and result.steps == []


def test_steps_out_of_order_are_refused() -> None:
    step = CreditStep(turn=1, calls=())
    with pytest.raises(CreditError, match="want rising numbers"):
        CreditRow(id="r", group="q", correct=0.0, advantage=0.0, num_turns=1, steps=(step,))


# --- audit ---


def audited(good: list[CreditCall], bad: list[CreditCall], **options: Any) -> dict[str, float]:
    rows = [row("g", UP, *good), row("b", DOWN, *bad)]
    return Tapo(TapoOptions(**options))(rows).metrics


def test_observation_agreement_is_the_share_of_equivalent_pairs() -> None:
    same, other = text("one", observation="x y"), text("one", observation="z")
    assert audited([same], [same])["credit/observation_agreement"] == 1.0
    assert audited([same, other], [same])["credit/observation_agreement"] == 0.5
    assert "credit/observation_agreement" not in audited([same], [text("one")])
    assert "credit/turn_gap" not in audited([same], [same], audit=False)


def test_without_the_audit_no_observation_is_looked_at() -> None:
    class Unreadable(str):
        def __hash__(self) -> int:
            raise AssertionError("an observation was read")

        def __eq__(self, other: object) -> bool:
            raise AssertionError("an observation was read")

    same = text("one", observation=Unreadable("x"))
    assert audited([same], [same], audit=False)["tapo/n_fail_steps_corrected"] == 1
    with pytest.raises(AssertionError, match="was read"):
        audited([same], [same])


def test_observations_are_equivalent_from_nine_tenths_on_and_with_equal_pictures() -> None:
    words_of = [f"w{i}" for i in range(10)]
    long = text("one", observation=" ".join(words_of))
    close = text("one", observation=" ".join(words_of[:9]))
    far = text("one", observation=" ".join(words_of[:8]))
    assert audited([long], [close])["credit/observation_agreement"] == 1.0
    assert audited([long], [far])["credit/observation_agreement"] == 0.0
    eight, seven = (text("one", observation=" ".join(words_of[:n])) for n in (8, 7))
    assert audited([eight], [seven])["credit/observation_agreement"] == 0.0  # 7/8
    pictured = replace(long, observation_images=(PHOTO,))
    assert audited([long], [pictured])["credit/observation_agreement"] == 0.0


def test_turn_gap_is_the_distance_to_the_mean_turn_of_the_cluster() -> None:
    one = text("one")
    metrics = audited([one, search(), one], [search(), search(), search(), one])
    assert metrics["credit/turn_gap"] == pytest.approx((1 + 0 + 1 + 2) / 4)
    assert metrics["credit/turn_gap_hist/2-3"] == 1 and metrics["credit/turn_gap_hist/1-2"] == 2
    late = audited([one], [*[text("two")] * 4, one, one])
    assert late["credit/turn_gap_hist/3-5"] == 1 and late["credit/turn_gap_hist/5+"] == 1


def test_novelty_gap_counts_repeats_that_were_news_to_the_success() -> None:
    first, again = text("other thing", observation="x"), text("one", observation="x")
    assert audited([again], [first, again])["credit/novelty_gap"] == 1.0
    assert audited([first, again], [first, again])["credit/novelty_gap"] == 0.0
    # News to one call of the cluster is enough.
    assert audited([again, again], [first, again])["credit/novelty_gap"] == 1.0
    assert audited([again], [again])["credit/novelty_gap"] == 0.0


def test_the_novelty_gap_is_a_share_of_the_calls_whose_answer_is_known() -> None:
    first, again = text("other thing", observation="x"), text("one", observation="x")
    # Two corrected calls, one of them with an answer, which is a repeat.
    assert audited([again], [first, again, text("one")])["credit/novelty_gap"] == 1.0
    assert "credit/novelty_gap" not in audited([again], [text("one")])


def test_agreement_can_be_required_as_a_third_gate() -> None:
    same, other = text("one", observation="x"), text("one", observation="y")
    gate = {"require_observation_agreement": True}
    assert audited([same], [same], **gate)["tapo/n_fail_steps_corrected"] == 1
    assert audited([same, other], [same], **gate)["tapo/n_fail_steps_corrected"] == 1
    assert audited([other], [same], **gate)["tapo/n_fail_steps_corrected"] == 0
    assert audited([text("one")], [text("one")], **gate)["tapo/n_fail_steps_corrected"] == 0
    assert audited([other], [same])["tapo/n_fail_steps_corrected"] == 1


# --- trajectories and tokens ---


def picture(root: str) -> Image:
    return Image(sha256=root, data=b"", width=40, height=20, ref=ImageRef(root=root))


def trajectory() -> Trajectory:
    """Prompt of 2 tokens; a turn of 5 with a call in 3..6; 2 of observation; an answer of 2."""
    seen = Observation(text="found", images=(picture("t"),))
    call = ToolCall(name=TEXT, arguments={"query": "x"}, valid=True, executed=True,
                    span=Span(start=3, end=6), observation=seen)  # fmt: skip
    broken = ToolCall(name="", arguments=None, valid=True, executed=False)
    turns = (
        Turn(
            index=0, span=Span(start=2, end=7), text="", calls=(call, broken), num_images_before=1
        ),
        Turn(index=1, span=Span(start=9, end=11), text="", num_images_before=2),
    )
    return Trajectory(
        id="t", task=Task(id="q", question="?", images=(picture("photo"),), answers=("a",)),
        tokens=np.zeros(11, dtype=np.int32), logprobs=np.zeros(7, dtype=np.float32), turns=turns,
        images=(picture("photo"), picture("t")), answer="a", stop=StopReason.ANSWER,
        reward=Reward(total=1.5, accuracy=1.0),
    )  # fmt: skip


def test_a_trajectory_becomes_a_row() -> None:
    made = from_trajectory(trajectory(), -0.5)
    assert (made.id, made.group, made.correct, made.advantage) == ("t", "q", 1.0, -0.5)
    assert (made.num_turns, made.num_input_images, made.reward) == (2, 1, 1.5)
    assert [ref.root for ref in made.images] == ["photo", "t"]
    assert made.image_sizes == ((40, 20), (40, 20))
    assert len(made.steps) == 1 and made.steps[0].num_images == 1
    call, broken = made.steps[0].calls
    assert call.observation == "found" and call.observation_images == (ImageRef(root="t"),)
    # None stands for unreadable in a trajectory and for {} in a row, so validity must say it.
    assert not broken.valid and broken.arguments is None
    assert from_trajectory(replace(trajectory(), stop=StopReason.INFRA), 0.0).discarded
    with pytest.raises(TapoError, match="no reward"):
        from_trajectory(replace(trajectory(), reward=None), 0.0)


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (Outcome.OK, "ok"), (Outcome.MODEL_ERROR, "model_error"), (Outcome.TIMEOUT, "infra_error"),
        (Outcome.TOOL_ERROR, "infra_error"), (Outcome.INFRA_ERROR, "infra_error"),
        (Outcome.REFUSED, "infra_error"),
    ],
)  # fmt: skip
def test_outcomes_fold_into_who_is_to_blame(outcome: Outcome, status: str) -> None:
    made = trajectory()
    seen = replace(made.turns[0].calls[0], observation=Observation(text="", outcome=outcome))
    turns = (replace(made.turns[0], calls=(seen,)), made.turns[1])
    assert from_trajectory(replace(made, turns=turns), 0.0).steps[0].calls[0].status == status


def test_every_token_of_a_turn_has_its_advantage_and_calls_may_have_their_own() -> None:
    turns = np.array([-0.5, -1.0])
    assert list(token_advantages(trajectory(), turns)) == [-0.5] * 5 + [-1.0] * 2
    own = (CallAdvantage(0, 0, -0.1), CallAdvantage(0, 1, -0.2))
    found = token_advantages(trajectory(), turns, own)
    assert list(found) == [-0.5, -0.1, -0.1, -0.1, -0.5, -1.0, -1.0]


# --- GiGPO ---


def gigpo_rows() -> list[CreditRow]:
    seen, other = text("one", observation="x"), text("two", observation="y")
    return [
        row("a", 1.0, seen, correct=1.0), row("b", -1.0, seen, correct=0.0),
        row("c", -1.0, other, correct=0.0), row("d", 1.0, correct=1.0, group="p"),
    ]  # fmt: skip


def test_gigpo_compares_steps_that_saw_the_same_state() -> None:
    result = GiGPO(GiGPOOptions(gamma=0.5))(gigpo_rows())
    # Turn 0: returns 0.5, 0, 0 of one state. Turn 1: a and b saw x (returns 1, 0), c saw y alone.
    wanted = [[1 + 1 / 3, 1.5], [-1 - 1 / 6, -1.5], [-1 - 1 / 6, -1.0], [1.0]]
    for found, values in zip(result.step_advantages, wanted, strict=True):
        assert found == pytest.approx(values)
    assert result.metrics["gigpo/n_step_groups"] == 4
    assert result.metrics["gigpo/frac_steps_grouped"] == 5 / 7
    assert result.steps[1][0].advantage == pytest.approx(-1 - 1 / 6)


def test_gigpo_without_weight_is_the_base_algorithm_bit_for_bit() -> None:
    rows = gigpo_rows()
    result = GiGPO(GiGPOOptions(omega=0.0))(rows)
    for given, turns in zip(rows, result.step_advantages, strict=True):
        assert set(turns) == {given.advantage}


def test_gigpo_keeps_steps_of_unknown_state_and_discarded_rows_apart() -> None:
    rows = [row("a", 1.0, text("one")), row("b", -1.0, text("one"), discarded=True)]
    assert GiGPO(GiGPOOptions())(rows).metrics["gigpo/frac_steps_grouped"] == 0.0
    silent = [row("a", 1.0, text("one")), row("b", -1.0, text("one"))]
    assert GiGPO(GiGPOOptions())(silent).metrics["gigpo/n_step_groups"] == 3


def test_gigpo_takes_a_trajectory_that_ends_with_a_call() -> None:
    whole = row("a", 1.0, text("one", observation="x"))
    cut = replace(whole, num_turns=1)
    assert [len(turns) for turns in GiGPO(GiGPOOptions())([whole, cut]).step_advantages] == [2, 1]


def test_gigpo_can_group_nearly_equal_states() -> None:
    long = "a long page of text " * 5
    rows = [
        row("a", 1.0, text("one", observation=long + "x")),
        row("b", -1.0, text("one", observation=long + "y")),
    ]
    assert GiGPO(GiGPOOptions())(rows).metrics["gigpo/n_step_groups"] == 3
    near = GiGPO(GiGPOOptions(state_similarity=0.95))(rows)
    assert near.metrics["gigpo/n_step_groups"] == 2


def test_gigpo_parts() -> None:
    assert step_return(row("a", 1.0, search(), search()), 0, gamma=0.5) == 0.25
    assert step_return(replace(row("a", 1.0), reward=3.0), 0, gamma=0.5) == 3.0
    values, labels = np.array([1.0, 3.0, 7.0]), np.array([0, 0, 1])
    assert list(relative(values, labels, divide_by_std=False)) == [-1.0, 1.0, 0.0]
    scaled = relative(2 * values, labels, divide_by_std=True)
    assert scaled == pytest.approx([-1.0, 1.0, 0.0], abs=1e-5)
    with pytest.raises(ConfigError, match=r"credit\.gamma"):
        GiGPOOptions(gamma=1.5)
    assert GiGPO(GiGPOOptions())([]).step_advantages == []
