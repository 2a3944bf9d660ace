"""Scores of the benchmarks' papers, against implementations that share no code with ours."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from dataclasses import replace

import pytest

from tapo_train.rewards.answers import token_f1
from tapo_train.rewards.matching import exact_match
from tapo_train.rewards.official import (
    Scored,
    attempted_scores,
    infoseek_final,
    infoseek_match,
    metric_of,
    official_score,
    token_set_f1,
)
from tapo_train.types import Task

CASES = 1500
WORDS = (
    *("the", "A", "an", "Eiffel", "eiffel", "Tower!", "tour", "Zürich", "Zu\u0308rich", "ＡＢＣ"),
    *(
        "ﬁre",
        "東京",
        "東京都",
        "القاهرة",
        "—",
        "…",
        "1.5",
        "15",
        "(b)",
        "$5",
        "",
        " ",
        "\u00a0",
        "naïve",
    ),
)
NUMBERS = (
    "10",
    "-3",
    "1,234.5",
    ".5",
    "2e3",
    "7.",
    "12-14",
    "12 - 14",
    "5–9",
    "9-4",
    "x",
    "",
    "−4",
    "+8",
)


def words(text: str) -> list[str]:
    """SQuAD's normal form as words, after NFKC, one character at a time."""
    kept, lowered = [], unicodedata.normalize("NFKC", text).lower()
    for character in lowered:
        is_ascii = ord(character) < 128 and not character.isalnum() and not character.isspace()
        control = ord(character) < 32 or ord(character) == 127
        if (is_ascii and not control) or unicodedata.category(character)[0] == "P":
            continue
        kept.append(character)
    # An article is one between characters that belong to no word.
    found = "".join(kept)
    out, run = [], ""
    for character in [*found, "\0"]:
        if character == "_" or character.isalnum():
            run += character
            continue
        out.append(" " if run in ("a", "an", "the") else run)
        run = ""
        out.append(character)
    bare = "".join(out).replace("\0", "").split()
    return bare or lowered.split()


def texts(rng: random.Random) -> str:
    return rng.choice(("", " ")) + " ".join(rng.choices(WORDS, k=rng.randint(0, 5)))


def own_exact(answer: str, accepted: list[str]) -> float:
    said = words(answer)
    return float(bool(said) and any(words(text) == said for text in accepted))


