"""Properties of the credit stage on random batches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from credit_rows import IMAGE, TEXT, ZOOM, population, row
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_credit import reference_advantages

from tapo_train.credit import CreditCall, CreditResult, CreditRow, NoTransfer, Tapo, TapoOptions
from tapo_train.credit.similarity import registry
from tapo_train.types import ImageRef

WORDS = ["tower", "height", "paris", "river", "the", "opened", "埃菲尔"]
PICTURES = (ImageRef(root="a"), ImageRef(root="a", box=(0.1, 0.1, 0.6, 0.7)), ImageRef(root="b"))
quick = settings(max_examples=20, deadline=None)

queries = st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join)
coordinates = st.integers(-1, 11).map(lambda value: 100 * value)
arguments = {
    TEXT: st.fixed_dictionaries({"query": queries | st.lists(queries, max_size=3)}),
    IMAGE: st.sampled_from([{}, {"img_idx": 0}, {"img_idx": 2}]),
    ZOOM: st.fixed_dictionaries(
        {"bbox_2d": st.lists(coordinates, min_size=4, max_size=4), "img_idx": st.integers(0, 3)}
    ),
    "lookup": st.dictionaries(
        st.sampled_from(["key", "page", "boxes"]),
        queries | st.integers(0, 2) | st.booleans() | st.lists(coordinates, max_size=4),
    ),
}
calls = st.sampled_from(sorted(arguments)).flatmap(
    lambda name: st.builds(
        CreditCall,
        name=st.just(name),
        arguments=arguments[name],
        valid=st.sampled_from([True, True, True, False]),
        executed=st.sampled_from([True, True, True, False]),
        status=st.sampled_from(["ok", "ok", "ok", "model_error", "infra_error"]),
    )
)
trajectories = st.lists(st.lists(calls, min_size=1, max_size=2), max_size=4)


@st.composite
def groups(draw: st.DrawFn, name: str = "q") -> list[CreditRow]:
    """A group with binary rewards, successes and failures in random order."""
    rewards = draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=6))
    if len(set(rewards)) == 1:
        rewards[0] = 1.0 - rewards[0]
    return [
        row(f"{name}{i}", advantage, *draw(trajectories), group=name, images=PICTURES)
        for i, advantage in enumerate(population(rewards))
    ]


@st.composite
def options(draw: st.DrawFn) -> TapoOptions:
    """Random switches that keep the stage deterministic and independent of order."""
    shares = st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0])
    return TapoOptions(
        beta=draw(st.sampled_from([0.1, 0.8, 2.0])),
        theta=draw(shares),
        theta_by_tool={TEXT: draw(shares)},
        alpha_min=draw(shares),
        cluster_theta=draw(st.none() | shares),
        turn_reduce=draw(st.sampled_from(["mean", "max", "min", "span"])),
        span=draw(st.sampled_from(["turn", "call"])),
        adv_agg=draw(st.sampled_from(["mean_traj", "mean_step", "max", "min"])),
        match_by=draw(st.sampled_from(["sim", "sim_sup"])),
        use_support=draw(st.booleans()),
        use_sim_weight=draw(st.booleans()),
        correct_repeats=draw(st.sampled_from(["all", "first"])),
    )


def bits(result: CreditResult) -> list[bytes]:
    return [turns.tobytes() for turns in result.step_advantages]


def flat(result: CreditResult) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.concatenate(result.step_advantages)


def numbers(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if key != "tapo/time_s"}


@quick
@given(groups(), options())
def test_beta_zero_is_the_base_algorithm_bit_for_bit(rows: list[CreditRow], o: TapoOptions) -> None:
    plain, zero = NoTransfer()(rows), Tapo(replace(o, beta=0.0))(rows)
    assert bits(plain) == bits(zero)
    for given_row, calls_of_row in zip(rows, zero.call_advantages, strict=True):
        assert all(call.advantage == given_row.advantage for call in calls_of_row)


@quick
@given(groups(), options())
def test_successes_and_turns_without_a_call_never_change(
    rows: list[CreditRow], o: TapoOptions
) -> None:
    result = Tapo(o)(rows)
    for given_row, turns, own in zip(
        rows, result.step_advantages, result.call_advantages, strict=True
    ):
        assert turns[-1] == given_row.advantage
        if given_row.advantage > 0:
            assert set(turns) == {given_row.advantage} and own == ()


@quick
@given(groups(), options())
def test_corrected_advantages_lie_between_the_old_one_and_zero(
    rows: list[CreditRow], o: TapoOptions
) -> None:
    result = Tapo(o)(rows)
    for given_row, turns, own in zip(
        rows, result.step_advantages, result.call_advantages, strict=True
    ):
        values = [*turns, *(call.advantage for call in own)]
        if given_row.advantage < 0:
            assert all(given_row.advantage <= value <= 0.0 for value in values)


@quick
@given(groups(), options(), st.sampled_from(["beta", "alpha_min", "theta"]))
def test_more_beta_corrects_more_and_higher_gates_correct_less(
    rows: list[CreditRow], o: TapoOptions, name: str
) -> None:
    base = replace(o, cluster_theta=0.6, theta_by_tool={})
    low, high = (flat(Tapo(replace(base, **{name: v}))(rows)) for v in (0.3, 0.6))
    assert (low <= high).all() if name == "beta" else (low >= high).all()


@quick
@given(groups("q"), groups("p"), options(), st.randoms(use_true_random=False))
def test_order_of_trajectories_and_groups_does_not_matter(
    first: list[CreditRow], second: list[CreditRow], o: TapoOptions, random: Any
) -> None:
    rows = first + second
    order = list(range(len(rows)))
    random.shuffle(order)
    straight, mixed = Tapo(o)(rows), Tapo(o)([rows[i] for i in order])
    assert [bits(straight)[i] for i in order] == bits(mixed)
    assert numbers(straight.metrics) == pytest.approx(numbers(mixed.metrics))


@quick
@given(groups(), options())
def test_names_of_questions_and_tools_do_not_matter(rows: list[CreditRow], o: TapoOptions) -> None:
    def renamed(call: CreditCall) -> CreditCall:
        return replace(call, name="my_" + call.name)

    other = [
        replace(
            r,
            group="other",
            steps=tuple(replace(s, calls=tuple(map(renamed, s.calls))) for s in r.steps),
        )
        for r in rows
    ]
    kinds = {"my_" + IMAGE: "image_iou", "my_" + TEXT: "text_jaccard", "my_" + ZOOM: "zoom_iou"}
    theta = {"my_" + tool: value for tool, value in o.theta_by_tool.items()}
    assert bits(Tapo(o)(rows)) == bits(
        Tapo(replace(o, theta_by_tool=theta, similarity=kinds))(other)
    )


@quick
@given(groups("q"), groups("p"), options())
def test_groups_are_independent(
    first: list[CreditRow], second: list[CreditRow], o: TapoOptions
) -> None:
    apart = bits(Tapo(o)(first)) + bits(Tapo(o)(second))
    assert bits(Tapo(o)(first + second)) == apart


@quick
@given(groups(), options(), st.data())
def test_repeating_a_call_inside_a_success_changes_nothing(
    rows: list[CreditRow], o: TapoOptions, data: st.DataObject
) -> None:
    o = replace(o, adv_agg="mean_traj")
    i = data.draw(st.sampled_from([i for i, r in enumerate(rows) if r.advantage > 0]))
    steps = rows[i].steps
    if steps:
        again = replace(steps[0], turn=steps[-1].turn + 1)
        longer = replace(rows[i], steps=(*steps, again), num_turns=rows[i].num_turns + 1)
        changed = [*rows[:i], longer, *rows[i + 1 :]]
        before, after = bits(Tapo(o)(rows)), bits(Tapo(o)(changed))
        assert before[:i] + before[i + 1 :] == after[:i] + after[i + 1 :]


SIMILARITIES = {
    TEXT: ["text_jaccard", "text_dice", "text_trigram", "text_ratio", "text_tfidf"],
    ZOOM: ["zoom_iou", "zoom_giou", "zoom_iou_same_index"],
    IMAGE: ["image_iou", "image_exact"],
    "lookup": ["generic", "exact"],
}


@quick
@given(st.data(), st.sampled_from([(t, n) for t, names in SIMILARITIES.items() for n in names]))
def test_similarity_is_symmetric_within_bounds_and_one_of_a_call_with_itself(
    data: st.DataObject, which: tuple[str, str]
) -> None:
    tool, name = which
    similarity = registry()[name]
    batch = data.draw(st.lists(arguments[tool], min_size=1, max_size=5))
    holder = row("r", 1.0, CreditCall(name=tool), images=PICTURES)
    keys = [similarity.key(a, holder, holder.steps[0]) for a in batch]
    legal = [key for key in keys if key is not None]
    if legal:
        values = similarity.space(legal, len(legal))(0, len(legal))
        assert (values.diagonal() == 1.0).all()
        assert ((values >= 0.0) & (values <= 1.0)).all()
        assert np.array_equal(values, values.T)
        part = similarity.space(legal, 1)(0, len(legal))
        if (
            name != "text_tfidf"
        ):  # its weights depend on the keys at hand, not on how many are asked
            assert np.array_equal(part[:, 0], values[:, 0])


@quick
@given(groups(), options())
def test_support_is_a_share_and_parts_add_up_to_totals(
    rows: list[CreditRow], o: TapoOptions
) -> None:
    result = Tapo(o)(rows)
    records = [record for steps in result.steps for record in steps]
    assert all(0.0 < r.support <= 1.0 for r in records if r.support is not None)
    for kind in ("total", "matched", "corrected"):
        parts = [v for k, v in result.sums.items() if k.startswith("by_tool/") and k.endswith(kind)]
        assert sum(parts) == result.sums.get(f"calls/{kind}", 0)
    steps = [v for k, v in result.sums.items() if k.startswith("by_turn/") and k.endswith("total")]
    assert sum(steps) == result.sums["fail_steps"] == sum(r.eligible for r in records)
    assert sum(r.transfer > 0 for r in records) == result.sums["fail_steps_corrected"]


@quick
@given(groups(), options())
def test_with_binary_rewards_every_aggregate_of_advantages_is_the_same(
    rows: list[CreditRow], o: TapoOptions
) -> None:
    kinds = ("mean_traj", "mean_step", "max", "min")
    results = [flat(Tapo(replace(o, adv_agg=kind))(rows)) for kind in kinds]
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-14, atol=1e-15)


@quick
@given(groups("q"), groups("p"))
def test_the_library_of_a_batch_reduces_to_the_groups_where_pictures_differ(
    first: list[CreditRow], second: list[CreditRow]
) -> None:
    def pictures_only(rows: list[CreditRow], root: str) -> list[CreditRow]:
        images = tuple(replace(ref, root=root + ref.root) for ref in PICTURES)
        keep = (IMAGE, ZOOM)
        return [
            replace(
                r,
                images=images,
                steps=tuple(s for s in r.steps if all(c.name in keep for c in s.calls)),
            )
            for r in rows
        ]

    rows = pictures_only(first, "x") + pictures_only(second, "y")
    batch = Tapo(TapoOptions(scope="batch", theta=0.3))(rows)
    assert bits(batch) == bits(Tapo(TapoOptions(theta=0.3))(rows))


@quick
@given(groups(), options())
def test_sums_of_two_batches_give_the_metrics_of_their_union(
    rows: list[CreditRow], o: TapoOptions
) -> None:
    from tapo_train.credit.diagnostics import finish

    other = [replace(r, group="p") for r in rows]
    one, two = Tapo(o)(rows), Tapo(o)(other)
    added = {k: one.sums.get(k, 0) + two.sums.get(k, 0) for k in {*one.sums, *two.sums}}
    both = numbers(Tapo(o)(rows + other).metrics)
    assert finish(added) == pytest.approx(both)
    assert all(math.isfinite(value) for value in both.values())


def random_call(random: Any) -> CreditCall:
    """A call within the narrower dialect of the plain transcription."""
    name = random.choice([TEXT, TEXT, ZOOM, ZOOM, IMAGE])
    status = random.choice(["ok", "ok", "ok", "model_error", "infra_error"])
    asked: dict[str, Any] = {}
    if name == TEXT:
        asked["query"] = " ".join(random.choices([*WORDS[:6], "a", "?"], k=random.randint(0, 4)))
    if name == ZOOM:
        asked = {
            "bbox_2d": [100 * random.randint(0, 10) for _ in range(4)],
            "img_idx": random.randint(0, 3),
        }
    executed = random.random() > 0.1
    return CreditCall(name=name, arguments=asked, status=status, executed=executed)


@pytest.mark.parametrize("seed", range(12))
def test_the_default_path_equals_a_plain_transcription_of_the_rules(seed: int) -> None:
    import random as stdlib_random

    random = stdlib_random.Random(seed)
    rows = []
    for group in ("q", "p", "r"):
        rewards = [1.0, 0.0, *(random.choice([0.0, 0.5, 1.0]) for _ in range(6))]
        for i, advantage in enumerate(population(rewards)):
            turns = [[random_call(random) for _ in range(random.randint(1, 2))] for _ in range(6)]
            correct = rewards[i]
            rows.append(
                row(f"{i}", advantage, *turns, correct=correct, group=group, images=PICTURES)
            )
    result = Tapo(TapoOptions())(rows)
    plain = reference_advantages(rows)
    for found, wanted in zip(result.step_advantages, plain, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    assert result.metrics["tapo/n_fail_steps_corrected"] > 5
