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
from functools import partial
from pathlib import Path
from typing import Any

from tapo_train.demo.world.chains import (
    Chains,
    make_chain_corpus,
    make_chain_houses,
    make_chain_questions,
)
from tapo_train.demo.world.houses import Document, House, make_corpus, make_houses
from tapo_train.demo.world.pictures import draw_distinct_emblems, draw_scene
from tapo_train.demo.world.questions import Question, make_questions
from tapo_train.errors import DataError
from tapo_train.tools.images import encode_png

FORMAT_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldSize:
    """How many houses and questions each split gets."""

    train_houses: int = 320
    validation_houses: int = 80
    test_houses: int = 80
    train_questions: int = 1200
    validation_questions: int = 200
    test_questions: int = 200


SMALL = WorldSize(
    train_houses=44,
    validation_houses=10,
    test_houses=12,
    train_questions=1200,
    validation_questions=100,
    test_questions=200,
)
"""As many houses as there are names of one syllable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Everything of one world but the pictures' bytes."""

    seed: int
    houses: list[House]
    corpus: list[Document]
    questions: dict[str, list[Question]]


def make_world(seed: int, size: WorldSize | None = None, *, chains: Chains | None = None) -> World:
    """The world of `seed`: the same arguments always give the same world.

    Args:
        chains: questions that take so many searches, over houses of their own kind; None: the
            demo's questions of one or two.
    """
    size = size or WorldSize()
    counts = {
        "train": size.train_houses,
        "validation": size.validation_houses,
        "test": size.test_houses,
    }
    numbers = {
        "train": size.train_questions,
        "validation": size.validation_questions,
        "test": size.test_questions,
    }
    if chains is not None:
        houses = make_chain_houses(seed, chains, counts=counts)
        corpus = make_chain_corpus(seed, houses, chains)
        ask = partial(make_chain_questions, seed, houses, chains)
    else:
        houses = make_houses(seed, counts=counts)
        corpus = make_corpus(seed, houses)
        ask = partial(make_questions, seed, houses)
    questions = {split: ask(split=split, count=count) for split, count in numbers.items()}
    return World(seed=seed, houses=houses, corpus=corpus, questions=questions)


def write_world(
    out: Path, seed: int, size: WorldSize | None = None, *, chains: Chains | None = None
) -> World:
    """Make the world of `seed` and write it below `out`; one without pictures has no `images/`."""
    world = make_world(seed, size, chains=chains)
    out.mkdir(parents=True, exist_ok=True)
    if chains is None or not chains.text_only:
        _write_pictures(out, world)
    for split, questions in world.questions.items():
        _write_jsonl(out / f"{split}.jsonl", (_task_row(question) for question in questions))
    _write_jsonl(out / "corpus.jsonl", (asdict(document) for document in world.corpus))
    about = {
        "format": FORMAT_VERSION,
        "seed": seed,
        "houses": len(world.houses),
        "chains": None if chains is None else asdict(chains),
    }
    (out / "world.json").write_text(json.dumps(about) + "\n")
    return world


def _write_pictures(out: Path, world: World) -> None:
    """The emblems with their index, and a scene for each question."""
    seed = world.seed
    (out / "images" / "scenes").mkdir(parents=True, exist_ok=True)
    (out / "images" / "emblems").mkdir(parents=True, exist_ok=True)
    drawn = draw_distinct_emblems(seed, len(world.houses))
    emblems = {house.name: emblem for house, emblem in zip(world.houses, drawn, strict=True)}
    for name, emblem in emblems.items():
        (out / "images" / "emblems" / f"{name}.png").write_bytes(encode_png(emblem))
    for question in (question for asked in world.questions.values() for question in asked):
        rng = random.Random(f"scene/{seed}/{question.id}")
        panels = [(colour, emblems[name]) for colour, name in question.panels]
        scene = encode_png(draw_scene(rng, panels))
        (out / "images" / "scenes" / f"{question.id}.png").write_bytes(scene)
    _write_jsonl(
        out / "image_index.jsonl",
        ({"title": f"Emblem of {n}", "image": f"images/emblems/{n}.png"} for n in emblems),
    )


def _task_row(question: Question) -> dict[str, Any]:
    """One line of the native task format; `world` is for analysis, the policy never sees it."""
    is_seen = bool(question.panels)
    return {
        "id": question.id,
        "prompt": [{"role": "user", "content": "<image>\n" * is_seen + question.text}],
        "image": [f"images/scenes/{question.id}.png"] * is_seen,
        "reward_model": {"ground_truth": [question.answer], "style": "rule"},
        "data_source": f"world/{question.num_hops}-hop",
        "world": {
            "panels": [list(panel) for panel in question.panels],
            "target": question.target,
            "house": question.house,
            "key": question.key,
            "relations": list(question.relations),
        },
    }


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(argv: Sequence[str]) -> int:
    """`python -m tapo_train world --seed S --out DIR`."""
    arguments = _parser().parse_args(argv)
    chains = _chains(arguments)
    try:
        size = SMALL if arguments.small else None
        world = write_world(arguments.out, arguments.seed, size, chains=chains)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tapo_train world",
        description="Generate an offline search world (tasks, pictures, corpus, image index).",
    )
    parser.add_argument(
        "--seed", type=int, required=True, help="any integer; same seed, same world"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    group = parser.add_argument_group("chains (instead of the demo's questions of 1 or 2 hops)")
    group.add_argument("--hops", metavar="N or N-M", help="text searches a question takes, 1 to 5")
    group.add_argument("--text-only", action="store_true", help="no pictures")
    group.add_argument(
        "--small",
        action="store_true",
        help="66 houses with names of one syllable, as assets/chain_warm_start reads them",
    )
    group.add_argument(
        "--late-failure",
        type=float,
        metavar="SHARE",
        help="of attributes about which two equally good documents disagree (0)",
    )
    group.add_argument(
        "--misleading", type=float, metavar="SHARE", help="the same of relations on the way (0)"
    )
    group.add_argument("--values", type=int, metavar="N", help="of an attribute, 2 to 8 (8)")
    return parser


def _chains(arguments: argparse.Namespace) -> Chains | None:
    """What `--hops` and the dials beside it say; None without."""
    dials = {
        name: value
        for name in ("text_only", "small", "late_failure", "misleading", "values")
        if (value := getattr(arguments, name)) not in (None, False)
    }
    if arguments.hops is None:
        if dials:
            flag = "--" + next(iter(dials)).replace("_", "-")
            raise DataError(f"world: {flag} without --hops; wanted --hops N or N-M beside it")
        return None
    low, _, high = arguments.hops.partition("-")
    if not (low.isdecimal() and (high or low).isdecimal()):
        raise DataError(f"world: --hops is {arguments.hops!r}; wanted N or N-M, of 1 to 5")
    syllables = 1 if dials.pop("small", False) else 2
    return Chains(hops=(int(low), int(high or low)), syllables=syllables, **dials)