def own_f1(answer: str, accepted: list[str]) -> float:
    best = 0.0
    for text in accepted:
        left, right = words(answer), words(text)
        rest, shared = list(right), 0
        for word in left:
            if word in rest:
                rest.remove(word)
                shared += 1
        if shared:
            precision, recall = shared / len(left), shared / len(right)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def own_set_f1(answer: str, accepted: list[str]) -> float:
    best = 0.0
    for text in accepted:
        left, right = list(dict.fromkeys(words(answer))), list(dict.fromkeys(words(text)))
        shared = sum(word in right for word in left)
        if sorted(left) == sorted(right):
            best = 1.0
        elif shared:
            precision, recall = shared / len(left), shared / len(right)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(exact_match, own_exact), (token_f1, own_f1), (token_set_f1, own_set_f1)],
    ids=["exact match", "token F1", "token set F1"],
)
def test_scores_of_texts_equal_an_independent_implementation(
    ours: Callable[[str, list[str]], float], theirs: Callable[[str, list[str]], float]
) -> None:
    rng = random.Random(7)
    seen = set()
    for _ in range(CASES):
        answer, accepted = texts(rng), [texts(rng) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.3:
            accepted.append(answer.upper())
        expected = theirs(answer, accepted)
        assert float(ours(answer, accepted)) == pytest.approx(expected, abs=1e-12), (
            answer,
            accepted,
        )
        seen.add(round(expected, 1))
    assert {0.0, 1.0} <= seen


def own_numbers(text: str) -> list[float]:
    """What InfoSeek's evaluator reads, by a scanner: a minus behind a digit is no sign."""
    found: list[float] = []
    place = 0
    while place < len(text):
        start = place
        signed = text[place] in "+-" and not (
            text[place] == "-" and place and text[place - 1].isdigit()
        )
        place += signed
        if text[place : place + 1] == ".":
            place += 1
        digits = place
        while place < len(text) and text[place].isdecimal():
            place += 1
        if place == digits:
            place = start + 1
            continue
        while (
            text[place : place + 1] == ","
            and text[place + 1 : place + 4].isdecimal()
            and len(text[place + 1 : place + 4]) == 3
        ):
            place += 4
        if text[place : place + 1] == ".":
            place += 1
        while place < len(text) and text[place].isdecimal():
            place += 1
        if text[place : place + 1] in ("e", "E"):
            power = place + 1
            power += text[power : power + 1] in ("+", "-")
            if text[power : power + 1].isdecimal():
                place = power
                while place < len(text) and text[place].isdecimal():
                    place += 1
        number = text[start:place].replace(",", "").strip(".")
        if number.count(".") > 1:
            number = number.split(".")[0]
        if number.strip("+-"):
            found.append(float(number))
    return found


def own_infoseek(answer: str, low: float, high: float) -> bool:
    numbers = own_numbers(answer)[:2]
    if not numbers:
        numbers = [0.0, 0.0]
    if len(numbers) == 1 or numbers[0] > numbers[1]:
        return low <= numbers[0] <= high
    first, second = numbers
    if low <= first and second <= high:
        return True
    shared = max(0.0, min(second, high) - max(first, low))
    both = (second - first + 1e-12) + (high - low + 1e-12) - shared
    return shared / both >= 0.5 - 1e-12


def test_numbers_and_ranges_of_infoseek_equal_an_independent_implementation() -> None:
    rng = random.Random(11)
    right = 0
    for _ in range(CASES):
        low = rng.choice((-10.0, 0.0, 4.0, 10.0, 12.0, 1000.0))
        high = low + rng.choice((0.0, 1.0, 4.0, 500.0))
        middle = f"{(low + high) / 2}"
        answer = " ".join(rng.choices((*NUMBERS, middle, f"{low}-{high}"), k=rng.randint(0, 3)))
        expected = own_infoseek(answer, low, high)
        found = infoseek_match(answer, [f"{low} - {high}"], question_type="Numerical")
        assert found == expected, (answer, low, high)
        right += expected
    assert CASES / 10 < right < CASES * 9 / 10


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("11 to 12", True),  # inside the range, though it covers less than half of it
        ("about 12.5 m", True),
        ("14", False),
        ("8 - 13", True),
        ("0 - 100", False),
        ("", False),
        (None, False),
    ],
)
def test_a_range_is_met_as_infoseek_meets_it(answer: str | None, is_right: bool) -> None:
    task = Task(id="q", question="?", images=(), answers=("10.0 - 14.0",), source="infoseek")
    task = replace(task, metadata={"metric": "infoseek", "question_type": "Numerical"})
    answers = replace(task, answers=("10 - 13.2",))
    assert official_score(answers, answer) == float(is_right)


def test_infoseeks_overall_score_is_the_harmonic_mean_of_its_splits() -> None:
    rows = [
        Scored(score=1.0, split="val_unseen_question"),
        Scored(score=0.0, split="val_unseen_question"),
        Scored(score=1.0, split="val_unseen_entity"),
        Scored(score=0.0, split="val_unseen_entity"),
        Scored(score=0.0, split="val_unseen_entity"),
        Scored(score=0.0, split="val_unseen_entity"),
    ]
    found = infoseek_final(rows)
    assert (found["unseen_question"], found["unseen_entity"]) == (0.5, 0.25)
    assert found["final"] == pytest.approx(1 / 3)  # 2 / (1 / 0.5 + 1 / 0.25)
    assert infoseek_final(rows[2:])["final"] < 1e-11


def test_simplevqas_shares_are_those_of_its_paper() -> None:
    found = attempted_scores([1, 1, 0, 0, 0], [True, True, True, True, False])
    assert found == pytest.approx(
        {"CO": 0.4, "IN": 0.4, "NA": 0.2, "CGA": 0.5, "F1": 2 * 0.4 * 0.5 / 0.9}
    )


def test_where_a_paper_asks_a_judge_no_rule_stands_in_for_it() -> None:
    task = Task(id="q", question="?", images=(), answers=("Ed",), source="livevqa/level2")
    assert metric_of(task) == "judge" and official_score(task, "Ed") is None
    assert official_score(replace(task, metadata={"metric": "token_f1"}), "Ed") == 1.0
    assert official_score(replace(task, source="fvqa"), "ed.") == 1.0
