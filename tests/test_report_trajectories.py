"""Metrics and dumps of trajectories, on miniatures written by hand."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import pytest
from PIL import Image as Pillow

from tapo_train.data.images import read_image
from tapo_train.report.catalogue import require_known
from tapo_train.report.trajectory_metrics import combine, trajectory_sums
from tapo_train.types import (
    Group,
    Image,
    Observation,
    Outcome,
    Reward,
    Span,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
    Turn,
)


def picture(colour: str, format: str = "PNG") -> Image:
    stream = io.BytesIO()
    Pillow.new("RGB", (8, 6), colour).save(stream, format)
    return read_image(stream.getvalue(), where="")


SCENE, CROP = picture("red"), picture("blue", "JPEG")
TASK = Task(id="q1", question="Who?", images=(SCENE,), answers=("Eve",), source="world")


def searching(id: str = "t1", *, accuracy: float = 1.0, form: float = 1.0) -> Trajectory:
    """Prompt [0, 4), a zooming turn [4, 7), its observation [7, 10), an answer [10, 12)."""
    zoom = ToolCall(
        name="image_zoom_in_tool",
        arguments={"bbox_2d": [0, 0, 500, 500]},
        valid=True,
        executed=True,
        span=Span(start=5, end=7),
        observation=Observation(text="zoomed", images=(CROP,), latency_s=0.25),
    )
    unknown = ToolCall(name="made/up", arguments=None, valid=False, executed=False)
    return Trajectory(
        id=id,
        task=TASK,
        tokens=np.arange(12, dtype=np.int32),
        logprobs=np.array([-0.1, -0.2, -np.inf, -0.4, -0.5], dtype=np.float32),
        turns=(
            Turn(
                index=0,
                span=Span(start=4, end=7),
                text="zoom",
                calls=(zoom, unknown),
                observation_span=Span(start=7, end=10),
                num_images_before=1,
            ),
            Turn(index=1, span=Span(start=10, end=12), text="Eve", num_images_before=2),
        ),
        images=(SCENE, CROP),
        answer="Eve",
        stop=StopReason.ANSWER,
        policy_version=5,
        reward=Reward(
            total=accuracy + 0.5 * form,
            accuracy=accuracy,
            parts={"accuracy": accuracy, "format": form},
        ),
    )


def silent(id: str, *, stop: StopReason = StopReason.MAX_TOKENS) -> Trajectory:
    """One turn of a single token, no call, no reward earned."""
    return dataclasses.replace(
        searching(id, accuracy=0.0, form=0.0),
        tokens=np.arange(5, dtype=np.int32),
        logprobs=np.zeros(1, dtype=np.float32),
        turns=(Turn(index=0, span=Span(start=4, end=5), text="?", num_images_before=1),),
        images=(SCENE,),
        answer=None,
        stop=stop,
    )


def group(*trajectories: Trajectory) -> Group:
    return Group(task=TASK, trajectories=trajectories)


def test_metrics_of_a_batch_are_those_counted_by_hand() -> None:
    lost = silent("t3", stop=StopReason.INFRA)
    metrics = combine([trajectory_sums([group(searching(), silent("t2"), lost)])])
    require_known(metrics)
    expected = {
        "rollout/trajectories": 3,
        "rollout/failed_outside_policy": 1 / 3,
        "reward/mean": 0.75,
        "reward/std": 0.75,
        "reward/accuracy": 0.5,
        "reward/format": 0.5,
        "rollout/turns": 4 / 3,
        "rollout/tokens": 22 / 3,
        "rollout/trained_tokens": 7 / 3,
        "rollout/calls": 2 / 3,
        "rollout/call_rate": 1 / 3,
        "rollout/tool_latency_s": 0.25,
        "rollout/calls/image_zoom_in_tool": 1 / 3,
        "rollout/outcome/ok": 0.5,
        "rollout/outcome/model_error": 0.5,
        "rollout/stop/answer": 1 / 3,
        "rollout/stop/max_tokens": 1 / 3,
        "rollout/stop/infra": 1 / 3,
    }
    assert {name: value for name, value in metrics.items() if value} == pytest.approx(expected)
    zero = {name for name, value in metrics.items() if not value}
    assert zero == {
        "rollout/stop/max_turns",
        *(f"rollout/outcome/{o}" for o in Outcome if o not in ("ok", "model_error")),
    }


def test_metrics_do_not_depend_on_how_groups_lie_on_ranks() -> None:
    first, second = group(searching(), searching("t2", accuracy=0.0)), group(silent("t3"))
    whole = combine([trajectory_sums([first, second])])
    assert combine([trajectory_sums([first]), trajectory_sums([second])]) == pytest.approx(whole)
    assert combine([trajectory_sums([first, second]), trajectory_sums([])]) == pytest.approx(whole)


def test_a_batch_that_failed_outside_the_policy_has_no_reward() -> None:
    lost = silent("t1", stop=StopReason.INFRA)
    metrics = combine([trajectory_sums([group(lost)])])
    assert not [name for name in metrics if name.startswith("reward/")]
    assert math.isclose(metrics["rollout/failed_outside_policy"], 1.0)
    beside = combine([trajectory_sums([group(lost)]), trajectory_sums([group(searching())])])
    assert (beside["reward/mean"], beside["reward/format"]) == (1.5, 1.0)
