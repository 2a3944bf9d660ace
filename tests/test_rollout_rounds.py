"""Dynamic sampling: groups that teach nothing give way to the next questions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked_runs import run_ranks
from rounds_rank_worker import STEPS, ScriptedPlay, numbered, refill

from tapo_train.data.sampler import TaskSampler
from tapo_train.rollout.chat import ChatFormat
from tapo_train.training.interruption import StepGivenUp
from tapo_train.training.rounds import is_informative
from tapo_train.types import Group, Reward, StopReason

WORKER = Path(__file__).with_name("rounds_rank_worker.py")


@pytest.fixture(scope="module")
def chat(tiny_qwen3_vl: Path) -> ChatFormat:
    return ChatFormat(tiny_qwen3_vl)


def data_order(num: int, num_tasks: int = 40) -> list[int]:
    """The first questions in the order of seed 0, within its first epoch."""
    return TaskSampler([task.id for task in numbered(num_tasks)], seed=0).next_batch(num)


def ids(groups: list[Group]) -> list[str]:
    return [group.task.id for group in groups]


def test_uniform_groups_are_replaced_in_place_by_the_next_questions(chat: ChatFormat) -> None:
    play = ScriptedPlay(chat)
    rolled = refill(play, most=10)(0)
    coming = iter(data_order(40))
    places = [next(coming) for _ in range(6)]
    asked = [[str(q) for q in places]]
    while any(q % 2 == 0 for q in places):
        drawn = []
        for place in range(6):
            if places[place] % 2 == 0:
                places[place] = next(coming)
                drawn.append(str(places[place]))
        asked.append(drawn)
    assert len(asked) > 2, "the order of the seed has to need several rounds"
    assert play.asked == asked
    assert ids(rolled.groups) == [str(q) for q in places]
    assert rolled.questions == list(range(6))
    everything = [q for round in asked for q in round]
    assert sorted(ids(rolled.replaced)) == sorted(q for q in everything if int(q) % 2 == 0)
    assert rolled.metrics == {
        "rollout/rounds": len(asked),
        "rollout/groups_played": len(everything),
        "rollout/groups_informative": 6,
    }
    assert all(
        t.reward is not None for g in rolled.groups + rolled.replaced for t in g.trajectories
    )


def test_after_the_last_round_uniform_groups_stay(chat: ChatFormat) -> None:
    play = ScriptedPlay(chat)
    rolled = refill(play, most=1)(0)
    assert len(play.asked) == 2
    kept = [int(question) for question in ids(rolled.groups)]
    assert len(kept) == 6 and any(question % 2 == 0 for question in kept)
    odd = sum(question % 2 for question in kept)
    assert rolled.metrics["rollout/groups_informative"] == odd
    drawn = sorted(kept + [int(question) for question in ids(rolled.replaced)])
    assert drawn == sorted(data_order(6 + len(rolled.replaced)))


def test_a_batch_that_is_informative_at_once_is_played_once(chat: ChatFormat) -> None:
    play = ScriptedPlay(chat)
    rounds = refill(play, most=5)
    rounds._questions = replace(
        rounds._questions, tasks=[replace(task, id="1") for task in numbered(40)]
    )
    rolled = rounds(0)
    assert len(play.asked) == 1 and rolled.replaced == []
    assert rolled.metrics["rollout/rounds"] == 1


def test_the_next_step_goes_on_in_the_order_where_the_refill_stopped(chat: ChatFormat) -> None:
    play = ScriptedPlay(chat)
    rounds = refill(play, most=1)
    rounds(0)
    begun = sum(map(len, play.asked))
    rounds(1)
    assert play.asked[2] == [str(q) for q in data_order(begun + 6)[begun:]]


def test_no_question_is_asked_twice_in_a_step_and_few_questions_end_it(chat: ChatFormat) -> None:
    """Of 8 questions 4 are informative: 6 places can never be filled."""
    play = ScriptedPlay(chat)
    rounds = refill(play, most=9, num_tasks=8)
    for step in range(4):
        before = len(play.asked)
        rolled = rounds(step)
        asked = [question for round in play.asked[before:] for question in round]
        assert sorted(asked) == sorted(set(asked)) and len(asked) == 8
        assert len(rolled.groups) == 6
        assert rolled.metrics["rollout/groups_informative"] == 4
        assert sorted(ids(rolled.groups) + ids(rolled.replaced)) == [str(q) for q in range(8)]


def test_a_step_that_is_given_up_in_a_later_round_says_so(chat: ChatFormat) -> None:
    play = ScriptedPlay(chat)
    rounds = refill(play, most=5)
    interruption = rounds._questions.interruption

    class StoppedInRoundTwo(ScriptedPlay):
        def __call__(self, *args: Any, **kwargs: Any) -> list[Group]:
            interruption.is_requested = len(self.asked) == 1
            return super().__call__(*args, **kwargs)

    play.__class__ = StoppedInRoundTwo
    with pytest.raises(StepGivenUp):
        rounds(0)
    assert len(play.asked) == 2


def test_two_ranks_fill_the_same_places_with_the_same_groups_as_one(
    tiny_qwen3_vl: Path, tmp_path: Path
) -> None:
    for ranks in (1, 2):
        run_ranks(ranks, WORKER, tiny_qwen3_vl, tmp_path, deadline_s=120)
    read = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    alone, first, second = read["1.0.json"], read["2.0.json"], read["2.1.json"]
    assert alone["calls"] == first["calls"] == second["calls"] > STEPS
    for step in range(STEPS):
        one, left, right = (rank["steps"][step] for rank in (alone, first, second))
        assert one["metrics"] == left["metrics"] == right["metrics"]
        assert sorted(left["groups"] + right["groups"]) == one["groups"]
        assert left["groups"] and right["groups"]
        assert sorted(left["replaced"] + right["replaced"]) == sorted(one["replaced"])


def a_group(chat: ChatFormat, rewards: list[float], stops: list[StopReason]) -> Group:
    (group,) = ScriptedPlay(chat)(
        numbered(1), rollouts=len(rewards), greedy=False, policy_version=0
    )
    trajectories = tuple(
        replace(t, stop=stop).with_reward(Reward(total=total, accuracy=1.0))
        for t, total, stop in zip(group.trajectories, rewards, stops, strict=True)
    )
    return replace(group, trajectories=trajectories, surplus=2)


@pytest.mark.parametrize(
    ("rewards", "stops", "informative"),
    [
        ([1.0, 0.0], ["answer", "answer"], True),
        ([1.0, 1.0], ["answer", "answer"], False),
        ([1.0, 0.0], ["answer", "infra"], False),
        ([1.0, 0.0, 1.0], ["answer", "deadline", "answer"], False),
        ([1.0, 0.0, 0.5], ["answer", "deadline", "answer"], True),
        ([1.0, 0.0], ["infra", "deadline"], False),
    ],
)
def test_informative_are_groups_whose_usable_trajectories_differ_in_their_total(
    chat: ChatFormat, rewards: list[float], stops: list[Any], informative: bool
) -> None:
    assert is_informative(a_group(chat, rewards, [StopReason(s) for s in stops])) is informative
