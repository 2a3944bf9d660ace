"""The world: deterministic, disjoint splits, emblems that only a zoom makes findable."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from tapo_train.data.tasks import load_tasks
from tapo_train.demo.world.build import WorldSize, main, make_world, write_world
from tapo_train.demo.world.demonstrations import FAULTLESS, demonstrate, panel_box, read_facts
from tapo_train.demo.world.houses import SPLITS, make_houses
from tapo_train.demo.world.lexicon import ATTRIBUTES, COLOURS
from tapo_train.demo.world.pictures import (
    MIN_HASH_DISTANCE,
    draw_distinct_emblems,
    draw_scene,
    perceptual_hash,
)
from tapo_train.tools.image_search import ImageIndex
from tapo_train.tools.picture_files import described
from tapo_train.tools.picture_index import MIN_AGREEMENT


def tree_digest(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    size = WorldSize(
        train_houses=8,
        validation_houses=5,
        test_houses=5,
        train_questions=4,
        validation_questions=2,
        test_questions=2,
    )
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_world(tmp_path / name, seed, size)
    a, b, c = (tree_digest(tmp_path / name) for name in "abc")
    assert a == b
    assert set(a.values()).isdisjoint(set(c.values()))


def test_the_default_world_has_the_promised_size() -> None:
    world = make_world(0)
    assert len(world.houses) >= 400
    assert len(world.questions["train"]) >= 1000
    assert len(world.questions["validation"]) == len(world.questions["test"]) == 200
    hops = [question.num_hops for question in world.questions["test"]]
    assert hops.count(1) == hops.count(2) == 100


def test_held_out_houses_appear_in_no_training_question() -> None:
    world = make_world(0)
    split_of = {house.name: house.split for house in world.houses}
    assert len(split_of) == len(world.houses)
    for split, questions in world.questions.items():
        assert {split_of[name] for q in questions for _, name in q.panels} == {split}
    for house in world.houses:
        assert {split_of[other] for other in house.relations.values()} == {house.split}
        assert house.name not in house.relations.values()


def test_the_answer_of_every_question_follows_from_the_facts() -> None:
    world = make_world(3)
    houses = {house.name: house for house in world.houses}
    for question in world.questions["test"]:
        subject = houses[question.house]
        for relation in question.relations:
            subject = houses[subject.relations[relation]]
        assert question.answer == subject.attributes[question.key]
        assert question.colour in question.text and question.key in question.text


def test_every_fact_stands_in_the_corpus_once_and_rumours_contradict_it() -> None:
    world = make_world(1)
    texts = [document.text for document in world.corpus]
    house = world.houses[0]
    for key, value in (house.attributes | house.relations).items():
        facts = [text for text in texts if f"the {key} of {house.name} is " in text]
        assert [read_facts(text, key, house.name) for text in facts] == [[value]]
    rumours = [text for text in texts if "some travellers" in text]
    assert 0.05 * len(world.houses) * len(ATTRIBUTES) < len(rumours)
    assert all(" was " in rumour and " is " not in rumour for rumour in rumours)


def test_an_emblem_is_found_after_a_zoom_and_not_before() -> None:
    rng = random.Random(0)
    emblems = draw_distinct_emblems(4, 60)
    index = ImageIndex.of(described("", emblem, thumbnail_side_px=8) for emblem in emblems)
    for _ in range(8):
        shown = rng.sample(range(len(emblems)), 4)
        colours = rng.sample(list(COLOURS), 4)
        scene = draw_scene(rng, [(c, emblems[i]) for c, i in zip(colours, shown, strict=True)])
        assert not index.search(scene, top_k=3)
        for panel, emblem in enumerate(shown):
            box = [round(edge * scene.width / 1000) for edge in panel_box(panel, rng)]
            ranked = index.ranked(scene.crop((box[0], box[1], box[2], box[3])))
            assert [n for n, agrees in ranked if agrees >= MIN_AGREEMENT] == [emblem]
        half = scene.crop((0, 0, scene.width, scene.height // 2))
        assert not index.search(half, top_k=3)


def test_emblems_of_a_world_are_far_apart() -> None:
    codes = [perceptual_hash(emblem) for emblem in draw_distinct_emblems(0, 80)]
    gaps = [(a ^ b).bit_count() for i, a in enumerate(codes) for b in codes[:i]]
    assert min(gaps) >= MIN_HASH_DISTANCE


def test_a_written_world_reads_as_tasks(small_world: Path) -> None:
    tasks = load_tasks(small_world / "test.jsonl")
    assert [task.id for task in tasks] == [f"test-{i}" for i in range(10)]
    assert tasks[0].images[0].width == 256
    assert tasks[0].source == "world/1-hop" and tasks[1].source == "world/2-hop"
    about = json.loads((small_world / "world.json").read_text())
    assert about["seed"] == 3


def test_the_command_line_names_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--seed", "2", "--out", str(tmp_path / "w")]) == 0
    assert "world 2: 480 houses" in capsys.readouterr().out
    assert {f"{split}.jsonl" for split in SPLITS} < {p.name for p in (tmp_path / "w").iterdir()}


def test_a_rumour_is_not_read_as_a_fact() -> None:
    text = "1. Market talk: some still claim that the seat of Tavore was Miko, but no.\n"
    assert read_facts(text, "seat", "Tavore") == []
    assert read_facts(text + "2. Tavore: the seat of Tavore is Rona.", "seat", "Tavore") == ["Rona"]


def test_a_faultless_demonstration_starts_with_a_zoom_into_the_right_panel() -> None:
    question = make_world(0).questions["train"][0]
    first = next(demonstrate(question, random.Random(0), faults=FAULTLESS))
    x, y = 500 * (question.target % 2), 500 * (question.target // 2)
    box = json.loads(first.partition('bbox_2d": ')[2].partition(', "img_idx')[0])
    assert x <= box[0] < box[2] <= x + 500 and y <= box[1] < box[3] <= y + 500


def test_names_are_whole_syllables() -> None:
    counts = {"train": 5, "validation": 3, "test": 3}
    for house in make_houses(9, counts=counts):
        assert len(house.name) == 6
        assert all(house.name[i].lower() in "bdfgklmnprstvz" for i in (0, 2, 4))
