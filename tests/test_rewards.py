from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewarding import reward_of

from tapo_train.rewards.matching import exact_match, normalise
from tapo_train.types import (
    Observation,
    Outcome,
    Span,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
    Turn,
)

TASK = Task(id="q", question="Who?", images=(), answers=("Gustave Eiffel", "G. Eiffel"))


def call(*, valid: bool = True, outcome: Outcome | None = Outcome.OK) -> ToolCall:
    observation = None if outcome is None else Observation(text="seen", outcome=outcome)
    return ToolCall(
        name="text_search_tool",
        arguments={"query": "tower"},
        valid=valid,
        executed=valid,
        observation=observation,
    )


def trajectory(
    last: str, *, calls: tuple[ToolCall, ...] = (), last_calls: tuple[ToolCall, ...] = ()
) -> Trajectory:
    """A searching turn with `calls`, then a turn that reads `last`."""
    turns = (
        Turn(index=0, span=Span(start=2, end=4), text="<tool_call>…</tool_call>", calls=calls),
        Turn(index=1, span=Span(start=6, end=8), text=last, calls=last_calls),
    )
    answer = last.partition("<answer>")[2].partition("</answer>")[0] or None
    return Trajectory(
        id="t",
        task=TASK,
        tokens=np.zeros(8, dtype=np.int32),
        logprobs=np.zeros(4, dtype=np.float32),
        turns=turns,
        images=(),
        answer=answer,
        stop=StopReason.ANSWER,
    )


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The Eiffel Tower", "eiffel tower"),
        ("  an   Apple, a day!  ", "apple day"),
        ("Anthem of the Seas", "anthem of seas"),
        ("O'Neill-Smith (Jr.)", "oneillsmith jr"),
        ("\u201cquoted\u201d \u2014dash", "quoted dash"),
        ("2\uff1025", "2025"),
        ("\ufb01ne Café", "fine café"),
        ("Cafe\u0301", "café"),
        ("US$ 5 + 3", "us 5 3"),
        ("A", "a"),
        ("The  A", "the a"),
        ("...", "..."),
        ("🇪🇸", "🇪🇸"),
        (" \n\t", ""),
        ("tab\tand\nline", "tab and line"),
    ],
)
def test_normal_form_of_an_answer_is_the_one_written_here(text: str, form: str) -> None:
    assert normalise(text) == form


@given(st.text(alphabet=st.characters(codec="ascii"), max_size=30))
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_any_accepted_answer_matches_and_a_part_of_one_does_not() -> None:
    assert exact_match("the g eiffel.", TASK.answers)
    assert exact_match("GUSTAVE  EIFFEL", TASK.answers)
    assert not exact_match("Eiffel", TASK.answers)


def test_missing_and_blank_answers_never_match() -> None:
    assert not exact_match(None, ["", "none"])
    assert not exact_match("  ", ["", " "])


def test_answers_of_articles_and_punctuation_alone_stay_different() -> None:
    assert exact_match("a", ["A"])
    assert not exact_match("the", ["A"])
    assert not exact_match("!", ["?"])


def test_correct_and_well_formed_gives_both_weights() -> None:
    met = trajectory("<think>x</think><answer>Gustave Eiffel</answer>", calls=(call(),))
    reward = reward_of(met, accuracy=0.9, form=0.1)
    assert reward.total == pytest.approx(1.0)
    assert reward.accuracy == 1.0
    assert reward.parts == {"accuracy": 1.0, "format": 1.0}


def test_wrong_but_well_formed_gives_the_format_weight_alone() -> None:
    reward = reward_of(trajectory("<answer>Eve</answer>", calls=(call(),)))
    assert (reward.total, reward.accuracy, reward.parts["format"]) == (0.5, 0.0, 1.0)


def test_right_answer_after_an_illegal_call_loses_only_the_format_part() -> None:
    reward = reward_of(
        trajectory("<answer>G. Eiffel</answer>", calls=(call(), call(valid=False, outcome=None)))
    )
    assert (reward.total, reward.parts["format"]) == (1.0, 0.0)


def test_a_valid_call_that_ended_as_model_error_breaks_the_form() -> None:
    scored = reward_of(trajectory("<answer>x</answer>", calls=(call(outcome=Outcome.MODEL_ERROR),)))
    assert scored.parts["format"] == 0.0


@pytest.mark.parametrize(
    "outcome", [Outcome.TOOL_ERROR, Outcome.TIMEOUT, Outcome.INFRA_ERROR, Outcome.REFUSED]
)
def test_failures_on_the_side_of_the_tool_do_not_break_the_form(outcome: Outcome) -> None:
    scored = reward_of(trajectory("<answer>x</answer>", calls=(call(outcome=outcome),)))
    assert scored.parts["format"] == 1.0


@pytest.mark.parametrize(
    "last",
    [
        "no tags at all",
        "<answer>   </answer>",
        "<answer></answer>",
        "<answer>cut off",
        "<answer>one</answer> or <answer>two</answer>",
        "<answer><answer>one</answer>",
        "<answer>one</answer></answer>",
        "</answer>one<answer>",
    ],
)
def test_a_last_turn_without_exactly_one_filled_answer_has_no_form(last: str) -> None:
    assert reward_of(trajectory(last)).parts["format"] == 0.0


def test_an_answer_over_several_lines_has_form() -> None:
    assert reward_of(trajectory("<answer>\nG. Eiffel\n</answer>")).total == 1.5


@pytest.mark.parametrize(
    ("last", "form"),
    [
        ("<think>it goes into <answer></think><answer>x</answer>", 1.0),
        ("<think><answer>y</answer> or not</think><answer>x</answer>", 1.0),
        ("<think>it is <answer>x</answer></think>", 0.0),
        ("<think>it is <answer>x</answer>", 0.0),
        ("<answer>x</answer><think>y</think><answer>z</answer>", 0.0),
    ],
)
def test_an_answer_that_a_thought_mentions_is_none_and_breaks_no_form(
    last: str, form: float
) -> None:
    assert reward_of(trajectory(last)).parts["format"] == form


def test_an_answer_beside_a_tool_call_in_the_last_turn_has_no_form() -> None:
    scored = reward_of(trajectory("<answer>x</answer>", last_calls=(call(),)))
    assert scored.parts["format"] == 0.0


def test_a_trajectory_without_a_turn_gets_nothing() -> None:
    empty = dataclasses.replace(trajectory("<answer>G. Eiffel</answer>"), turns=(), answer=None)
    assert reward_of(empty).total == 0.0
