"""The formulas of tapo_train/systems against numbers worked out by hand."""

from __future__ import annotations

import asyncio
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from rewarding import scoring
from rollout_world import SYSTEM_PROMPT, draw_toolbox, picture_task, written_trajectory
from scripted_engine import ScriptedEngine
from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

from tapo_train.algos.turn_advantages import RewardRow
from tapo_train.credit.steps import from_trajectory
from tapo_train.data.tasks import load_tasks
from tapo_train.errors import (
    ConfigError,
    DataError,
    TapoError,
    ToolArgumentError,
    ToolError,
    ToolRefusedError,
)
from tapo_train.learner.batch import TrainingRow
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import GenerationRequest, Sampling
from tapo_train.rollout.limits import Limits
from tapo_train.systems.igpo import InformationGain, accumulated
from tapo_train.systems.imagent import (
    ConfirmationTool,
    ReflectionArguments,
    ReflectionTool,
    ToolGain,
    TrajectoryMask,
    action_mask,
    several_pictures,
    tool_gain,
)
from tapo_train.systems.invented_videos import write_videos
from tapo_train.systems.playground import SearchTool
from tapo_train.systems.regions import ProposeRegionsTool, RegionArguments, best_boxes
from tapo_train.systems.vital import (
    FrameArguments,
    FrameSamplingTool,
    difficulty_aware,
    overlap,
    temporal_iou,
    video_tasks,
)
from tapo_train.systems.vsrm import StepGains, cut_into_steps, gains
from tapo_train.tools.base import ToolContext
from tapo_train.tools.crop import ZoomArguments
from tapo_train.tools.text_search import TextSearchArguments
from tapo_train.training.process import PolicyAccess, Processes, earning
from tapo_train.types import (
    Group,
    Observation,
    Outcome,
    Reward,
    Span,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
    Turn,
    VersionSpan,
)


@pytest.fixture(scope="module")
def chat(tiny_qwen3_vl: Path) -> ChatFormat:
    return ChatFormat(tiny_qwen3_vl)


def scored(trajectory: Trajectory) -> Trajectory:
    return asyncio.run(scoring()(trajectory))


def access(chat: ChatFormat, script: Callable[[GenerationRequest], str]) -> PolicyAccess:
    """A policy that writes what the script says; it has no learner."""
    nobody: Any = None
    return PolicyAccess(
        chat=chat,
        policy=nobody,
        engine=ScriptedEngine(chat, script),
        score=scoring(),
        sampling=Sampling(),
        budget_tokens=1024,
    )


def said(chat: ChatFormat, text: str) -> Trajectory:
    """One turn that says this, with its reward."""
    (group,) = collect(
        [picture_task()],
        engine=ScriptedEngine(chat, lambda request: text),
        chat=chat,
        toolbox=draw_toolbox(),
        system_prompt=SYSTEM_PROMPT,
        rollouts_per_task=1,
        limits=Limits(max_turns=4, max_turn_tokens=200, max_tokens=1000),
        sampling=Sampling(),
        score=scoring(),
    )
    return group.trajectories[0]


# VSRM


def test_a_step_earns_its_change_of_correctness_and_looks_ahead_where_nothing_changes() -> None:
    correct = [0.0, 0.0, 0.75, 0.75, 0.5]
    assert gains(correct) == [0.0, 0.0, 0.75, 0.0, -0.25]
    assert gains(correct, decay=0.5, window=1) == [0.0, 0.375, 0.75, -0.125, -0.25]
    assert gains(correct, decay=0.5, window=2) == [0.1875, 0.375, 0.75, -0.125, -0.25]
    assert sum(gains(correct)) == correct[-1]


