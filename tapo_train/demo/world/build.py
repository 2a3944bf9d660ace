"""Write a world to a folder: tasks, pictures, corpus and image index.

DIR/train.jsonl validation.jsonl test.jsonl   tasks in the native format
DIR/images/scenes/*.png images/emblems/*.png
DIR/corpus.jsonl                              {"id", "title", "text"}
DIR/image_index.jsonl                         {"title", "image"}
DIR/world.json                                seed, counts, format version
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tapo_train.demo.world.houses import Document, House, make_corpus, make_houses
from tapo_train.demo.world.pictures import draw_distinct_emblems, draw_scene
from tapo_train.demo.world.questions import Question, make_questions
from tapo_train.errors import DataError
from tapo_train.tools.images import encode_png

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldSize:
    """How many houses and questions each split gets."""

    train_houses: int = 320
    validation_houses: int = 80
    test_houses: int = 80
    train_questions: int = 1200
    validation_questions: int = 200
    test_questions: int = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Everything of one world but the pictures' bytes."""

    seed: int
    houses: list[House]
    corpus: list[Document]
    questions: dict[str, list[Question]]


def make_world(seed: int, size: WorldSize | None = None) -> World:
    """The world of `seed`: the same seed and size always give the same world."""
    size = size or WorldSize()
    counts = {
        "train": size.train_houses,
        "validation": size.validation_houses,
        "test": size.test_houses,
    }
    houses = make_houses(seed, counts=counts)
    numbers = {
        "train": size.train_questions,
        "validation": size.validation_questions,
        "test": size.test_questions,
    }
    questions = {
        split: make_questions(seed, houses, split=split, count=count)
        for split, count in numbers.items()
    }
    return World(seed=seed, houses=houses, corpus=make_corpus(seed, houses), questions=questions)


def write_world(out: Path, seed: int, size: WorldSize | None = None) -> World:
    """Make the world of `seed` and write it below `out`."""
    world = make_world(seed, size)
    (out / "images" / "scenes").mkdir(parents=True, exist_ok=True)
    (out / "images" / "emblems").mkdir(parents=True, exist_ok=True)
    drawn = draw_distinct_emblems(seed, len(world.houses))
    emblems = {house.name: emblem for house, emblem in zip(world.houses, drawn, strict=True)}
    for name, emblem in emblems.items():
        (out / "images" / "emblems" / f"{name}.png").write_bytes(encode_png(emblem))
    for split, questions in world.questions.items():
        for question in questions:
            rng = random.Random(f"scene/{seed}/{question.id}")
            panels = [(colour, emblems[name]) for colour, name in question.panels]
            scene = encode_png(draw_scene(rng, panels))
            (out / "images" / "scenes" / f"{question.id}.png").write_bytes(scene)
        _write_jsonl(out / f"{split}.jsonl", (_task_row(question) for question in questions))
    _write_jsonl(out / "corpus.jsonl", (asdict(document) for document in world.corpus))
    _write_jsonl(
        out / "image_index.jsonl",
        ({"title": f"Emblem of {n}", "image": f"images/emblems/{n}.png"} for n in emblems),
    )
    about = {"format": FORMAT_VERSION, "seed": seed, "houses": len(world.houses)}
    (out / "world.json").write_text(json.dumps(about) + "\n")
    return world


def _task_row(question: Question) -> dict[str, Any]:
    """One line of the native task format; `world` is for analysis, the policy never sees it."""
    return {
        "id": question.id,
        "prompt": [{"role": "user", "content": f"<image>\n{question.text}"}],
        "image": [f"images/scenes/{question.id}.png"],
        "reward_model": {"ground_truth": [question.answer], "style": "rule"},
        "data_source": f"world/{question.num_hops}-hop",
        "world": {
            "panels": [list(panel) for panel in question.panels],
            "target": question.target,
            "key": question.key,
            "relation": question.relation,
        },
    }


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(argv: Sequence[str]) -> int:
    """`python -m tapo_train world --seed S --out DIR`."""
    parser = argparse.ArgumentParser(
        prog="python -m tapo_train world",
        description="Generate an offline search world (tasks, pictures, corpus, image index).",
    )
    parser.add_argument(
        "--seed", type=int, required=True, help="any integer; same seed, same world"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args(argv)
    try:
        world = write_world(arguments.out, arguments.seed)
    except OSError as error:
        raise DataError(
            f"world: cannot write below {arguments.out}: {error.strerror or error}; wanted a folder"
        ) from error
    counts = ", ".join(f"{len(items)} {split}" for split, items in world.questions.items())
    print(
        f"world {arguments.seed}: {len(world.houses)} houses, {len(world.corpus)} documents, "
        f"questions: {counts} -> {arguments.out}"
    )
    return 0
