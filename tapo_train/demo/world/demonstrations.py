"""Scripted demonstrations: able in every step, poor in habit.

A demonstrator knows the right next step, but as often as not takes a bad one:
it guesses without searching, searches the unzoomed picture, zooms into the wrong
panel, or stops after the first hop. What it writes is always well formed. A policy
trained on such attempts can do every step and does the wrong ones by habit, which
is what reinforcement learning is there to change.
"""

from __future__ import annotations

import json
import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from tapo_train.demo.world.lexicon import (
    CHAIN_RELATIONS,
    CLOSED_ATTRIBUTES,
    PLACES,
    draw_name,
)
from tapo_train.demo.world.questions import Question
from tapo_train.types import Observation

SYSTEM_PROMPT = (
    "Answer the question about the image. Think, then call one tool, or finish with "
    "<answer></answer>."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How often the demonstrator goes wrong, as probabilities at each fork."""

    guess_closed: float = 0.55
    """Answers at once when the attribute has a known list of values."""
    guess_open: float = 0.15
    """Answers at once when the value is an invented name."""
    search_unzoomed: float = 0.3
    """Searches the whole picture instead of zooming."""
    give_up: float = 0.6
    """Guesses after a picture was not recognised, instead of zooming (again)."""
    wrong_panel: float = 0.15
    """Zooms into another panel, and believes it was the right one."""
    stop_early: float = 0.6
    """Asks for the first house's attribute instead of following the relation."""
    vague_query: float = 0.1
    """Searches for the name alone and takes whatever fact comes first."""
    wrong_relation: float = 0.0
    """Follows another relation, at each hop."""
    late_guess: float = 0.0
    """Guesses although the answer stands there."""


FAULTLESS = Faults(
    guess_closed=0,
    guess_open=0,
    search_unzoomed=0,
    give_up=0,
    wrong_panel=0,
    stop_early=0,
    vague_query=0,
)
FAILS_LATE = Faults(
    guess_closed=0.05,
    guess_open=0.05,
    search_unzoomed=0,
    give_up=0,
    wrong_panel=0,
    stop_early=0.02,
    vague_query=0,
    wrong_relation=0.08,
    late_guess=0.5,
)
"""Searches well and then guesses: the habit of a world of chains."""
GUESSES = Faults(
    guess_closed=0.5,
    guess_open=0.5,
    search_unzoomed=0,
    give_up=0,
    wrong_panel=0,
    stop_early=0,
    vague_query=0.1,
    late_guess=0.2,
)
"""Knows how to search and as often as not does not: the habit of a world of one search."""

Script = Generator[str, Observation, None]
"""Yields the text of a turn; is sent what the tool answered."""


def demonstrate(question: Question, rng: random.Random, *, faults: Faults) -> Script:
    """One attempt at `question`, turn by turn, the last one with an answer."""
    guess = faults.guess_closed if question.key in CLOSED_ATTRIBUTES else faults.guess_open
    if rng.random() < guess:
        yield _guess(question, rng)
        return
    if not question.panels:
        yield from _read_facts(question, question.house, rng, faults)
        return
    if rng.random() < faults.search_unzoomed:
        yield _image_search("search the image.", 0)
        if rng.random() < faults.give_up:
            yield _guess(question, rng)
            return
    panel = question.target
    if rng.random() < faults.wrong_panel:
        panel = rng.choice([place for place in range(len(PLACES)) if place != panel])
    yield _zoom(question, panel, rng)
    found = yield _image_search("search the emblem.", 1)
    name = found.text.partition("Emblem of ")[2].partition("\n")[0]
    yield from _read_facts(question, name, rng, faults)


def _read_facts(question: Question, name: str, rng: random.Random, faults: Faults) -> Script:
    key, start = question.key, name
    thought = f"the house is {name}." if question.panels else f"{name}."
    for relation in question.relations:
        if rng.random() < faults.stop_early:
            break
        asked = _misled(relation, rng, faults)
        result = yield _text_search(thought, f"{name} {asked}")
        other = _read(result.text, asked, name, rng)
        if other is None:
            yield _guess(question, rng)
            return
        # Without pictures a thought is as short as it can be: cheap, and the call says the rest.
        thought = f"the {asked} of {name} is {other}." if question.panels else f"{other}."
        name = other
    vague = name == start and rng.random() < faults.vague_query
    result = yield _text_search(thought, name if vague else f"{name} {key}")
    value = _read(result.text, key, name, rng)
    if value is None or _happens(faults.late_guess, rng):
        yield _guess(question, rng)
    else:
        yield _answer(f"the {key} of {name} is {value}." if question.panels else f"{value}.", value)


def _happens(probability: float, rng: random.Random) -> bool:
    """A fault that is impossible draws nothing, so that demonstrations stay what they were."""
    return probability > 0.0 and rng.random() < probability


def _misled(relation: str, rng: random.Random, faults: Faults) -> str:
    others = [other for other in CHAIN_RELATIONS if other != relation]
    return rng.choice(others) if _happens(faults.wrong_relation, rng) else relation


def _read(text: str, key: str, name: str, rng: random.Random) -> str | None:
    """One of the values a search result states, at random if documents disagree."""
    found = read_facts(text, key, name)
    if not found:
        return None
    return rng.choice(found) if len(found) > 1 else found[0]


def read_facts(text: str, key: str, name: str) -> list[str]:
    """The values a search result states for `key` of `name`; rumours ("was") do not count."""
    parts = text.split(f"the {key} of {name} is ")[1:]
    return [value for part in parts if (value := part.partition(".")[0])]


def panel_box(panel: int, rng: random.Random) -> list[int]:
    """A box on the 50 grid that isolates the emblem on `panel`, in 0..1000 of the scene."""
    x, y = 500 * (panel % 2), 500 * (panel // 2)
    trim = [rng.choice((0, 0, 0, 50)) for _ in range(4)]
    return [x + trim[0], y + trim[1], x + 500 - trim[2], y + 500 - trim[3]]


def _zoom(question: Question, panel: int, rng: random.Random) -> str:
    colours = " ".join(colour for colour, _ in question.panels)
    thought = f"{colours}. {question.colour} is {PLACES[panel]}."
    return _call(thought, "image_zoom_in_tool", bbox_2d=panel_box(panel, rng), img_idx=0)


def _image_search(thought: str, img_idx: int) -> str:
    return _call(thought, "image_search_tool", img_idx=img_idx)


def _text_search(thought: str, query: str) -> str:
    return _call(thought, "text_search_tool", query=query)


def _call(thought: str, name: str, **arguments: object) -> str:
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<think>{thought}</think>\n<tool_call>\n{call}\n</tool_call>"


def _guess(question: Question, rng: random.Random) -> str:
    if question.key in CLOSED_ATTRIBUTES:
        value = rng.choice(CLOSED_ATTRIBUTES[question.key])
    else:
        value = draw_name(rng, num_syllables=2)
    return _answer("I guess.", value)


def _answer(thought: str, value: str) -> str:
    return f"<think>{thought}</think>\n<answer>{value}</answer>"


def sample_phrases(question: Question, rng: random.Random) -> Iterator[str]:
    """Every kind of sentence demonstrations and tools produce, for the tokenizer."""
    yield _guess(question, rng)
    yield _zoom(question, question.target, rng)
    yield _image_search("search the image.", 0)
    yield _image_search("search the emblem.", 1)
    yield _text_search(f"the house is {question.house}.", f"{question.house} {question.key}")
    yield _answer(f"the {question.key} of {question.house} is so.", "so")
    relation = question.relations[0] if question.relations else None
    yield _text_search(f"the {relation} of it is so.", f"so {relation}")
    yield "Here is the zoomed image:"
    yield "No matching images were found."
    yield f"Reverse image search results:\nTitle 1: Emblem of {question.house}\nThumbnails:"
    yield "No results were found.\n1. \n2. \n3. "
