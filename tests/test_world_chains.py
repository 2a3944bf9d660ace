"""Worlds of chains: what is asked follows from the documents, and the dials do what they say."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from tapo_train.data.tasks import load_tasks
from tapo_train.demo.demonstrate import question_of
from tapo_train.demo.world.build import World, WorldSize, main, make_world, write_world
from tapo_train.demo.world.chains import STOP_WORDS, Chains
from tapo_train.demo.world.demonstrations import FAILS_LATE, FAULTLESS, Faults, demonstrate
from tapo_train.demo.world.questions import Question
from tapo_train.errors import DataError
from tapo_train.tools.text_search import CorpusIndex, Passage
from tapo_train.types import Observation

SMALL = WorldSize(
    train_houses=40,
    validation_houses=12,
    test_houses=12,
    train_questions=60,
    validation_questions=10,
    test_questions=10,
)
CHAINS = Chains(text_only=True, syllables=1)


def search_of(world: World) -> CorpusIndex:
    return CorpusIndex([Passage(id=d.id, title=d.title, text=d.text) for d in world.corpus])


def played(
    index: CorpusIndex, question: Question, faults: Faults, seed: int
) -> tuple[list[str], str]:
    """(queries, last turn) of one demonstration against a search over the world's corpus."""
    script = demonstrate(question, random.Random(seed), faults=faults)
    queries: list[str] = []
    turn = next(script)
    while "<answer>" not in turn:
        call = json.loads(turn.partition("<tool_call>")[2].partition("</tool_call>")[0])
        queries.append(call["arguments"]["query"])
        found = index.search(queries[-1], top_k=2)
        turn = script.send(Observation(text="\n".join(p.shown() for p in found)))
    return queries, turn


@pytest.mark.parametrize("text_only", [True, False])
def test_the_answer_of_a_chain_follows_its_relations_one_by_one(text_only: bool) -> None:
    world = make_world(3, SMALL, chains=Chains(text_only=text_only))
    houses = {house.name: house for house in world.houses}
    for question in world.questions["train"]:
        subject = houses[question.house]
        for relation in question.relations:
            subject = houses[subject.relations[relation]]
        assert question.answer == subject.attributes[question.key]
        assert len(set(question.relations)) == len(question.relations)
        said = "".join(f"the {relation} of " for relation in reversed(question.relations))
        whom = question.house if text_only else f"the house on the {question.colour} panel"
        assert f"the {question.key} of {said}{whom}" in question.text
    lengths = Counter(question.num_hops for question in world.questions["train"])
    assert lengths == dict.fromkeys(range(1, 6), 12)


def test_a_faultless_demonstrator_finds_every_answer_with_the_real_search() -> None:
    world = make_world(4, SMALL, chains=CHAINS)
    index = search_of(world)
    for question in world.questions["train"]:
        queries, last = played(index, question, FAULTLESS, seed=0)
        assert len(queries) == question.num_hops
        assert f"<answer>{question.answer}</answer>" in last


def test_a_demonstrator_that_fails_late_searches_well_and_then_guesses() -> None:
    world = make_world(4, SMALL, chains=CHAINS)
    index = search_of(world)
    whole, right, attempts = 0, 0, 0
    for number, question in enumerate(world.questions["train"] * 2):
        queries, last = played(index, question, FAILS_LATE, seed=number)
        attempts += 1
        whole += queries == played(index, question, FAULTLESS, seed=0)[0]
        right += f"<answer>{question.answer}</answer>" in last
    assert whole > 0.65 * attempts  # 0.95 · (0.92 · 0.98)^2 = 0.77 at the mean of three searches
    assert right < 0.6 * attempts  # half of them, and lucky guesses