def test_an_answer_is_tried_after_each_step_of_a_thought(chat: ChatFormat) -> None:
    text = "<think>It is Bo. So Velor. Wait, still Velor.</think><answer>Velor</answer>"
    attempt = said(chat, text)
    asked: list[str] = []

    def guess(request: GenerationRequest) -> str:
        asked.append(chat.decode(request.tokens).text.rpartition("assistant\n")[2])
        return "Velor</answer>" if "So" in asked[-1] else "Bo</answer>"

    (found,) = StepGains(weight=2.0)([attempt], access(chat, guess))
    steps = [turn.text for turn in found.turns]
    assert steps == ["<think>It is Bo. ", "So Velor. ", "Wait, still Velor.</think>" + text[-22:]]
    assert asked == [steps[0] + "</think><answer>", steps[0] + steps[1] + "</think><answer>"]
    assert found.scored().turns == (0.0, 2.0, 0.0)
    assert found.scored().total == attempt.scored().total + 2.0
    assert found.scored().parts["step_gain"] == 2.0
    np.testing.assert_array_equal(found.tokens, attempt.tokens)
    assert sum(len(turn.span) for turn in found.turns) == len(attempt.logprobs)


def test_steps_keep_a_turns_call_versions_and_reward_in_their_last(chat: ChatFormat) -> None:
    whole = scored(written_trajectory(chat))
    turn = whole.turns[0]
    length = len(turn.span)
    versions = (
        VersionSpan(start=0, end=5, version=1),
        VersionSpan(start=5, end=length, version=2),
    )
    rewards = replace(whole.scored(), turns=(0.25, 0.5, 0.0))
    aged = replace(
        whole, turns=(replace(turn, versions=versions), *whole.turns[1:]), reward=rewards
    )
    found = cut_into_steps(aged, [[turn.span.start + 3, turn.span.start + 7], [], []], chat)
    assert [t.index for t in found.turns] == [0, 1, 2, 3, 4]
    assert [len(t.calls) for t in found.turns] == [0, 0, 1, 1, 0]
    assert [t.observation_span is None for t in found.turns] == [True, True, False, False, True]
    assert found.scored().turns == (0.0, 0.0, 0.25, 0.5, 0.0)
    np.testing.assert_array_equal(found.token_versions(), aged.token_versions())
    assert "".join(t.text for t in found.turns[:3]) == turn.text


# IGPO


@dataclass
class KnownLogprobs:
    """Says of each row what it was told, for all of its tokens."""

    chat: ChatFormat
    values: Sequence[float]
    rows: list[TrainingRow] = field(default_factory=list)

    def logprobs(self, rows: Sequence[TrainingRow]) -> list[Any]:
        self.rows = list(rows)
        return [
            np.full(row.num_trained, value) for row, value in zip(rows, self.values, strict=True)
        ]


def test_a_turn_earns_the_rise_of_the_accepted_answers_log_probability(chat: ChatFormat) -> None:
    attempt = scored(written_trajectory(chat))
    known: Any = KnownLogprobs(chat, [-3.0, -1.0, -1.5])
    (found,) = InformationGain(weight=0.5)([attempt], known)
    assert found.scored().turns == (1.0, -0.25, 0.0)
    assert found.scored().total == attempt.scored().total + 0.75
    (as_probability,) = InformationGain(of="probability")([attempt], known)
    wanted = (math.exp(-1) - math.exp(-3), math.exp(-1.5) - math.exp(-1), 0.0)
    assert as_probability.scored().turns == pytest.approx(wanted)
    assert [len(row.images) for row in known.rows] == [1, 2, 3]
    for row, turn in zip(known.rows, attempt.turns, strict=True):
        (gold,) = row.spans
        assert chat.decode(row.tokens[gold.start : gold.end]).text == "Velor"
        np.testing.assert_array_equal(
            row.tokens[: turn.span.start], attempt.tokens[: turn.span.start]
        )
        rest = chat.decode(row.tokens[turn.span.start :]).text
        assert rest == "<answer>Velor</answer><|im_end|>"


