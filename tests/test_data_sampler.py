from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tapo_train.build import build_order, chosen_tasks
from tapo_train.data.mixture import pass_rates
from tapo_train.data.sampler import TaskSampler, shard
from tapo_train.errors import ConfigError, DataError
from tapo_train.recipe.compose import load_recipe
from tapo_train.types import Task


def ids(num: int) -> list[str]:
    return [f"q{number}" for number in range(num)]


def test_an_epoch_visits_every_task_once_and_the_next_in_another_order() -> None:
    sampler = TaskSampler(ids(12), seed=3)
    first, second = (sampler.next_batch(4) + sampler.next_batch(8) for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_the_order_depends_on_the_seed_alone() -> None:
    assert TaskSampler(ids(50), seed=1).next_batch(50) == TaskSampler(ids(50), seed=1).next_batch(
        50
    )
    assert TaskSampler(ids(50), seed=1).next_batch(50) != TaskSampler(ids(50), seed=2).next_batch(
        50
    )


def test_without_shuffling_tasks_come_in_file_order_for_ever() -> None:
    sampler = TaskSampler(ids(5), seed=0, shuffle=False)
    assert [sampler.next_batch(3) for _ in range(3)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]


def test_a_task_already_in_a_batch_that_crosses_an_epoch_waits_for_the_next() -> None:
    sampler = TaskSampler(ids(3), seed=0, shuffle=False)
    assert [sampler.next_batch(2) for _ in range(3)] == [[0, 1], [2, 0], [1, 2]]
    wide = TaskSampler(ids(4), seed=0, shuffle=False)
    wide.next_batch(1)
    assert wide.next_batch(4) == [1, 2, 3, 0]


@given(num_tasks=st.integers(1, 9), seed=st.integers(0, 99), data=st.data())
def test_batches_hold_no_task_twice_and_epochs_stay_complete(
    num_tasks: int, seed: int, data: st.DataObject
) -> None:
    sampler = TaskSampler(ids(num_tasks), seed=seed)
    drawn: list[int] = []
    for size in data.draw(st.lists(st.integers(1, num_tasks), min_size=1, max_size=8)):
        batch = sampler.next_batch(size)
        assert len(set(batch)) == size
        drawn += batch
    counts = [drawn.count(task) for task in range(num_tasks)]
    assert max(counts) - min(counts) <= 1


def test_excluded_tasks_are_passed_over_and_keep_their_place() -> None:
    sampler = TaskSampler(ids(6), seed=0, shuffle=False)
    assert sampler.next_batch(2, exclude=[0, 2]) == [1, 3]
    assert sampler.next_batch(3, exclude=[4, 3]) == [0, 2, 5]
    assert sampler.next_batch(2, exclude=[0, 4]) == [1, 2]
    assert sampler.next_batch(3, exclude=[1, 1]) == [0, 3, 4]


@given(num_tasks=st.integers(2, 9), seed=st.integers(0, 99), data=st.data())
def test_steps_of_several_draws_ask_nothing_twice_and_epochs_stay_complete(
    num_tasks: int, seed: int, data: st.DataObject
) -> None:
    sampler = TaskSampler(ids(num_tasks), seed=seed)
    drawn: list[int] = []
    for _ in range(data.draw(st.integers(1, 6))):
        step: list[int] = []
        while len(step) < num_tasks and data.draw(st.booleans()):
            size = data.draw(st.integers(1, num_tasks - len(step)))
            step += sampler.next_batch(size, exclude=step)
        assert len(set(step)) == len(step)
        drawn += step
        sampler.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    counts = [drawn.count(task) for task in range(num_tasks)]
    assert max(counts) - min(counts) <= 1


def test_more_tasks_than_are_not_excluded_cannot_be_drawn() -> None:
    sampler = TaskSampler(ids(5), seed=0)
    with pytest.raises(DataError, match="a batch of 3 different tasks was asked of 2"):
        sampler.next_batch(3, exclude=[0, 1, 2, 2])
    assert len(sampler.next_batch(2, exclude=[0, 1, 2, 2])) == 2


@pytest.mark.parametrize("done", [0, 1, 4, 7])
def test_a_sampler_restored_from_json_goes_on_as_if_never_stopped(done: int) -> None:
    whole, stopped = (TaskSampler(ids(7), seed=5) for _ in range(2))
    expected = [whole.next_batch(3) for _ in range(9)]
    begun = [stopped.next_batch(3) for _ in range(done)]
    resumed = TaskSampler(ids(7), seed=5)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert begun + [resumed.next_batch(3) for _ in range(9 - done)] == expected


def test_epoch_counts_from_zero_and_turns_when_the_last_task_was_taken() -> None:
    sampler = TaskSampler(ids(4), seed=0)
    sampler.next_batch(3)
    assert sampler.epoch == 0
    sampler.next_batch(1)
    assert sampler.epoch == 1
    sampler.next_batch(1)
    assert sampler.epoch == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 6), ("shuffle", False), ("epoch", -1), ("drawn", ["q77"]), ("drawn", {})],
)
def test_a_state_of_another_run_is_refused(name: str, value: Any) -> None:
    sampler = TaskSampler(ids(7), seed=5)
    with pytest.raises(DataError, match=name):
        sampler.load_state_dict({**sampler.state_dict(), name: value})


def test_a_state_without_a_key_is_refused() -> None:
    with pytest.raises(DataError, match="drawn"):
        TaskSampler(ids(7), seed=5).load_state_dict({"epoch": 7, "seed": 5})