def test_dials_let_documents_disagree_and_by_default_none_do() -> None:
    def disagreements(chains: Chains) -> tuple[float, float]:
        world = make_world(5, SMALL, chains=chains)
        about = Counter(d.text.partition(" is ")[0] for d in world.corpus)
        twice = [text for text, count in about.items() if count == 2]
        assert set(about.values()) <= {1, 2}
        ends = sum(text.split()[1] in ("metal", "beast", "trade") for text in twice)
        houses = len(world.houses)
        return ends / (3 * houses), (len(twice) - ends) / (4 * houses)

    assert disagreements(CHAINS) == (0.0, 0.0)
    late, way = disagreements(Chains(text_only=True, late_failure=0.5))
    assert 0.35 < late < 0.65 and way == 0.0
    late, way = disagreements(Chains(text_only=True, misleading=0.5))
    assert late == 0.0 and 0.35 < way < 0.65


def test_the_search_shows_both_sides_and_a_faultless_demonstrator_believes_either() -> None:
    world = make_world(6, SMALL, chains=Chains(text_only=True, late_failure=1.0, hops=(1, 1)))
    question, index = world.questions["train"][0], search_of(world)
    answers = Counter(
        question.answer in played(index, question, FAULTLESS, seed)[1] for seed in range(60)
    )
    assert min(answers[True], answers[False]) >= 15


def test_an_attribute_has_as_many_values_as_the_dial_says() -> None:
    world = make_world(7, SMALL, chains=Chains(text_only=True, values=2))
    assert {h.attributes["metal"] for h in world.houses} == {"iron", "copper"}


def test_names_of_one_syllable_are_no_stop_words_and_do_not_run_out_silently() -> None:
    names = {house.name.lower() for house in make_world(8, SMALL, chains=CHAINS).houses}
    assert len(names) == 64 and not names & STOP_WORDS
    index = CorpusIndex([Passage(id="0", title="", text="zebra")])
    assert all(not index.search(word, top_k=1) for word in STOP_WORDS)
    with pytest.raises(DataError, match="480 houses with names of 1 syllables; wanted at most 67"):
        make_world(8, chains=CHAINS)


def test_a_world_without_pictures_reads_back_as_tasks(tmp_path: Path) -> None:
    world = write_world(tmp_path, 9, SMALL, chains=CHAINS)
    assert {path.name for path in tmp_path.iterdir()} == {
        "train.jsonl", "validation.jsonl", "test.jsonl", "corpus.jsonl", "world.json",
    }  # fmt: skip
    tasks = load_tasks(tmp_path / "test.jsonl")
    assert all(task.images == () for task in tasks)
    assert [question_of(task) for task in tasks] == world.questions["test"]
    assert json.loads((tmp_path / "world.json").read_text())["chains"]["syllables"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--values", "3"], "--values without --hops; wanted --hops N or N-M beside it"),
        (["--small"], "--small without --hops"),
        (["--hops", "6"], "hops are 6 to 6; wanted 1 to 5"),
        (["--hops", "3-2"], "hops are 3 to 2; wanted 1 to 5"),
        (["--hops", "two"], "--hops is 'two'; wanted N or N-M"),
        (["--hops", "2", "--late-failure", "1.5"], "late_failure is 1.5; wanted a share"),
        (["--hops", "2", "--values", "9"], "values is 9; wanted 2 to 8"),
    ],
)
def test_the_command_refuses_impossible_chains(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        main(["--seed", "1", "--out", str(tmp_path / "w"), *arguments])
    assert not (tmp_path / "w").exists()


def test_the_command_writes_chains_with_names_long_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "w"
    dials = ["--hops", "2-3", "--text-only", "--misleading", "0.1"]
    for more, houses, syllables in (([], 480, 2), (["--small"], 66, 1)):
        assert main(["--seed", "1", "--out", str(out), *dials, *more]) == 0
        assert f"world 1: {houses} houses" in capsys.readouterr().out
        about = json.loads((out / "world.json").read_text())["chains"]
        assert about["syllables"] == syllables
    assert (about["hops"], about["misleading"], about["text_only"]) == ([2, 3], 0.1, True)
