"""Worlds of chains: an answer takes one to five searches, each about what the last one found.

With pictures a chain begins at a house on a panel, without at a house that is named. Three dials
make attempts fail although every search was right, or succeed although one was wrong:

- late failure: of some attributes a second document, as good as the true one, says something else;
- misleading documents: the same for the relations on the way;
- values: an attribute has so many, and a wrong house has the right one that often.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tapo_train.demo.world.houses import SPLITS, Document, House
from tapo_train.demo.world.lexicon import (
    CHAIN_RELATIONS,
    CLOSED_ATTRIBUTES,
    COLOURS,
    FACT_TEMPLATES,
    PLACES,
    QUESTION_TEMPLATES,
    SYLLABLES,
    draw_name,
)
from tapo_train.demo.world.questions import Question
from tapo_train.errors import DataError

STOP_WORDS = frozenset({"be", "no", "to"})
"""Syllables that the text search leaves out."""
MOST_HOPS = len(CHAIN_RELATIONS) + 1
"""Relations of a chain are distinct; the last search asks for an attribute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chains:
    """What the chains of a world are like."""

    hops: tuple[int, int] = (1, MOST_HOPS)
    """Fewest and most text searches a question takes; the questions go through all of them."""
    text_only: bool = False
    """No pictures: questions name the house a chain begins at."""
    syllables: int = 2
    """Of a name: 1 to 3. There are 70 syllables."""
    late_failure: float = 0.0
    """Share of attributes about which two equally good documents disagree."""
    misleading: float = 0.0
    """Share of relations about which two equally good documents disagree."""
    values: int = 8
    """Values an attribute has, 2 to 8: one guess in so many is right."""

    def __post_init__(self) -> None:
        low, high = self.hops
        if not 1 <= low <= high <= MOST_HOPS:
            raise DataError(f"chains: hops are {low} to {high}; wanted 1 to {MOST_HOPS}, rising")
        for name in ("late_failure", "misleading"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise DataError(f"chains: {name} is {getattr(self, name)}; wanted a share, 0 to 1")
        if not 1 <= self.syllables <= 3:
            raise DataError(f"chains: syllables is {self.syllables}; wanted 1 to 3")
        if not 2 <= self.values <= _MOST_VALUES:
            raise DataError(f"chains: values is {self.values}; wanted 2 to {_MOST_VALUES}")


_MOST_VALUES = min(map(len, CLOSED_ATTRIBUTES.values()))


def make_chain_houses(seed: int, chains: Chains, *, counts: Mapping[str, int]) -> list[House]:
    """Invent `counts[split]` houses per split, with relations among their own split."""
    rng = random.Random(f"chain-houses/{seed}")
    pool = iter(_draw_names(rng, sum(counts.values()), chains.syllables))
    houses = []
    for split in SPLITS:
        members = [next(pool) for _ in range(counts[split])]
        for name in members:
            others = rng.sample([other for other in members if other != name], len(CHAIN_RELATIONS))
            values = {key: rng.choice(_values(key, chains)) for key in CLOSED_ATTRIBUTES}
            relations = dict(zip(CHAIN_RELATIONS, others, strict=True))
            houses.append(House(name=name, split=split, attributes=values, relations=relations))
    return houses


def _draw_names(rng: random.Random, count: int, syllables: int) -> dict[str, None]:
    """`count` different names; none that a search engine takes for a stop word."""
    possible = len(SYLLABLES) ** syllables - len(STOP_WORDS)
    if count > possible:
        raise DataError(
            f"chains: {count} houses with names of {syllables} syllables; wanted at most {possible}"
        )
    names: dict[str, None] = {}
    while len(names) < count:
        name = draw_name(rng, num_syllables=syllables)
        if name.lower() not in STOP_WORDS:
            names.setdefault(name)
    return names


def _values(key: str, chains: Chains) -> tuple[str, ...]:
    return CLOSED_ATTRIBUTES[key][: chains.values]


def make_chain_corpus(seed: int, houses: Sequence[House], chains: Chains) -> list[Document]:
    """One document per fact, and false ones in the same words as the dials say.

    True and false score the same in a search; which comes first is chance.
    """
    rng = random.Random(f"chain-corpus/{seed}")
    members = {split: [h.name for h in houses if h.split == split] for split in SPLITS}
    entries = []
    for house in houses:
        for key, value in house.attributes.items():
            entries.append((house.name, key, value))
            if rng.random() < chains.late_failure:
                others = [other for other in _values(key, chains) if other != value]
                entries.append((house.name, key, rng.choice(others)))
        for key, name in house.relations.items():
            entries.append((house.name, key, name))
            if rng.random() < chains.misleading:
                others = [o for o in members[house.split] if o not in (name, house.name)]
                entries.append((house.name, key, rng.choice(others)))
    rng.shuffle(entries)
    # The title lets a search for a house prefer what is about it to what only names it.
    return [
        Document(
            id=f"d{number}",
            title=name,
            text=FACT_TEMPLATES[0].format(key=key, name=name, value=value),
        )
        for number, (name, key, value) in enumerate(entries)
    ]


def make_chain_questions(
    seed: int, houses: Sequence[House], chains: Chains, *, split: str, count: int
) -> list[Question]:
    """`count` questions over the houses of one split, of all lengths in turn."""
    rng = random.Random(f"chain-questions/{seed}/{split}")
    members = [house for house in houses if house.split == split]
    by_name = {house.name: house for house in members}
    low, high = chains.hops
    keys = tuple(CLOSED_ATTRIBUTES)
    return [
        _question(
            f"{split}-{number}",
            members,
            by_name,
            relations=tuple(rng.sample(CHAIN_RELATIONS, low + number % (high - low + 1) - 1)),
            key=keys[number // (high - low + 1) % len(keys)],
            text_only=chains.text_only,
            rng=rng,
        )
        for number in range(count)
    ]


def _question(
    name: str,
    members: Sequence[House],
    by_name: Mapping[str, House],
    *,
    relations: tuple[str, ...],
    key: str,
    text_only: bool,
    rng: random.Random,
) -> Question:
    """A question about the house that `relations` lead to from a random one."""
    shown = rng.sample(members, 1 if text_only else len(PLACES))
    colours = rng.sample(list(COLOURS), len(PLACES))
    target = rng.randrange(len(shown))
    house = subject = shown[target]
    whom = house.name if text_only else f"the house on the {colours[target]} panel"
    for relation in relations:
        subject = by_name[subject.relations[relation]]
        whom = f"the {relation} of {whom}"
    panels = () if text_only else tuple((c, h.name) for c, h in zip(colours, shown, strict=True))
    return Question(
        id=name,
        text=rng.choice(QUESTION_TEMPLATES).format(key=key, whom=whom),
        answer=subject.attributes[key],
        panels=panels,
        target=target,
        house=house.name,
        key=key,
        relations=relations,
    )
