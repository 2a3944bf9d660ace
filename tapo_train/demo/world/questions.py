"""Scenes and questions: which house stands on which panel, and what is asked about it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tapo_train.demo.world.houses import House
from tapo_train.demo.world.lexicon import (
    ATTRIBUTES,
    COLOURS,
    PLACES,
    QUESTION_TEMPLATES,
    RELATIONS,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question about one scene, with what a demonstrator needs to know."""

    id: str
    text: str
    answer: str
    panels: tuple[tuple[str, str], ...]
    """(colour, house name) of the four panels in reading order; () in a world without pictures."""
    target: int
    """Panel asked about."""
    house: str
    """Name of the house on the panel asked about, or named by the question."""
    key: str
    """Attribute asked for."""
    relations: tuple[str, ...]
    """(): zoom → image search → text search → answer. One text search more for each."""

    @property
    def colour(self) -> str:
        """Colour of the panel asked about."""
        return self.panels[self.target][0]

    @property
    def num_hops(self) -> int:
        """Text searches that are needed."""
        return 1 + len(self.relations)


def make_questions(seed: int, houses: Sequence[House], *, split: str, count: int) -> list[Question]:
    """`count` questions over the houses of one split; half of them take one hop more."""
    rng = random.Random(f"questions/{seed}/{split}")
    members = [house for house in houses if house.split == split]
    by_name = {house.name: house for house in members}
    questions: list[Question] = []
    for number in range(count):
        shown = rng.sample(members, len(PLACES))
        colours = rng.sample(list(COLOURS), len(PLACES))
        target = rng.randrange(len(PLACES))
        key = ATTRIBUTES[number % len(ATTRIBUTES)]
        relation = rng.choice(RELATIONS) if number % 2 else None
        house = shown[target]
        subject = by_name[house.relations[relation]] if relation else house
        whom = f"the house on the {colours[target]} panel"
        if relation:
            whom = f"the {relation} of {whom}"
        questions.append(
            Question(
                id=f"{split}-{number}",
                text=rng.choice(QUESTION_TEMPLATES).format(key=key, whom=whom),
                answer=subject.attributes[key],
                panels=tuple(
                    (colour, other.name) for colour, other in zip(colours, shown, strict=True)
                ),
                target=target,
                house=house.name,
                key=key,
                relations=(relation,) if relation else (),
            )
        )
    return questions
