"""The words every world is made of; only the names and facts depend on the seed.

Names are strictly consonant-vowel syllables ("Tavore"), so a tokenizer can give
each syllable one token and copying a name is copying tokens.
"""

from __future__ import annotations

import random

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
SYLLABLES: tuple[str, ...] = tuple(c + v for c in CONSONANTS for v in VOWELS)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (30, 140, 60),
    "blue": (40, 70, 210),
    "yellow": (245, 215, 40),
    "purple": (125, 40, 150),
    "orange": (245, 135, 20),
    "cyan": (60, 205, 215),
    "pink": (250, 150, 190),
}
"""Panel colours of a scene, as RGB."""

PLACES: tuple[str, ...] = ("top left", "top right", "bottom left", "bottom right")
"""The panels of a scene in reading order."""

CLOSED_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "metal": ("iron", "copper", "silver", "gold", "tin", "lead", "zinc", "nickel"),
    "beast": ("wolf", "bear", "eagle", "horse", "stag", "lion", "fox", "owl"),
    "trade": ("wool", "salt", "wine", "glass", "silk", "paper", "spice", "timber"),
}
"""Attributes with a known list of values: a guess is right one time in eight."""

OPEN_ATTRIBUTES: tuple[str, ...] = ("founder", "seat")
"""Attributes whose value is an invented name: a guess is never right."""

ATTRIBUTES: tuple[str, ...] = (*OPEN_ATTRIBUTES, *CLOSED_ATTRIBUTES)
RELATIONS: tuple[str, ...] = ("rival", "ally")
CHAIN_RELATIONS: tuple[str, ...] = (*RELATIONS, "president", "minister")
"""Of the worlds of chains."""

FACT_TEMPLATES: tuple[str, ...] = (
    "the {key} of {name} is {value}.",
    "records say the {key} of {name} is {value}.",
)
RUMOUR_TEMPLATE = (
    "some travellers at the old market still claim that the {key} of {name} was {value}, "
    "but nobody ever found proof of it."
)
FILLER_DOCUMENTS: tuple[str, ...] = (
    "Every house keeps one beast on its banner and one metal in its vault.",
    "The founder of a house gives the seat its first law.",
    "A rival today may be an ally after the long winter.",
    "The trade in {a} and {b} grew when the river road was opened.",
    "Miners look for {c} in the northern hills.",
    "Children learn songs about the {d} and the {e}.",
)
QUESTION_TEMPLATES: tuple[str, ...] = (
    "What is the {key} of {whom}?",
    "Name the {key} of {whom}.",
    "Find out the {key} of {whom}.",
)


def draw_name(rng: random.Random, *, num_syllables: int) -> str:
    """A capitalised name of `num_syllables` syllables."""
    return "".join(rng.choice(SYLLABLES) for _ in range(num_syllables)).capitalize()
