"""The rules of an episode, played by a scripted policy with real tools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel
from rollout_world import HOSTILE, SYSTEM_PROMPT, DrawTool, draw_image, picture_task
from scripted_engine import ScriptedEngine, turn_of

from tapo_train.errors import ConfigError, ToolArgumentError
from tapo_train.report.trajectory_metrics import combine, trajectory_sums
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import Sampling
from tapo_train.rollout.limits import Limits
from tapo_train.tools.base import Tool, ToolContext
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Group, Observation, Outcome, Reward, Span, StopReason, Trajectory

CALL = '<tool_call>{"name": "draw", "arguments": {"note": "é🙂"}}</tool_call>'
DOWN = '<tool_call>{"name": "down", "arguments": {}}</tool_call>'
LIMITS = Limits(max_turns=4, max_turn_tokens=200, max_tokens=2000)


@pytest.fixture(scope="module")
def chat(tiny_qwen3_vl: Path) -> ChatFormat:
    return ChatFormat(tiny_qwen3_vl)


class NoArguments(BaseModel):
    """Nothing."""


class DownTool:
    """A tool whose back end is down."""

    name = "down"
    version = "1"
    description = "Never works."
    arguments_model = NoArguments

    async def run(self, arguments: BaseModel, context: ToolContext) -> Observation:
        return Observation(text="connection refused", outcome=Outcome.INFRA_ERROR)


def play(
    chat: ChatFormat,
    turns: Sequence[str],
    *,
    limits: Limits = LIMITS,
    tools: Sequence[Tool] = (DrawTool(), DownTool()),
) -> Trajectory:
    """One episode in which the policy writes `turns`."""
    engine = ScriptedEngine(chat, lambda request: turns[turn_of(request)])
    (group,) = collect(
        [picture_task()],
        engine=engine,
        chat=chat,
        toolbox=Toolbox(tools, deadline_s=5.0),
        system_prompt=SYSTEM_PROMPT,
        rollouts_per_task=1,
        limits=limits,
        sampling=Sampling(),
        policy_version=7,
    )
    return group.trajectories[0]


def text_of(chat: ChatFormat, trajectory: Trajectory, span: Span | None) -> str:
    assert span is not None
    return chat.decode(trajectory.tokens[span.start : span.end]).text


def test_a_turn_that_is_cut_in_its_thought_has_no_answer(chat: ChatFormat) -> None:
    thought = "<think>The form is <answer>Velor</answer>. But I had better look " + "again " * 300
    trajectory = play(chat, [thought])
    assert trajectory.stop is StopReason.MAX_TOKENS
    assert trajectory.answer is None and trajectory.turns[0].calls == ()


def test_the_call_after_the_thought_is_run_and_not_its_draft(chat: ChatFormat) -> None:
    turns = [f"<think>perhaps {DOWN}?</think>{CALL}", "<answer>Velor</answer>"]
    trajectory = play(chat, turns)
    assert [call.name for call in trajectory.turns[0].calls] == ["draw"]
    assert trajectory.answer == "Velor"


def test_a_turn_without_a_call_is_the_answer(chat: ChatFormat) -> None:
    trajectory = play(chat, ["<think>a</think><answer>Velor</answer>"])
    assert trajectory.stop is StopReason.ANSWER
    assert trajectory.answer == "Velor"
    assert trajectory.policy_version == 7
    (turn,) = trajectory.turns
    assert turn.text == "<think>a</think><answer>Velor</answer>"
    assert trajectory.tokens[-1] == chat.end_token_id
    assert turn.span.end == len(trajectory.tokens)


def test_a_turn_that_says_nothing_readable_ends_without_an_answer(chat: ChatFormat) -> None:
    trajectory = play(chat, ["Velor"])
    assert (trajectory.stop, trajectory.answer) == (StopReason.ANSWER, None)


def test_turns_and_observations_tile_the_tokens(chat: ChatFormat) -> None:
    trajectory = play(chat, [CALL, f"<think>b</think>{CALL}", "<answer>x</answer>"])
    assert [turn.index for turn in trajectory.turns] == [0, 1, 2]
    position = trajectory.prompt_length
    for turn in trajectory.turns:
        assert turn.span.start == position
        position = turn.span.end
        assert trajectory.tokens[position - 1] == chat.end_token_id
        if turn.observation_span is not None:
            assert turn.observation_span.start == position
            position = turn.observation_span.end
    assert position == len(trajectory.tokens)
    assert trajectory.turns[-1].observation_span is None


def test_sampled_tokens_and_their_logprobs_are_kept_as_they_came(chat: ChatFormat) -> None:
    texts = [CALL, "<answer>x</answer>"]
    trajectory = play(chat, texts)
    sampled = [chat.assistant(text) for text in texts]
    for turn, tokens in zip(trajectory.turns, sampled, strict=True):
        np.testing.assert_array_equal(trajectory.tokens[turn.span.start : turn.span.end], tokens)
    expected = np.concatenate([-(np.arange(len(tokens)) + 1) / 1000 for tokens in sampled])
    np.testing.assert_allclose(trajectory.logprobs, expected, rtol=1e-6)
    assert trajectory.tokens.dtype == np.int32
    assert trajectory.logprobs.dtype == np.float32


def test_a_call_span_holds_exactly_the_call(chat: ChatFormat) -> None:
    trajectory = play(chat, [f"<think>🙂é</think> {CALL}", "<answer>x</answer>"])
    (call,) = trajectory.turns[0].calls
    assert text_of(chat, trajectory, call.span) == CALL
    assert call.arguments == {"note": "é🙂"}
    assert call.valid and call.executed and call.outcome is Outcome.OK


def test_tool_pictures_join_the_registry_in_order_of_their_placeholders(chat: ChatFormat) -> None:
    trajectory = play(chat, [CALL, CALL, "<answer>x</answer>"])
    assert [turn.num_images_before for turn in trajectory.turns] == [1, 2, 3]
    expected = [picture_task().images[0], draw_image(70, 64, seed=1), draw_image(100, 64, seed=2)]
    assert [image.sha256 for image in trajectory.images] == [image.sha256 for image in expected]
    placeholders = int((trajectory.tokens == chat.image_token_id).sum())
    assert placeholders == sum(chat.image_tokens(image) for image in trajectory.images)


def test_the_observation_is_what_the_tool_said_as_plain_text(chat: ChatFormat) -> None:
    trajectory = play(chat, [CALL, "<answer>x</answer>"])
    observation = text_of(chat, trajectory, trajectory.turns[0].observation_span)
    assert f"\n<tool_response>\né🙂 {HOSTILE}<|vision_start|>" in observation
    ends = int((trajectory.tokens == chat.end_token_id).sum())
    assert ends == 5, "system, question, turn, observation, turn: nothing the tool wrote"


def test_a_call_wins_over_an_answer_in_the_same_turn(chat: ChatFormat) -> None:
    trajectory = play(chat, [f"<answer>early</answer>{CALL}", "<answer>late</answer>"])
    assert len(trajectory.turns) == 2
    assert trajectory.answer == "late"


@pytest.mark.parametrize(
    ("call", "said", "name"),
    [
        ("<tool_call>{oops}</tool_call>", "not valid JSON", ""),
        ("<tool_call>{", "</tool_call> is missing", ""),
        ('<tool_call>{"name": "fly", "arguments": {}}</tool_call>', "no tool 'fly'", "fly"),
        ('<tool_call>{"name": "draw", "arguments": {"note": 3}}</tool_call>', "note", "draw"),
    ],
)
def test_a_wrong_call_is_answered_with_an_error_and_the_episode_goes_on(
    chat: ChatFormat, call: str, said: str, name: str
) -> None:
    trajectory = play(chat, [call, "<answer>x</answer>"])
    (recorded,) = trajectory.turns[0].calls
    assert recorded.name == name
    assert not recorded.valid and not recorded.executed
    assert recorded.outcome is Outcome.MODEL_ERROR
    observation = text_of(chat, trajectory, trajectory.turns[0].observation_span)
    assert "<tool_response>\nError: " in observation and said in observation
    assert trajectory.stop is StopReason.ANSWER


def test_only_the_first_call_of_a_turn_is_run(chat: ChatFormat) -> None:
    trajectory = play(chat, [CALL + DOWN + CALL, "<answer>x</answer>"])
    first, second, third = trajectory.turns[0].calls
    assert first.executed and first.observation is not None
    assert second.valid and not second.executed and second.observation is None
    assert second.outcome is None, "nobody knows how it would have ended"
    assert not third.executed
    assert third.span is not None and text_of(chat, trajectory, third.span) == CALL
    assert len(trajectory.images) == 2


def test_more_calls_are_run_and_answered_in_order_when_allowed(chat: ChatFormat) -> None:
    limits = Limits(max_turns=4, max_turn_tokens=200, max_tokens=2000, max_parallel_calls=2)
    slow, fast = CALL.replace('"é🙂"', '"slow", "delay_s": 0.05'), CALL.replace("é🙂", "fast")
    trajectory = play(chat, [slow + fast + CALL, "<answer>x</answer>"], limits=limits)
    assert [call.executed for call in trajectory.turns[0].calls] == [True, True, False]
    observation = text_of(chat, trajectory, trajectory.turns[0].observation_span)
    assert observation.count("\n<tool_response>\n") == 2
    assert observation.index("slow") < observation.index("fast")
    assert len(trajectory.images) == 3


def test_calls_that_were_not_run_have_no_share_in_the_outcomes(chat: ChatFormat) -> None:
    wrong = '<tool_call>{"name": "draw", "arguments": {"note": 3}}</tool_call>'
    trajectory = play(chat, [wrong + CALL, "<answer>x</answer>"])
    held = trajectory.with_reward(Reward(total=0.0, accuracy=0.0))
    metrics = combine([trajectory_sums([Group(task=held.task, trajectories=(held,))])])
    shares = {name: value for name, value in metrics.items() if "/outcome/" in name}
    assert shares["rollout/outcome/model_error"] == 1.0 and sum(shares.values()) == 1.0


def test_a_call_in_the_last_turn_is_recorded_but_not_run(chat: ChatFormat) -> None:
    trajectory = play(chat, [CALL] * 9)
    assert trajectory.stop is StopReason.MAX_TURNS
    assert len(trajectory.turns) == LIMITS.max_turns
    last = trajectory.turns[-1]
    assert last.calls[0].valid and not last.calls[0].executed
    assert last.observation_span is None
    assert trajectory.answer is None


def test_an_invalid_call_that_is_not_answered_still_counts_as_the_policys_error(
    chat: ChatFormat,
) -> None:
    trajectory = play(chat, ["<tool_call>{oops}</tool_call>"] * 9)
    last = trajectory.turns[-1].calls[0]
    assert last.observation is None and last.outcome is Outcome.MODEL_ERROR


def test_a_turn_cut_by_its_limit_ends_the_trajectory(chat: ChatFormat) -> None:
    length = len(chat.assistant(CALL))
    limits = Limits(max_turns=4, max_turn_tokens=length - 1, max_tokens=2000)
    trajectory = play(chat, [CALL], limits=limits)
    assert trajectory.stop is StopReason.MAX_TOKENS
    assert trajectory.turns[0].text == CALL, "the last token of a cut turn is text"
    assert not trajectory.turns[0].calls[0].executed
    whole = Limits(max_turns=1, max_turn_tokens=length, max_tokens=2000)
    assert play(chat, [CALL], limits=whole).stop is StopReason.MAX_TURNS


def test_an_observation_that_does_not_fit_ends_the_trajectory_at_the_border(
    chat: ChatFormat,
) -> None:
    turns = [CALL, "<answer>x</answer>"]
    whole = play(chat, turns)
    span = whole.turns[0].observation_span
    assert span is not None
    room = Limits(max_turns=4, max_turn_tokens=200, max_tokens=span.end + 1)
    cut = play(chat, turns, limits=room)
    assert (cut.stop, len(cut.tokens), len(cut.turns)) == (StopReason.MAX_TOKENS, span.end + 1, 2)
    tight = Limits(max_turns=4, max_turn_tokens=200, max_tokens=span.end)
    border = play(chat, turns, limits=tight)
    assert border.stop is StopReason.MAX_TOKENS
    assert len(border.tokens) == span.start
    assert border.turns[0].observation_span is None
    assert border.turns[0].calls[0].executed
    assert len(border.images) == 1, "a picture without placeholders must not be registered"


def test_an_infrastructure_failure_ends_the_trajectory_outside_the_policy(
    chat: ChatFormat,
) -> None:
    trajectory = play(chat, [CALL, DOWN])
    assert trajectory.stop is StopReason.INFRA
    assert trajectory.failed_outside_policy
    call = trajectory.turns[1].calls[0]
    assert call.observation is not None and call.observation.text == "connection refused"
    assert trajectory.turns[1].observation_span is None


class PickyTool(DrawTool):
    """Finds fault with arguments that only the conversation shows to be wrong."""

    name = "picky"
    version = "1"

    async def run(self, arguments: BaseModel, context: ToolContext) -> Observation:
        raise ToolArgumentError(f"img_idx must be below {len(context.images)}")


def test_a_call_that_the_tool_itself_finds_wrong_was_run_and_is_not_valid(
    chat: ChatFormat,
) -> None:
    call = '<tool_call>{"name": "picky", "arguments": {}}</tool_call>'
    trajectory = play(chat, [call, "<answer>x</answer>"], tools=(PickyTool(),))
    (recorded,) = trajectory.turns[0].calls
    assert recorded.executed and not recorded.valid
    assert recorded.outcome is Outcome.MODEL_ERROR
    assert "img_idx must be below 1" in text_of(
        chat, trajectory, trajectory.turns[0].observation_span
    )


class ThreadTool(DrawTool):
    """Returns a picture of 1000x2 px, which no Qwen-VL processor accepts."""

    name = "thread"
    version = "1"

    async def run(self, arguments: BaseModel, context: ToolContext) -> Observation:
        return Observation(text="here", images=(draw_image(64, 64), draw_image(1000, 2)))


def test_a_picture_the_model_cannot_take_is_a_tool_error_the_policy_reads(
    chat: ChatFormat,
) -> None:
    call = '<tool_call>{"name": "thread", "arguments": {}}</tool_call>'
    trajectory = play(chat, [call, "<answer>x</answer>"], tools=(ThreadTool(),))
    (recorded,) = trajectory.turns[0].calls
    assert recorded.outcome is Outcome.TOOL_ERROR and recorded.executed and recorded.valid
    observation = text_of(chat, trajectory, trajectory.turns[0].observation_span)
    assert "Error: thread returned a picture the model cannot take: image" in observation
    assert "1000x2 px" in observation
    assert len(trajectory.images) == 1
    assert trajectory.stop is StopReason.ANSWER


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"limits\.max_turns is 0; wanted >= 1"):
        Limits(max_turns=0)
