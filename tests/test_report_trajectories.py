"""Metrics and dumps of trajectories, on miniatures written by hand."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from tapo_train.algos.losses import LossOutput
from tapo_train.credit import CreditResult, NoTransfer, Tapo, TapoOptions, from_trajectory
from tapo_train.credit.rollout_file import read_rollouts
from tapo_train.data.images import read_image
from tapo_train.errors import DataError, TapoError
from tapo_train.learner.batch import TrainingRow, join
from tapo_train.report.catalogue import require_known
from tapo_train.report.dumps import TrajectoryDump, write_trajectories
from tapo_train.report.token_view import expanded_tokens, shortened_tokens, token_view
from tapo_train.report.trajectory_metrics import MOST_SOURCES, combine, trajectory_sums
from tapo_train.types import (
    Group,
    Image,
    ImageRef,
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


def test_entropy_is_estimated_by_what_was_sampled() -> None:
    metrics = combine(
        [trajectory_sums([group(searching())]), trajectory_sums([group(silent("b"))])]
    )
    assert metrics["rollout/entropy"] == pytest.approx((0.1 + 0.2 + 0.4 + 0.5) / 5)


def of_source(source: str, accuracy: float) -> Trajectory:
    drawn = searching(f"{source} {accuracy}", accuracy=accuracy)
    return dataclasses.replace(drawn, task=dataclasses.replace(TASK, source=source))


def test_several_data_sets_have_an_accuracy_each_over_all_ranks() -> None:
    first = [group(of_source("mmsearch_r1/fvqa", 1.0), of_source("towers", 0.0))]
    second = [group(of_source("mmsearch_r1/fvqa", 0.0), of_source("", 1.0))]
    metrics = combine([trajectory_sums(first), trajectory_sums(second)])
    require_known(metrics)
    found = {name: value for name, value in metrics.items() if name.startswith("reward/accuracy/")}
    assert found == {
        "reward/accuracy/mmsearch_r1_fvqa": 0.5,
        "reward/accuracy/towers": 0.0,
        "reward/accuracy/unnamed": 1.0,
    }
    alone = combine([trajectory_sums([group(of_source("towers", 1.0))])])
    assert not [name for name in alone if name.startswith("reward/accuracy/")]


def test_only_the_largest_of_very_many_data_sets_have_metrics_of_their_own() -> None:
    many = [of_source(f"page {number}", 1.0) for number in range(100)]
    twice = [of_source("page 77", 0.0)] * 2
    metrics = combine([trajectory_sums([group(*many, *twice)])])
    found = [name for name in metrics if name.startswith("reward/accuracy/")]
    assert len(found) == MOST_SOURCES == 20
    assert metrics["reward/accuracy/page_77"] == pytest.approx(1 / 3)
    alike = combine([trajectory_sums([group(of_source("a b", 1.0), of_source("a_b", 0.0))])])
    assert (alike["reward/accuracy/a_b.0"], alike["reward/accuracy/a_b.1"]) == (1.0, 0.0)


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
        "rollout/entropy": 1.2 / 6,
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
        "advantage/uniform_groups",
        "rollout/repeated_calls",
        "rollout/stop/max_turns",
        "rollout/stop/deadline",
        "rollout/surplus",
        "rollout/lost",
        "rollout/unscored",
        *(f"rollout/outcome/{o}" for o in Outcome if o not in ("ok", "model_error")),
    }


def test_attempts_that_failed_and_were_replaced_are_counted_beside_those_that_were_kept() -> None:
    lost = silent("t3", stop=StopReason.INFRA)
    spared = dataclasses.replace(group(searching(), silent("t2")), surplus=3, lost=(lost,))
    metrics = combine([trajectory_sums([spared, group(searching(), silent("t2"))])])
    require_known(metrics)
    assert (metrics["rollout/surplus"], metrics["rollout/lost"]) == (3 / 4, 1 / 4)
    assert metrics["rollout/trajectories"] == 4 and not metrics["rollout/failed_outside_policy"]


def test_metrics_do_not_depend_on_how_groups_lie_on_ranks() -> None:
    first, second = group(searching(), searching("t2", accuracy=0.0)), group(silent("t3"))
    whole = combine([trajectory_sums([first, second])])
    assert combine([trajectory_sums([first]), trajectory_sums([second])]) == pytest.approx(whole)
    assert combine([trajectory_sums([first, second]), trajectory_sums([])]) == pytest.approx(whole)


def test_groups_that_all_earned_the_same_are_uniform_and_lone_survivors_are_not_counted() -> None:
    lost = silent("t3", stop=StopReason.INFRA)
    apart = group(searching(), searching("t2", accuracy=0.0))
    alike = group(searching(), searching("t2"), lost)
    alone = group(searching(), lost)
    metrics = combine([trajectory_sums([apart, alike, alone])])
    assert metrics["advantage/uniform_groups"] == 1 / 2
    assert "advantage/uniform_groups" not in combine([trajectory_sums([alone])])


def test_calls_that_were_asked_before_in_the_trajectory_are_repeats() -> None:
    made = searching()
    (zoom, unknown) = made.turns[0].calls
    other_order = dataclasses.replace(zoom, arguments={"b": 1, "a": 2})
    same = dataclasses.replace(zoom, arguments={"a": 2, "b": 1})
    renamed = dataclasses.replace(zoom, name="other")
    calls = (zoom, other_order, same, renamed, unknown, unknown, zoom)
    turns = (dataclasses.replace(made.turns[0], calls=calls), *made.turns[1:])
    looping = dataclasses.replace(made, turns=turns)
    # Five readable calls of the one, one of the other; two of them were asked before.
    metrics = combine([trajectory_sums([group(looping, searching("t2"))])])
    assert metrics["rollout/repeated_calls"] == 2 / 6


def test_a_batch_that_failed_outside_the_policy_has_no_reward() -> None:
    lost = silent("t1", stop=StopReason.INFRA)
    metrics = combine([trajectory_sums([group(lost)])])
    assert not [name for name in metrics if name.startswith("reward/")]
    assert math.isclose(metrics["rollout/failed_outside_policy"], 1.0)
    beside = combine([trajectory_sums([group(lost)]), trajectory_sums([group(searching())])])
    assert (beside["reward/mean"], beside["reward/format"]) == (1.5, 1.0)


def assigned(
    trajectories: Sequence[Trajectory], advantages: Sequence[float], *, tapo: bool = True
) -> CreditResult:
    rows = [from_trajectory(t, a) for t, a in zip(trajectories, advantages, strict=True)]
    return (Tapo(TapoOptions()) if tapo else NoTransfer())(rows)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_of_the_credit_stage_are_in_the_catalogue() -> None:
    held = (searching(), searching("t2", accuracy=0.0))
    metrics = assigned(held, (1.0, -1.0)).metrics
    assert metrics["tapo/n_fail_steps_corrected"] == 1
    require_known(metrics)


def test_a_dump_shows_each_turn_before_and_after_credit(tmp_path: Path) -> None:
    held, advantages = (searching(), searching("t2", accuracy=0.0)), (1.0, -1.0)
    TrajectoryDump(tmp_path).write(12, held, advantages, assigned(held, advantages))
    good, bad = lines(tmp_path / "tokens" / "step_000012.jsonl")
    assert (good["id"], good["advantage"]) == ("t1", 1.0)
    assert [turn["advantage"] for turn in good["turns"]] == [1.0, 1.0]
    assert bad["advantage"] == -1.0
    # An equal call of a success with advantage 1, fully supported: -1 + 0.8 · 1.
    assert [turn["advantage"] for turn in bad["turns"]] == pytest.approx([-0.2, -1.0])
    assert bad["turns"][0]["credit"]["matched"] is True
    assert bad["turns"][1]["credit"] is None


def test_a_view_holds_tokens_spans_logprobs_calls_and_pictures(tmp_path: Path) -> None:
    held = (searching(),)
    dump = TrajectoryDump(tmp_path, decode=lambda tokens: f"{len(tokens)} tokens")
    dump.write(0, held, (0.5,), assigned(held, (0.5,), tapo=False))
    (view,) = lines(tmp_path / "tokens" / "step_000000.jsonl")
    assert view["tokens"] == list(range(12))
    assert view["logprobs"] == [-0.1, -0.2, None, -0.4, -0.5]
    assert (view["prompt_length"], view["policy_version"]) == (4, 5)
    assert (view["question"], view["accepted"], view["answer"]) == ("Who?", ["Eve"], "Eve")
    assert (view["stop"], view["text"]) == ("answer", "12 tokens")
    assert view["reward"] == {
        "total": 1.5,
        "accuracy": 1.0,
        "parts": {"accuracy": 1.0, "format": 1.0},
        "turns": [],
    }
    first, last = view["turns"]
    assert (first["span"], first["observation_span"]) == ([4, 7], [7, 10])
    assert (last["span"], last["observation_span"], last["calls"]) == ([10, 12], None, [])
    zoom, unknown = first["calls"]
    assert zoom == {
        "name": "image_zoom_in_tool",
        "arguments": {"bbox_2d": [0, 0, 500, 500]},
        "valid": True,
        "executed": True,
        "outcome": "ok",
        "span": [5, 7],
        "observation": "zoomed",
        "observation_images": [CROP.sha256],
        "latency_s": 0.25,
    }
    assert (unknown["outcome"], unknown["observation"], unknown["span"]) == (
        "model_error",
        None,
        None,
    )
    assert [image["file"] for image in view["images"]] == [
        f"{SCENE.sha256}.png",
        f"{CROP.sha256}.jpg",
    ]
    assert view["images"][0]["root"] == f"sha256:{SCENE.sha256}"


def test_the_analyser_reads_a_dump_and_assigns_the_same_credit(tmp_path: Path) -> None:
    held = (searching(), searching("t2", accuracy=0.0), silent("t3", stop=StopReason.INFRA))
    advantages = (1.0, -1.0, 0.0)
    credit = assigned(held, advantages)
    TrajectoryDump(tmp_path).write(7, held, advantages, credit)
    rows = read_rollouts(tmp_path / "rollouts" / "step_000007.jsonl").rows
    assert [(row.id, row.group, row.correct, row.advantage) for row in rows] == [
        ("t1", "q1", 1.0, 1.0),
        ("t2", "q1", 0.0, -1.0),
    ]
    assert rows[0].images == (SCENE.ref, CROP.ref)
    assert (rows[0].num_input_images, rows[0].image_sizes) == (1, ((8, 6), (8, 6)))
    (step,) = rows[0].steps
    assert [(c.name, c.valid, c.executed, c.status) for c in step.calls] == [
        ("image_zoom_in_tool", True, True, "ok"),
        ("made/up", False, False, "model_error"),
    ]
    assert step.calls[0].observation == "zoomed"
    again = Tapo(TapoOptions())(rows)
    for before, after in zip(credit.step_advantages[:2], again.step_advantages, strict=True):
        assert before.tolist() == after.tolist()


def test_a_call_with_an_advantage_of_its_own_shows_it(tmp_path: Path) -> None:
    held, advantages = (searching(), searching("t2", accuracy=0.0)), (1.0, -1.0)
    rows = [from_trajectory(t, a) for t, a in zip(held, advantages, strict=True)]
    credit = Tapo(TapoOptions(span="call"))(rows)
    TrajectoryDump(tmp_path).write(0, held, advantages, credit)
    bad = lines(tmp_path / "tokens" / "step_000000.jsonl")[1]
    zoom, unknown = bad["turns"][0]["calls"]
    assert bad["turns"][0]["advantage"] == -1.0
    assert zoom["advantage"] == pytest.approx(-0.2)
    assert "advantage" not in unknown


def test_versions_of_the_weights_are_dumped_turn_by_turn() -> None:
    first, last = searching().turns
    parts = (VersionSpan(start=0, end=1, version=4), VersionSpan(start=1, end=3, version=5))
    carried = dataclasses.replace(first, policy_version=4, versions=parts)
    view = token_view(dataclasses.replace(searching(), turns=(carried, last)))
    assert [turn["policy_version"] for turn in view["turns"]] == [4, 0]
    assert [turn["versions"] for turn in view["turns"]] == [[[0, 1, 4], [1, 3, 5]], []]


def test_scores_of_tokens_are_those_of_their_last_update(tmp_path: Path) -> None:
    held = (searching(), searching("t2"))
    advantages = (0.5, 0.5)
    dump = TrajectoryDump(tmp_path, every=2)
    assert dump.observer(1) is None
    rows = [TrainingRow.from_turns(one, [1.0, 1.0]) for one in held]
    both, first = join(rows), join(rows[:1])
    values = torch.linspace(-1.0, -0.1, 10)
    for batch, logprobs, old in (
        (both, values, values),
        (both, values + 0.25, values),
        (first, values[:5], None),
    ):
        seen = dump.observer(2)
        assert seen is not None
        output = LossOutput(per_token=logprobs, metrics={}, old_logprobs=old)
        seen(batch, logprobs, logprobs + 2, output)
    dump.write(2, held, advantages, assigned(held, advantages, tapo=False))
    again, only = lines(tmp_path / "scores" / "step_000002.jsonl")
    assert (again["id"], only["id"]) == ("t1", "t2")
    assert again["logprobs"] == [-1.0, -0.9, -0.8, -0.7, -0.6] and again["ratio"] == [None] * 5
    assert only["logprobs"] == pytest.approx([-0.25, -0.15, -0.05, 0.05, 0.15], abs=1e-6)
    assert only["ratio"] == pytest.approx([math.exp(0.25)] * 5, rel=1e-5)
    assert only["entropy"] == pytest.approx([1.75, 1.85, 1.95, 2.05, 2.15], abs=1e-5)


def test_pictures_are_stored_once_with_their_own_bytes(tmp_path: Path) -> None:
    held = (searching(), searching("t2"))
    for step in range(2):
        TrajectoryDump(tmp_path).write(step, held, (0.0, 0.0), assigned(held, (0.0, 0.0)))
    stored = {path.name: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    assert stored == {f"{SCENE.sha256}.png": SCENE.data, f"{CROP.sha256}.jpg": CROP.data}


def test_a_step_done_again_replaces_its_dump_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for held in ((searching("old"), searching("older")), (searching("new"),)):
        advantages = [0.0] * len(held)
        TrajectoryDump(tmp_path).write(3, held, advantages, assigned(held, advantages))
    assert [row["id"] for row in lines(tmp_path / "tokens" / "step_000003.jsonl")] == ["new"]
    assert {path.name for path in (tmp_path / "tokens").iterdir()} == {"step_000003.jsonl"}


def test_resuming_discards_the_dumps_of_later_steps_of_all_ranks(tmp_path: Path) -> None:
    held = (searching(),)
    for rank in range(2):
        for step in (1, 2, 10):
            TrajectoryDump(tmp_path, rank=rank).write(step, held, (0.0,), assigned(held, (0.0,)))
    TrajectoryDump(tmp_path).discard_from(2)
    for folder in ("tokens", "rollouts", "scores"):
        kept = {path.name for path in (tmp_path / folder).iterdir()}
        assert kept == {"step_000001.jsonl", "step_000001.rank_1.jsonl"}


def test_whatever_the_policy_wrote_as_arguments_can_be_dumped(tmp_path: Path) -> None:
    deep: Any = "end"
    for _ in range(500):
        deep = [deep]
    wild = {"x": math.inf, "y": [math.nan, 1], "z": deep}
    call = ToolCall(name="zoom", arguments=wild, valid=False, executed=False)
    turn = dataclasses.replace(searching().turns[0], calls=(call,))
    held = (dataclasses.replace(searching(), turns=(turn, searching().turns[1])),)
    TrajectoryDump(tmp_path).write(0, held, (0.0,), assigned(held, (0.0,)))
    (row,) = lines(tmp_path / "rollouts" / "step_000000.jsonl")
    assert row["steps"][0]["calls"][0]["arguments"]["x"] == "inf"
    (view,) = lines(tmp_path / "tokens" / "step_000000.jsonl")
    shown = view["turns"][0]["calls"][0]["arguments"]
    assert (shown["x"], shown["y"]) == ("inf", ["nan", 1])
    assert json.dumps(shown["z"], ensure_ascii=False).count("[") == 32


def test_rows_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    held = (searching(),)
    with pytest.raises(TapoError, match="1 trajectories, 2 advantages, 1 credit rows"):
        TrajectoryDump(tmp_path).write(0, held, (0.0, 1.0), assigned(held, (0.0,)))


def test_trajectories_of_an_evaluation_are_written_without_advantages(tmp_path: Path) -> None:
    write_trajectories(tmp_path / "out.jsonl", [searching(), silent("t2")])
    first, second = lines(tmp_path / "out.jsonl")
    assert "advantage" not in first["turns"][0]
    assert (second["answer"], second["stop"]) == (None, "max_tokens")
    assert len(list((tmp_path / "images").iterdir())) == 2


def test_runs_of_placeholders_are_written_with_their_length_and_read_back() -> None:
    tokens = np.array([5, 9, 9, 9, 7, 9, 8, 8, 9, 9], dtype=np.int32)
    short = shortened_tokens(tokens, 9)
    assert short == [5, [9, 3], 7, [9, 1], 8, 8, [9, 2]]
    assert expanded_tokens(short).tolist() == tokens.tolist()
    assert shortened_tokens(tokens, None) == tokens.tolist()
    assert expanded_tokens([]).tolist() == shortened_tokens(tokens[:0], 9) == []
    for broken in ([[9]], [[9, 1, 1]], [[9, 1.5]]):
        with pytest.raises(DataError, match="runs of them as"):
            expanded_tokens(broken)


def test_a_view_shows_a_picture_by_one_placeholder_and_no_file_that_is_not_stored() -> None:
    held = searching()
    placeholder = int(held.tokens[1])
    view = token_view(
        held, decode=lambda ids: f"{len(ids)}", placeholder=placeholder, images="none"
    )
    assert view["tokens"][1] == [placeholder, 1]
    assert expanded_tokens(view["tokens"]).tolist() == held.tokens.tolist()
    assert {image["file"] for image in view["images"]} == {None}
    doubled = dataclasses.replace(held, tokens=np.repeat(held.tokens, 2))
    assert token_view(doubled, decode=lambda ids: f"{len(ids)}", placeholder=placeholder)[
        "text"
    ] == str(2 * len(held.tokens) - 1)


def test_steps_between_are_not_dumped_and_crops_not_stored(tmp_path: Path) -> None:
    cut = dataclasses.replace(CROP, ref=ImageRef(root=SCENE.ref.root, box=(0.0, 0.0, 0.5, 0.5)))
    held = (dataclasses.replace(searching(), images=(SCENE, cut)),)
    advantages = (0.5,)
    credit = assigned(held, advantages)
    dump = TrajectoryDump(tmp_path, every=2, images="roots")
    for step in range(4):
        dump.write(step, held, advantages, credit)
    for folder in ("tokens", "rollouts"):
        assert names(tmp_path / folder) == ["step_000000.jsonl", "step_000002.jsonl"]
    assert names(tmp_path / "images") == [f"{SCENE.sha256}.png"]
    (view,) = lines(tmp_path / "tokens" / "step_000002.jsonl")
    assert [image["file"] for image in view["images"]] == [f"{SCENE.sha256}.png", None]
    TrajectoryDump(tmp_path / "none", every=0).write(0, held, advantages, credit)
    assert not (tmp_path / "none").exists()


def names(folder: Path) -> list[str]:
    """Of the files in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())
