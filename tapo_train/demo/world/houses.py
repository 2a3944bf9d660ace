"""Houses, their facts and relations, and the corpus of short documents about them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tapo_train.demo.world.lexicon import (
    ATTRIBUTES,
    CLOSED_ATTRIBUTES,
    FACT_TEMPLATES,
    FILLER_DOCUMENTS,
    RELATIONS,
    RUMOUR_TEMPLATE,
    draw_name,
)

SPLITS: tuple[str, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class House:
    """One entity: a name, five attributes and two relations to houses of its own split."""

    name: str
    split: str
    attributes: dict[str, str]
    relations: dict[str, str]
    """relation → name of the other house"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One entry of the text corpus."""

    id: str
    title: str
    text: str


def make_houses(seed: int, *, counts: dict[str, int]) -> list[House]:
    """Invent `counts[split]` houses per split; names are unique in the world."""
    rng = random.Random(f"houses/{seed}")
    names: dict[str, None] = {}
    while len(names) < sum(counts.values()):
        names.setdefault(draw_name(rng, num_syllables=3))
    pool = iter(names)
    houses: list[House] = []
    for split in SPLITS:
        members = [next(pool) for _ in range(counts[split])]
        for name in members:
            others = rng.sample([other for other in members if other != name], len(RELATIONS))
            houses.append(
                House(
                    name=name,
                    split=split,
                    attributes={key: _draw_value(key, rng) for key in ATTRIBUTES},
                    relations=dict(zip(RELATIONS, others, strict=True)),
                )
            )
    return houses


def _draw_value(key: str, rng: random.Random) -> str:
    if key in CLOSED_ATTRIBUTES:
        return rng.choice(CLOSED_ATTRIBUTES[key])
    return draw_name(rng, num_syllables=2)


def make_corpus(seed: int, houses: list[House], *, rumour_rate: float = 0.15) -> list[Document]:
    """One document per fact, rumours that contradict some facts, and general lore.

    Rumours name the same house and the same key with a wrong value; they are
    longer than the fact, so BM25 ranks them below it, but they do appear.
    """
    rng = random.Random(f"corpus/{seed}")
    entries: list[tuple[str, str]] = []
    for house in houses:
        for key, value in (house.attributes | house.relations).items():
            fact = rng.choice(FACT_TEMPLATES).format(key=key, name=house.name, value=value)
            entries.append((house.name, fact))
            if key in house.attributes and rng.random() < rumour_rate:
                wrong = _draw_other_value(key, value, rng)
                rumour = RUMOUR_TEMPLATE.format(key=key, name=house.name, value=wrong)
                entries.append(("Market talk", rumour))
    metals, beasts, trades = (CLOSED_ATTRIBUTES[key] for key in ("metal", "beast", "trade"))
    for template in FILLER_DOCUMENTS:
        (a, b), (d, e) = rng.sample(trades, 2), rng.sample(beasts, 2)
        lore = template.format(a=a, b=b, c=rng.choice(metals), d=d, e=e)
        entries.append(("Lore", lore))
    rng.shuffle(entries)
    return [
        Document(id=f"d{number}", title=title, text=text)
        for number, (title, text) in enumerate(entries)
    ]


def _draw_other_value(key: str, value: str, rng: random.Random) -> str:
    while (other := _draw_value(key, rng)) == value:
        pass
    return other