def test_turn_rewards_are_normalised_over_the_group_and_then_summed() -> None:
    def row(total: float, *turns: float, left_out: bool = False) -> RewardRow:
        tokens = (1,) * len(turns)
        return RewardRow(
            group="q", total=total, tokens=tokens, turn_rewards=turns, left_out=left_out
        )

    # Rewards by turn are 1, 3 (2 of them the outcome's) and 0, 0: mean 1, deviation sqrt(2).
    rows = [row(4.0, 1.0, 1.0), row(0.0, 0.0, 0.0), row(9.0, 9.0, left_out=True)]
    first, second, out = accumulated(rows, gamma=0.5)
    unit = 1 / (math.sqrt(2) + 1e-6)
    np.testing.assert_allclose(first, [0 + 0.5 * 2 * unit, 2 * unit])
    np.testing.assert_allclose(second, [-1.5 * unit, -unit])
    assert out.tolist() == [0.0]


# The seam


def test_a_stage_that_leaves_trajectories_out_is_counted_by_its_word(chat: ChatFormat) -> None:
    attempt = scored(written_trajectory(chat))
    other = replace(attempt, id="other")

    def drops_the_first(given: Sequence[Trajectory], policy: PolicyAccess) -> list[Trajectory]:
        return [replace(given[0], unscored="too_long"), earning(given[1], (1, 0, 2), part="extra")]

    stages = Processes(stages=[drops_the_first], access=access(chat, lambda request: ""))
    group = Group(task=attempt.task, trajectories=(attempt, other))
    ((changed,), metrics) = stages([group])
    assert [t.failed_outside_policy for t in changed.trajectories] == [True, False]
    assert metrics == {
        "process/left_out": 0.5,
        "process/left_out/too_long": 0.5,
        "process/earned": 1.5,
        "process/steps": 1.5,
    }


def test_a_stage_that_loses_a_trajectory_ends_the_run(chat: ChatFormat) -> None:
    attempt = scored(written_trajectory(chat))
    stages = Processes(
        stages=[lambda given, policy: given[1:]], access=access(chat, lambda request: "")
    )
    with pytest.raises(TapoError, match=r"reward\.process: a stage gave other trajectories"):
        stages([Group(task=attempt.task, trajectories=(attempt,))])
    with pytest.raises(TapoError, match="2 rewards for 3 turns"):
        earning(attempt, (1.0, 2.0), part="extra")


# IMAgent


def attempt(
    *outcomes: Outcome, right: bool = False, stop: StopReason = StopReason.ANSWER
) -> Trajectory:
    """A turn per call that ended so, and a last one."""
    calls = [
        ToolCall(
            name="look",
            arguments={},
            valid=outcome is not Outcome.MODEL_ERROR,
            executed=True,
            observation=Observation(text="", outcome=outcome),
        )
        for outcome in outcomes
    ]
    turns = [
        Turn(index=i, span=Span(start=i + 1, end=i + 2), text="", calls=(call,))
        for i, call in enumerate(calls)
    ]
    last = Turn(index=len(turns), span=Span(start=len(turns) + 1, end=len(turns) + 2), text="")
    task = Task(id="q", question="?", images=(), answers=("a",))
    return Trajectory(
        id=f"{outcomes}{right}",
        task=task,
        tokens=np.zeros(len(turns) + 2, dtype=np.int32),
        logprobs=np.zeros(len(turns) + 1, dtype=np.float32),
        turns=(*turns, last),
        images=(),
        answer=None,
        stop=stop,
        reward=Reward(total=float(right), accuracy=float(right)),
    )


OK, WRONG = Outcome.OK, Outcome.MODEL_ERROR
NOBODY: Any = None


def test_right_attempts_with_tools_earn_what_tools_gained_in_their_group() -> None:
    group = [attempt(OK, right=True), attempt(OK), attempt(right=True), attempt(), attempt()]
    assert tool_gain(group) == pytest.approx(1 / 2 - 1 / 3)
    found = ToolGain(weight=3.0)(group, NOBODY)
    assert [t.scored().turns[-1] for t in found] == pytest.approx([0.5, 0, 0, 0, 0])
    assert found[0].scored().total == pytest.approx(1.5)
    assert tool_gain([attempt(OK, right=True), attempt(OK)]) == 0.0
    assert tool_gain([attempt(OK), attempt(WRONG, right=True)]) == 0.0