@given(seed=st.integers(0, 99), done=st.integers(0, 12), data=st.data())
def test_tasks_that_are_added_or_taken_out_leave_the_order_of_the_others(
    seed: int, done: int, data: st.DataObject
) -> None:
    tasks = ids(12)
    first = TaskSampler(tasks, seed=seed)
    drawn = [tasks[index] for index in (first.next_batch(done) if done else [])]
    rest = [tasks[index] for index in first.next_batch(12 - done)] if done < 12 else []
    gone = data.draw(st.sets(st.sampled_from(tasks), max_size=5))
    assume(not drawn or not gone.issuperset(drawn))
    now = data.draw(st.permutations([*(task for task in tasks if task not in gone), "new"]))
    begun = TaskSampler(tasks, seed=seed)
    if done:
        begun.next_batch(done)
    resumed = TaskSampler(now, seed=seed)
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    expected = [task for task in rest if task not in gone]
    found = [now[index] for index in resumed.next_batch(len(expected) + 1)]
    if done < 12:
        assert [task for task in found if task != "new"] == expected
    assert "new" in found
    assert resumed.epoch == 1


def test_tasks_that_share_an_id_are_refused() -> None:
    with pytest.raises(DataError, match="share an id"):
        TaskSampler(["a", "b", "a"], seed=0)


@pytest.mark.parametrize("num", [0, 5])
def test_a_batch_larger_than_the_data_or_empty_is_refused(num: int) -> None:
    with pytest.raises(DataError, match="between 1 and 4"):
        TaskSampler(ids(4), seed=0).next_batch(num)


def test_a_sampler_over_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="at least one"):
        TaskSampler(ids(0), seed=0)


def test_shards_are_disjoint_cover_the_batch_and_are_balanced() -> None:
    batch = [9, 4, 7, 1, 3]
    assert [shard(batch, rank, 2) for rank in range(2)] == [[9, 7, 3], [4, 1]]
    assert shard(batch, 0, 1) == batch


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(DataError, match="world size"):
        shard([1, 2], rank, 2)


def test_a_task_of_weight_a_quarter_takes_part_in_a_quarter_of_the_epochs() -> None:
    weights = [0.25] * 20 + [1.0] * 20
    sampler = TaskSampler(ids(40), seed=1, weights=weights)
    seen = Counter[int]()
    while sampler.epoch < 200:
        seen.update(sampler.next_batch(8))
    light = sum(seen[index] for index in range(20)) / 20
    heavy = sum(seen[index] for index in range(20, 40)) / 20
    assert heavy == pytest.approx(200, abs=2)
    assert light == pytest.approx(50, abs=4)


def test_the_first_epoch_may_go_from_easy_to_hard() -> None:
    sampler = TaskSampler("abcd", seed=1, ease=[0.1, 0.9, 0.5, 0.9])
    first = sampler.next_batch(4)
    assert set(first[:2]) == {1, 3} and first[2:] == [2, 0]
    again = TaskSampler("abcd", seed=1, ease=[0.1, 0.9, 0.5, 0.9])
    again.load_state_dict(sampler.state_dict())
    assert again.next_batch(4) == sampler.next_batch(4)


def test_pass_rates_are_read_from_an_evaluation_or_a_dump(tmp_path: Path) -> None:
    (tmp_path / "attempts.jsonl").write_text(
        """{"task": "a", "accuracy": 1.0}
        {"task": "a", "accuracy": 0.0}
        {"task": "b", "accuracy": null}
        {"group": "c", "correct": 1.0}"""
    )
    assert pass_rates(tmp_path / "attempts.jsonl") == {"a": 0.5, "c": 1.0}
    (tmp_path / "other.jsonl").write_text('{"task": "a"}')
    with pytest.raises(DataError, match="field 'accuracy': found nothing; wanted a number from 0"):
        pass_rates(tmp_path / "other.jsonl")


def test_a_mixture_keeps_what_needs_a_search_and_is_neither_always_nor_never_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "attempts.jsonl").write_text(
        """{"task": "never", "accuracy": 0.0}
        {"task": "half", "accuracy": 0.5}
        {"task": "always", "accuracy": 1.0}"""
    )
    tasks = [
        Task(id=name, question="q", images=(), answers=("a",), source=source)
        for name, source in (
            ("never", "x"),
            ("half", "x"),
            ("always", "x"),
            ("untried", "livevqa/level2"),
            ("seen", "livevqa/level1"),
        )
    ]
    mixture = [
        f"data.mixture.pass_rates={tmp_path / 'attempts.jsonl'}",
        "data.mixture.pass_rate=[0.1,0.9]",
        "data.mixture.needs_search=true",
        "data.mixture.weights={x: 0.5}",
        "data.mixture.easy_first=true",
    ]
    recipe = load_recipe("recipes/demo_cpu.yaml", mixture)
    kept = chosen_tasks(recipe, tasks)
    assert [task.id for task in kept] == ["half", "untried"]
    assert "3 of 5 questions left out (data.mixture)" in capsys.readouterr().out
    assert build_order(recipe, kept).num_tasks == 2
    with pytest.raises(
        ConfigError, match=r"weights: found \['x'\]; wanted some of \['livevqa/level2"
    ):
        build_order(recipe, kept[1:])
    with pytest.raises(ConfigError, match="none of 1 questions is left"):
        chosen_tasks(recipe, tasks[:1])
