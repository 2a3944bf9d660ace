"""Which groups may begin and which an update trains: age is bounded, nothing is left out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapo_train.errors import TapoError
from tapo_train.training.admission import Admission

UPDATES = 8


@st.composite
def choices(draw: st.DrawFn) -> tuple[int, int, int | None]:
    """(B, S, active)"""
    per_update, staleness = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    most = (staleness + 1) * per_update
    return per_update, staleness, draw(st.none() | st.integers(per_update, most))


def played(
    per_update: int, staleness: int, active: int | None, data: st.DataObject
) -> list[list[tuple[int, int]]]:
    """(number, version at its beginning) of the groups of each update; groups end as drawn."""
    admission = Admission(per_update=per_update, max_staleness=staleness, active=active)
    drawn, began, updates = 0, dict[int, int](), []
    under_way: list[int] = []

    def begin() -> None:
        for number in admission.begin():
            began[number] = admission.version
            under_way.append(number)
        assert len(under_way) == admission.num_under_way <= (active or admission.most)

    for version in range(UPDATES):
        admission.version = version
        while drawn < version * per_update + admission.most:
            admission.draw(drawn)
            drawn += 1
        begin()
        late = data.draw(st.integers(0, len(under_way)), label="ended for nobody")
        while late or not admission.is_ready():
            late = max(0, late - 1)
            if under_way:
                ended = data.draw(st.sampled_from(under_way), label="ends")
                under_way.remove(ended)
                admission.complete(ended)
                begin()
            else:
                assert admission.is_ready(), "nothing is under way, and the update waits"
        taken = admission.take()
        assert taken == sorted(taken) and len(taken) == per_update
        updates.append([(number, began[number]) for number in taken])
    return updates


@settings(max_examples=60, deadline=None)
@given(choices(), st.data())
def test_no_group_is_older_than_allowed_at_its_update_and_none_is_trained_twice_or_passed_over(
    chosen: tuple[int, int, int | None], data: st.DataObject
) -> None:
    per_update, staleness, active = chosen
    updates = played(per_update, staleness, active, data)
    seen = [number for update in updates for number, _ in update]
    assert len(seen) == len(set(seen))
    for version, update in enumerate(updates):
        assert all(0 <= version - began <= staleness for _, began in update)
    assert max(seen) < (UPDATES + staleness) * per_update, "the rule of admission"
    if active is None:
        assert sorted(seen) == list(range(UPDATES * per_update)), (
            "places are for those that are due"
        )


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.data())
def test_without_staleness_each_update_trains_what_was_drawn_for_it(
    per_update: int, data: st.DataObject
) -> None:
    for version, update in enumerate(played(per_update, 0, None, data)):
        first = version * per_update
        assert update == [(first + k, version) for k in range(per_update)]


def test_what_is_complete_goes_first_as_far_as_the_slow_ones_will_find_places() -> None:
    admission = Admission(per_update=2, max_staleness=2, active=3)
    for number in range(6):
        admission.draw(number)
    assert admission.begin() == [0, 1, 2]
    for number in (2, 1):
        assert not admission.is_ready()
        admission.complete(number)
    assert admission.begin() == [3, 4]
    assert admission.is_ready() and admission.take() == [1, 2], "0 is passed by"
    admission.version = 1
    for number in (4, 3):
        admission.complete(number)
    assert admission.is_ready() and admission.take() == [3, 4], "and again"
    admission.version = 2
    assert admission.begin() == [5]
    admission.complete(5)
    admission.draw(6)
    assert admission.begin() == [6]
    admission.complete(6)
    assert not admission.is_ready(), "0 is due"
    admission.complete(0)
    assert admission.take() == [0, 5]


def test_an_update_waits_for_groups_that_later_ones_would_have_no_places_for() -> None:
    """Of eight that began together six are left for three updates: a younger one has to wait."""
    admission = Admission(per_update=2, max_staleness=3)
    for number in range(8):
        admission.draw(number)
    admission.begin()
    for number in (0, 1):
        admission.complete(number)
    assert admission.take() == [0, 1]
    admission.version = 1
    admission.draw(8)
    admission.draw(9)
    admission.begin()
    for number in (2, 8):
        admission.complete(number)
    assert not admission.is_ready(), "3 to 7 would be five for four places"
    admission.complete(7)
    assert admission.take() == [2, 7]


def test_fewer_groups_may_be_under_way_than_are_admitted() -> None:
    admission = Admission(per_update=2, max_staleness=2, active=3)
    for number in range(6):
        admission.draw(number)
    assert admission.begin() == [0, 1, 2]
    assert admission.begin() == []
    admission.complete(1)
    assert admission.begin() == [3]


def test_more_than_the_bound_cannot_be_drawn() -> None:
    admission = Admission(per_update=2, max_staleness=1)
    for number in range(4):
        admission.draw(number)
    with pytest.raises(TapoError, match="group 4: 4 are untrained; wanted at most 4"):
        admission.draw(4)
    admission.begin()
    with pytest.raises(TapoError, match="4 are untrained"):
        admission.draw(4)