def test_turns_with_failed_calls_have_no_advantage_and_attempts_without_an_end_no_part() -> None:
    row = from_trajectory(attempt(WRONG, OK, Outcome.TOOL_ERROR), -1.5)
    assert [found.tolist() for found in action_mask([row])] == [[0.0, -1.5, -1.5, -1.5]]
    by_turn = from_trajectory(attempt(OK, WRONG), 1.0, [1.0, 2.0, 3.0])
    assert [found.tolist() for found in action_mask([by_turn])] == [[1.0, 0.0, 3.0]]
    attempts = [attempt(OK), attempt(WRONG), attempt(), attempt(OK, stop=StopReason.MAX_TURNS)]
    found = TrajectoryMask()(attempts, NOBODY)
    assert [t.unscored for t in found] == [None, "all_failed", None, "unfinished"]


def test_each_question_is_asked_among_the_pictures_of_others(small_world: Path) -> None:
    alone = load_tasks(small_world / "train.jsonl")
    tasks = several_pictures(small_world / "train.jsonl", pictures=3)
    assert len(tasks) == len(alone)
    for index, (task, single) in enumerate(zip(tasks, alone, strict=True)):
        place = index % 3
        assert len(task.images) == 3 and task.images[place] == single.images[0]
        assert task.question == f"About image {place}: {single.question}"
    with pytest.raises(DataError, match="wanted at least two"):
        several_pictures(small_world / "train.jsonl", pictures=1)


def test_a_picture_is_shown_again_whole_or_in_part(small_world: Path) -> None:
    (task, *_) = several_pictures(small_world / "train.jsonl", pictures=2)
    context = ToolContext(images=task.images, task=task)
    again = asyncio.run(ReflectionTool().run(ReflectionArguments(img_idx=1), context))
    assert again.images == (task.images[1],) and again.text == "Here is image 1 again:"
    with pytest.raises(ToolArgumentError, match="img_idx must be 0 to 1"):
        asyncio.run(ReflectionTool().run(ReflectionArguments(img_idx=2), context))
    region = ZoomArguments(bbox_2d=[0, 0, 500, 500], img_idx=1)
    (part,) = asyncio.run(ConfirmationTool(min_side_px=16).run(region, context)).images
    assert part.ref.root == task.images[1].ref.root and part.ref.box == (0.0, 0.0, 0.5, 0.5)


# VITAL


@pytest.mark.parametrize(
    ("answer", "iou"),
    [
        ("2-6", 0.75),  # 2 of 6 seconds shared with the first, 3 of 4 with the second
        ("from 3 to 6 s", 1.0),
        ("6.0 - 3.0", 1.0),
        ("7-9", 0.0),
        ("3", 0.0),
        ("", 0.0),
    ],
)
def test_an_interval_is_worth_its_overlap_with_the_best_accepted_one(
    answer: str, iou: float
) -> None:
    task = Task(id="q", question="?", images=(), answers=("0-4", "3-6"))
    met = replace(attempt(), task=task, answer=answer)
    assert temporal_iou(met) == iou
    assert overlap((1.0, 1.0), (1.0, 1.0)) == 1.0 and overlap((1.0, 1.0), (2.0, 2.0)) == 0.0


def test_hard_questions_weigh_more_and_all_of_them_as_much_as_before() -> None:
    def row(group: str, total: float, *, left_out: bool = False) -> RewardRow:
        return RewardRow(group=group, total=total, tokens=(1,), left_out=left_out)

    # Means are 1/4 and 3/4 of the best, 2: weights 1.75 and 1.25, mean 1.5.
    rows = [row("hard", 0.0), row("hard", 1.0), row("easy", 1.0), row("easy", 2.0)]
    unit = 0.5 / (math.sqrt(0.5) + 1e-6)
    found = difficulty_aware([*rows, row("easy", 9.0, left_out=True)], best=2.0)
    wanted = [-unit * 7 / 6, unit * 7 / 6, -unit * 5 / 6, unit * 5 / 6, 0.0]
    assert found == pytest.approx(wanted)


def test_frames_are_those_of_their_times_and_what_is_no_video_is_refused(tmp_path: Path) -> None:
    write_videos(tmp_path, 3, count=1)
    (task,) = video_tasks(tmp_path / "train.jsonl", frames=4, longest_px=32)
    assert [image.width for image in task.images] == [32] * 4
    start, end = map(float, task.answers[0].split("-"))
    tool = FrameSamplingTool(str(tmp_path), longest_px=32)
    context = ToolContext(images=(), task=task)

    def colour(start_s: float, end_s: float) -> tuple[int, ...]:
        arguments = FrameArguments(start_s=start_s, end_s=end_s, count=1)
        (image,) = asyncio.run(tool.run(arguments, context)).images
        with PIL.Image.open(io.BytesIO(image.data)) as picture:
            return tuple(value // 32 for value in picture.convert("RGB").getpixel((16, 16)))

    try:
        before, during = colour(0.0, start), colour(start, end)
        assert before != during and colour(end + 0.3, 99.0) == before
        with pytest.raises(ToolArgumentError, match="start_s <= end_s"):
            colour(2.0, 1.0)
        (tmp_path / "videos" / "0.mp4").write_bytes(b"\0" * 1000)
        with pytest.raises(ToolRefusedError, match="cannot be read"):
            colour(0.0, 1.0)
        outside = replace(task, metadata={"clip": "../x.mp4"})
        with pytest.raises(ToolError, match="frame_sampling_tool"):
            arguments = FrameArguments(start_s=0, end_s=1, count=1)
            asyncio.run(tool.run(arguments, ToolContext(images=(), task=outside)))
    finally:
        tool.close()


# A playground, and regions


def test_tools_of_a_playground_know_different_parts_of_a_corpus(tmp_path: Path) -> None:
    rows = [("a", "Abel", "Abel keeps wool."), ("b", "Zoe", "Zoe keeps wool.")]
    corpus = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"id": id, "title": title, "text": text}) for id, title, text in rows]
    corpus.write_text("\n".join(lines))

    def ask(titles: str) -> str:
        tool = SearchTool(name="find", description="Find.", corpus=str(corpus), titles=titles)
        assert (tool.name, tool.description) == ("find", "Find.")
        context = ToolContext(images=(), task=attempt().task)
        return asyncio.run(tool.run(TextSearchArguments(query="wool"), context)).text

    assert "Abel" in ask("^A") and "Zoe" not in ask("^A")
    assert "Abel" in ask("") and "Zoe" in ask("")
    with pytest.raises(ConfigError, match="no passage of"):
        ask("^Q")


def test_the_likeliest_boxes_of_any_class_come_first_in_thousandths() -> None:
    sure, unsure, nothing = [9.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 9.0]
    logits = torch.tensor([nothing, unsure, sure, sure])
    boxes = torch.tensor(
        [[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 0.2], [0.9, 0.9, 0.4, 0.4], [0.5, 0.5, 0.0, 0.1]]
    )
    # The last has no width; the third reaches beyond the picture.
    wanted = [[700, 700, 1000, 1000], [0, 400, 500, 600], [0, 0, 1000, 1000]]
    assert best_boxes(logits, boxes, top_k=5) == wanted
    assert best_boxes(logits, boxes, top_k=1) == wanted[:1]


def test_a_detector_of_a_folder_names_regions_that_can_be_zoomed_into(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        patch_size=16,
        num_detection_tokens=6,
        num_labels=3,
    )
    YolosForObjectDetection(config).save_pretrained(tmp_path)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    tool = ProposeRegionsTool(model=str(tmp_path), top_k=3)
    image = picture_task().images[0]
    context = ToolContext(images=(image,), task=attempt().task)
    text = asyncio.run(tool.run(RegionArguments(img_idx=0), context)).text
    lines = text.splitlines()
    assert lines[0] == "Regions, the most likely first:" and 1 <= len(lines) - 1 <= 3
    for line in lines[1:]:
        ZoomArguments(bbox_2d=json.loads(line.partition(". ")[2]))
    with pytest.raises(ToolArgumentError, match="no pictures"):
        asyncio.run(tool.run(RegionArguments(img_idx=0), ToolContext(images=(), task=context.task)))
