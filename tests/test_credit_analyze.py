"""Rollout files and the offline analyser."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from credit_rows import golden_rows, population, row, search, text, unbiased
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_credit_parts import trajectory

from tapo_train.credit import CreditRow, Tapo, TapoOptions, from_trajectory
from tapo_train.credit.analyze import main, report
from tapo_train.credit.overrides import parse_options
from tapo_train.credit.rollout_file import read_rollouts
from tapo_train.credit.sweep import Axis, Point, parse_axes, sweep
from tapo_train.errors import ConfigError, CreditError, DataError, TapoError
from tapo_train.report.rollout_row import rollout_row
from tapo_train.types import ImageRef

GOOD = {"id": "t", "group": "q", "correct": False, "advantage": -1.0, "steps": []}


def write(path: Path, *lines: Any) -> Path:
    """One line per object; bytes and text as they are."""
    with path.open("wb") as file:
        for line in lines:
            if not isinstance(line, bytes):
                line = (line if isinstance(line, str) else json.dumps(line)).encode()
            file.write(line + b"\n")
    return path


def as_line(row: CreditRow) -> dict[str, Any]:
    """A row of the tests in the format, with everything optional left out."""
    steps = [
        {"turn": s.turn, "calls": [{"name": c.name, "arguments": c.arguments} for c in s.calls]}
        for s in row.steps
    ]
    return {"id": row.id, "group": row.group, "correct": bool(row.correct),
            "advantage": row.advantage, "steps": steps}  # fmt: skip


def golden_file(tmp_path: Path) -> Path:
    return write(tmp_path / "golden.jsonl", *map(as_line, golden_rows()))


def with_call(**call: Any) -> dict[str, Any]:
    return {**GOOD, "steps": [{"turn": 0, "calls": [{"name": "x", **call}]}]}


# --- reading ---


def test_a_minimal_line_has_the_documented_defaults(tmp_path: Path) -> None:
    row = read_rollouts(write(tmp_path / "f", with_call())).rows[0]
    call = row.steps[0].calls[0]
    assert (call.arguments, call.valid, call.executed, call.status) == (None, True, True, "ok")
    assert call.observation is None
    assert row.images == (ImageRef(root="q"),) and row.num_input_images == 1
    assert row.steps[0].num_images == 1 and row.num_turns == 2


def test_new_images_join_the_registry_after_their_step(tmp_path: Path) -> None:
    def step(turn: int, *roots: str) -> dict[str, Any]:
        new = [{"root": root, "box": [0, 0, 0.5, 1]} for root in roots]
        return {"turn": turn, "calls": [{"name": "x", "new_images": new, "observation": "o"}]}

    line = {**GOOD, "images": [{"root": "a"}], "steps": [step(0, "b", "c"), step(3), step(4, "d")]}
    row = read_rollouts(write(tmp_path / "f", line)).rows[0]
    assert [s.num_images for s in row.steps] == [1, 3, 3]
    assert [ref.root for ref in row.images] == ["a", "b", "c", "d"]
    assert row.images[1].box == (0.0, 0.0, 0.5, 1.0) and row.num_input_images == 1
    assert row.steps[0].calls[0].observation_images == row.images[1:3]


def test_rewards_become_advantages_as_in_training(tmp_path: Path) -> None:
    rewards = [1.0, 0.0, 0.0, 0.5]
    lines: list[dict[str, Any]] = [
        {"id": str(i), "group": "q", "correct": r == 1.0, "reward": r, "steps": []}
        for i, r in enumerate(rewards)
    ]
    lines.append({"id": "x", "group": "alone", "correct": True, "reward": 1.0, "steps": []})
    rows = read_rollouts(write(tmp_path / "f", *lines)).rows
    assert [row.advantage for row in rows[:4]] == pytest.approx(unbiased(rewards))
    assert rows[4].advantage == 0.0 and rows[0].reward == 1.0


def test_a_group_has_advantages_in_all_lines_or_in_none(tmp_path: Path) -> None:
    other = {"id": "u", "group": "q", "correct": False, "reward": 0.0, "steps": []}
    with pytest.raises(DataError, match=r"line 2: no advantage, but line 1"):
        read_rollouts(write(tmp_path / "f", GOOD, other))


def test_a_trajectory_survives_being_written_and_read(tmp_path: Path) -> None:
    line = rollout_row(trajectory(), -0.5)
    row = read_rollouts(write(tmp_path / "f", line)).rows[0]
    live = from_trajectory(trajectory(), -0.5)
    assert (row.id, row.group, row.correct, row.advantage) == ("t", "q", 1.0, -0.5)
    assert row.images == live.images and row.num_turns == live.num_turns
    # Arguments that could not be read are null in the file, and the call is marked invalid.
    assert row.steps == live.steps
    assert row.image_sizes == live.image_sizes


BAD_LINES: Mapping[str, tuple[Any, str]] = {
    "no json": ("{", "not a JSON object"),
    "no utf-8": (b'{"id": "\xff"}', "not a JSON object in UTF-8"),
    "a list": ([], "line is a list of 0; want an object"),
    "deep": ('{"id": ' + "[" * 100_000, "nested too deeply"),
    "huge number": ('{"id": ' + "9" * 5000 + "}", "not a JSON object"),
    "nan": ('{"id": NaN}', "found NaN"),
    "key twice": ('{"id": "a", "id": "b"}', "key 'id' is there twice"),
    "no id": ({**GOOD, "id": None}, "id is None; want text"),
    "number as group": ({**GOOD, "group": 3}, "group is 3; want text"),
    "no outcome": ({**GOOD, "correct": None}, "correct is None"),
    "outcome 2": ({**GOOD, "correct": 2}, "correct is 2; want true, false or a number"),
    "text as advantage": ({**GOOD, "advantage": "1"}, "advantage is '1'; want a finite number"),
    "overflow": ('{"id": "a", "group": "q", "correct": 1, "advantage": 1e999}', "advantage is inf"),
    "long integer": ({**GOOD, "advantage": 10**400}, "advantage is 1000"),
    "neither": ({**GOOD, "advantage": None}, "neither advantage nor reward"),
    "no steps": ({k: v for k, v in GOOD.items() if k != "steps"}, "steps is None; want a list"),
    "step": ({**GOOD, "steps": [1]}, r"steps\[0\] is 1; want an object"),
    "turn": ({**GOOD, "steps": [{"turn": -1, "calls": []}]}, r"steps\[0\].turn is -1"),
    "huge turn": ({**GOOD, "steps": [{"turn": 10**12, "calls": []}]}, r"steps\[0\].turn is 1000"),
    "true turn": ({**GOOD, "steps": [{"turn": True, "calls": []}]}, r"steps\[0\].turn is True"),
    "turn twice": (
        {**GOOD, "steps": [{"turn": 0, "calls": []}] * 2},
        r"steps\[1\].turn is 0; want an integer in \[1,",
    ),
    "no calls": ({**GOOD, "steps": [{"turn": 0}]}, r"steps\[0\].calls is None; want a list"),
    "call": ({**GOOD, "steps": [{"turn": 0, "calls": [[]]}]}, r"steps\[0\].calls\[0\] is a list"),
    "name": (with_call(name=None), r"calls\[0\].name is None; want text"),
    "valid": (with_call(valid=1), r"calls\[0\].valid is 1; want true or false"),
    "executed": (with_call(executed="no"), r"calls\[0\].executed is 'no'"),
    "status": (with_call(status="bad"), r"calls\[0\].status is 'bad'; want one of \['ok'"),
    "status list": (with_call(status=[]), r"calls\[0\].status is a list"),
    "observation": (
        with_call(observation=[1]),
        r"calls\[0\].observation is a list of 1; want text",
    ),
    "new images": (with_call(new_images=3), r"calls\[0\].new_images is 3; want a list"),
    "box": (
        {**GOOD, "images": [{"root": "a", "box": [0, 0, 1]}]},
        r"images\[0\].box is a list of 3",
    ),
    "box outside": (
        {**GOOD, "images": [{"root": "a", "box": [0, 0, 2, 1]}]},
        r"images\[0\].box is",
    ),
    "box flipped": (
        {**GOOD, "images": [{"root": "a", "box": [1, 0, 0, 1]}]},
        r"images\[0\].box is",
    ),
    "box without a height": (
        {**GOOD, "images": [{"root": "a", "box": [0, 0.5, 1, 0.5]}]},
        r"images\[0\].box is",
    ),
    "root": ({**GOOD, "images": [{}]}, r"images\[0\].root is None; want text"),
    "same id": (GOOD, "id 't' of group 'q' is in line 1 already"),
    "tokens": ({"id": "t", "tokens": [1, 2]}, "a row with tokens; want .* in rollouts/"),
    "an id alone": ({"id": "t", "steps": []}, "group is None; want text"),
    "corrected without a step": ({"id": "t", "advantage": 0, "steps": []}, "corrected before"),
    "corrected": ({"id": "t", "advantage": 0, "steps": [{"gates": {}}]}, "was corrected before"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_refused_with_its_number_or_counted(tmp_path: Path, name: str) -> None:
    line, message = BAD_LINES[name]
    path = write(tmp_path / "f", GOOD, "", line, {**GOOD, "id": "last"})
    with pytest.raises(DataError, match=f"f, line 3: .*{message}"):
        read_rollouts(path)
    file = read_rollouts(path, skip_bad=True)
    assert [row.id for row in file.rows] == ["t", "last"]
    assert len(file.bad) == 1 and "line 3" in file.bad[0]


def test_unknown_keys_are_counted_and_not_lost_in_silence(tmp_path: Path) -> None:
    line = {**with_call(excuted=False), "step": 3, "tokens": [1]}
    file = read_rollouts(write(tmp_path / "f", line, {**line, "id": "u"}))
    assert file.ignored_keys == {"line: step": 2, "line: tokens": 2, "steps: excuted": 2}


def test_a_byte_order_mark_and_blank_lines_are_no_error(tmp_path: Path) -> None:
    path = write(tmp_path / "f", b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "  ", "")
    assert len(read_rollouts(path).rows) == 1


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_file_that_cannot_be_read_is_a_data_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_rollouts(tmp_path / name)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
TOOLS = ("image_zoom_in_tool", "text_search_tool", "image_search_tool", "other")
ARGUMENTS = ("query", "bbox_2d", "img_idx", "x")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_nothing_hostile_escapes_as_another_exception(tmp_path: Path, data: st.DataObject) -> None:
    def call() -> dict[str, Any]:
        arguments = data.draw(
            st.dictionaries(st.sampled_from(ARGUMENTS), json_values) | json_values
        )
        return {"name": data.draw(st.sampled_from(TOOLS)), "arguments": arguments}

    def line(i: int) -> dict[str, Any]:
        steps = [{"turn": t, "calls": [call()]} for t in range(2)]
        made: dict[str, Any] = {**GOOD, "id": str(i), "correct": i % 2, "steps": steps}
        made["advantage"] = [-1.0, 1.0][i % 2]
        spoilt = data.draw(st.none() | st.sampled_from(sorted(made)))
        return made if spoilt is None else {**made, spoilt: data.draw(json_values)}

    path = write(tmp_path / "f", *(line(i) for i in range(4)))
    try:
        code = main([str(path), "--skip-bad", "--out", str(tmp_path / "out")])
    except TapoError:
        return
    assert code == 0


# --- the command ---


def test_analysing_gives_the_golden_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "corrected.jsonl"
    assert main([str(golden_file(tmp_path)), "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == [str(i) for i in range(8)]
    step = lines[3]["steps"][1]
    assert step == {
        "turn": 1, "advantage": pytest.approx(-0.0861, abs=5e-5), "matched": True,
        "similarity": 1.0, "support": pytest.approx(2 / 3),
        "reference_advantage": pytest.approx(1.2910, abs=5e-5),
        "transfer": pytest.approx(0.8607, abs=5e-5), "gates": {"theta": True, "alpha": True},
        "clipped": False,
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "8 trajectories of 1 questions" in shown
    assert "4/5" in shown and "6/8" in shown
    assert "text_search_tool" in shown


def test_an_override_reaches_the_credit_stage(tmp_path: Path) -> None:
    out = tmp_path / "corrected.jsonl"
    path = str(golden_file(tmp_path))
    assert main([path, "credit.beta=0.4", "--out", str(out), "credit.use_clip=false"]) == 0
    step = json.loads(out.read_text().splitlines()[3])["steps"][0]
    assert step["advantage"] == pytest.approx(-0.4303, abs=5e-5)


def zoom_rows(tmp_path: Path, **picture: Any) -> Path:
    call = {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [10, 20, 1500, 900]}}
    rows = [
        {
            "id": name,
            "group": "g",
            "correct": name == "a",
            "reward": float(name == "a"),
            "images": [{"root": "r", **picture}],
            "steps": [{"turn": 0, "calls": [call]}],
        }
        for name in ("a", "b")
    ]
    return write(tmp_path / "zooms", *rows)


def test_boxes_in_pixels_want_the_sizes_of_the_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CreditError, match="size of picture 0 is unknown"):
        main([str(zoom_rows(tmp_path)), "credit.box_unit=pixels"])
    with pytest.raises(DataError, match=r"images\[0\]\.size is \[0, 900\]; want two numbers > 0"):
        main([str(zoom_rows(tmp_path, size=[0, 900])), "credit.box_unit=pixels"])
    main([str(zoom_rows(tmp_path, size=[1600, 900])), "credit.box_unit=pixels"])
    assert "1/1" in capsys.readouterr().out


def test_the_corrected_file_cannot_be_corrected_again(tmp_path: Path) -> None:
    out = tmp_path / "corrected.jsonl"
    main([str(golden_file(tmp_path)), "--out", str(out)])
    with pytest.raises(DataError, match="line 1: this row was corrected before"):
        main([str(out)])


def test_own_advantages_of_calls_are_written_too(tmp_path: Path) -> None:
    out = tmp_path / "corrected.jsonl"
    main([str(golden_file(tmp_path)), "--out", str(out), "credit.turn_reduce=span"])
    calls = json.loads(out.read_text().splitlines()[7])["calls"]
    assert [(call["turn"], call["call"]) for call in calls] == [(0, 0), (0, 1)]
    assert calls[0]["advantage"] > calls[1]["advantage"]


def test_bad_lines_stop_the_command_or_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(tmp_path / "f", GOOD, "{"))
    for strict in ([], ["--strict"]):
        with pytest.raises(DataError, match="line 2"):
            main([path, *strict])
    assert main([path, "--skip-bad"]) == 0
    assert "skipped 1 unreadable lines" in capsys.readouterr().err
    with pytest.raises(DataError, match="no rollout in it"):
        main([str(write(tmp_path / "e", "{")), "--skip-bad"])


def test_a_sweep_writes_a_table_a_csv_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    arguments = [str(golden_file(tmp_path)), "--sweep", "theta=0.5:1.0:0.5", "alpha_min=0.6,0.7"]
    assert main([*arguments, "--sweep-out", str(folder), "credit.beta=0.4"]) == 0
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [(row["theta"], row["alpha_min"]) for row in rows] == [
        ("0.5", "0.6"), ("0.5", "0.7"), ("1.0", "0.6"), ("1.0", "0.7"),
    ]  # fmt: skip
    assert float(rows[0]["steps, both gates"]) == 6 / 8
    assert float(rows[1]["steps, both gates"]) == 0.0
    assert float(rows[1]["steps, theta only"]) == 6 / 8
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "0.750" in capsys.readouterr().out


def test_an_impossible_sweep_is_refused_before_the_analysis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(golden_file(tmp_path))
    with pytest.raises(ConfigError, match=r"credit\.theta is 1\.5; want a number in \[0, 1\]"):
        main([path, "--sweep", "theta=0.5,1.5"])
    assert capsys.readouterr().out == ""
    with pytest.raises(DataError, match="the sweep cannot be written there: File exists"):
        main([path, "--sweep", "theta=0.5", "--sweep-out", path])


def test_each_file_has_groups_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, out = golden_file(tmp_path), tmp_path / "corrected.jsonl"
    # The same question in another epoch: another attempt at it succeeded, without any call.
    up = {**GOOD, "id": "0", "correct": True, "advantage": 1.0}
    two = write(tmp_path / "later.jsonl", up, {**with_call(), "id": "1"})
    assert main([str(one), str(two), "credit.beta=0.4", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "10 trajectories of 2 questions" in shown
    # 5 + 1 failing trajectories with 8 + 1 steps; support in the first file is still 2/3.
    assert "4/6" in shown and "6/9" in shown and "support, mean" + " " * 24 + "0.667" in shown
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == [*map(str, range(8)), "0", "1"]
    assert lines[3]["steps"][0]["advantage"] == pytest.approx(-0.4303, abs=5e-5)
    with pytest.raises(ConfigError, match="the file that is read"):
        main([str(one), str(two), "--out", str(two)])


def test_bad_lines_of_every_file_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = write(tmp_path / "one", GOOD, "{"), write(tmp_path / "two", "{", GOOD, "[")
    assert main([str(one), str(two), "--skip-bad"]) == 0
    said = capsys.readouterr().err
    assert "one, line 2" in said and "two, line 1" in said and "skipped 3 unreadable" in said
    with pytest.raises(ConfigError, match=r"found 'credit\.beta'; want credit\.name=value"):
        main([str(one), "credit.beta"])


def test_without_a_file_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["credit.beta=0.4"])
    assert "a FILE of rollouts is required" in capsys.readouterr().err


def counted_rows() -> list[CreditRow]:
    """A question with successes and one without, so that no two shares are alike.

    Support of the text search is 1/2, of the image search 1. Failing trajectories: 8, of which 4
    in the first question; 3 of them match something, 2 the image search. Failing steps: 7, of
    which 6 in the first question; 5 match something, 2 the image search.
    """
    one = text("one")
    return [
        row("s", 1.0, one, search()), row("t", 1.0, search()),
        row("a", -1.0, one), row("b", -1.0, search()), row("c", -1.0, text("two")),
        row("d", -1.0, one, one, search()),
        row("e", -1.0, one, group="p"), *(row(n, -1.0, group="p") for n in "fgh"),
    ]  # fmt: skip


def test_each_column_of_a_sweep_is_the_share_it_is_called() -> None:
    (point,) = sweep(counted_rows(), TapoOptions(), [Axis(name="alpha_min", values=(0.6,))])
    assert point.shares == {
        "trajectories, theta only": 3 / 8,
        "trajectories, both gates": 2 / 8,
        "steps, theta only": 5 / 7,
        "steps, both gates": 2 / 7,
        "steps in mixed groups, theta only": 5 / 6,
        "steps in mixed groups, both gates": 2 / 6,
    }


def test_the_report_says_every_count_under_its_head() -> None:
    result = Tapo(TapoOptions(alpha_min=0.6))(counted_rows())
    lines = [" ".join(line.split()) for line in report(counted_rows(), result)]
    wanted = [
        "10 trajectories of 2 questions",
        "Correctable similarity gate both gates",
        "failing trajectories 3/8 37.5 % 2/8 25.0 %",
        "of questions with a success 3/4 75.0 % 2/4 50.0 %",
        "tool steps of failing ones 5/7 71.4 % 2/7 28.6 %",
        "of questions with a success 5/6 83.3 % 2/6 33.3 %",
        "Calls of failing trajectories total similar corrected",
        "image_search_tool 2 2 2",
        "text_search_tool 5 3 0",
        "Steps of failing trajectories total similar corrected",
        "turn 0 5 3 1",
        "turn 1 1 1 0",
        "turn 2 1 1 1",
        "clusters 2",
        "calls per cluster 1.500",
    ]
    assert [line for line in lines if line in wanted] == wanted


def test_the_report_tells_questions_without_a_success_apart_in_a_library_of_the_batch() -> None:
    one = text("one")
    rows = [row("s", 1.0, one), row("a", -1.0, one), row("b", -1.0, one, group="p")]
    result = Tapo(TapoOptions(scope="batch"))(rows)
    lines = [" ".join(line.split()) for line in report(rows, result)]
    assert "failing trajectories 2/2 100.0 % 2/2 100.0 %" in lines
    assert "of questions with a success 1/1 100.0 % 1/1 100.0 %" in lines


def test_a_heat_map_has_the_first_option_upwards_and_the_second_to_the_right() -> None:
    from matplotlib.figure import Figure

    from tapo_train.credit.sweep_files import heat_map

    axes = [Axis(name="theta", values=(0.1, 0.2)), Axis(name="alpha_min", values=(0.3, 0.4, 0.5))]
    places = [(theta, alpha) for theta in axes[0].values for alpha in axes[1].values]
    points = [Point(at=at, shares={"s": 0.1 * i}) for i, at in enumerate(places)]
    figure = Figure()
    panel = figure.subplots()
    heat_map(panel, figure, axes, points, "s")
    (image,) = panel.images
    assert image.origin == "lower" and image.get_clim() == (0.0, 1.0)
    assert image.get_array().tolist() == [[0.0, 0.1, 0.2], pytest.approx([0.3, 0.4, 0.5])]
    assert (panel.get_ylabel(), panel.get_xlabel()) == ("theta", "alpha_min")
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0.3", "0.4", "0.5"]
    written = {label.get_position(): label.get_text() for label in panel.texts}
    assert written[2, 0] == "0.20" and written[0, 1] == "0.30"


def test_a_sweep_over_one_option_is_drawn_as_lines(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    assert (
        main([str(golden_file(tmp_path)), "--sweep", "theta=0.5", "--sweep-out", str(folder)]) == 0
    )
    assert (folder / "sweep.png").stat().st_size > 0


def test_a_swept_theta_holds_for_every_tool() -> None:
    up, down = population([1, 0])
    rows = [row("g", up, text("one two three")), row("b", down, text("one two three four five"))]
    points = sweep(rows, TapoOptions(), [Axis(name="theta", values=(0.55, 0.65))])
    assert [point.shares["steps, theta only"] for point in points] == [1.0, 0.0]


def test_axes_include_both_ends_and_are_round_numbers() -> None:
    assert parse_axes(["theta=0.3:0.9:0.1"])[0].values == (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert parse_axes(["alpha_min=0:0.3:0.1"])[0].values == (0.0, 0.1, 0.2, 0.3)
    assert parse_axes(["credit.beta=1,2"]) == [Axis(name="beta", values=(1.0, 2.0))]


@pytest.mark.parametrize(
    "specs",
    [
        ["theta"], ["theta=x"], ["theta=0:1"], ["theta=1:0:0.1"], ["theta=0:1:0"], ["span=turn"],
        ["theta=0:1:1e-9"], ["theta=0:1:nan"], ["theta=0.1", "theta=0.2"],
        ["theta=0:1:0.01", "alpha_min=0:1:0.01"], ["theta=0.001:1:0.001", "beta=1,2,3"],
        ["theta=1", "beta=1", "alpha_min=1"],
    ],
)  # fmt: skip
def test_an_impossible_sweep_is_refused(specs: list[str]) -> None:
    with pytest.raises(ConfigError, match="--sweep"):
        parse_axes(specs)


def test_overrides_have_the_type_of_their_field() -> None:
    options = parse_options(
        [
            "credit.beta=1", "credit.use_clip=False", "credit.tools=[a,b]", "credit.span=call",
            "credit.cluster_theta=0.9", "credit.theta_by_tool.text_search_tool=0.6",
            "credit.theta_by_tool.x=0.1", "credit.similarity.x=exact",
        ]
    )  # fmt: skip
    assert options == TapoOptions(
        beta=1.0, use_clip=False, tools=("a", "b"), span="call", cluster_theta=0.9,
        theta_by_tool={"text_search_tool": 0.6, "x": 0.1}, similarity={"x": "exact"},
    )  # fmt: skip
    assert parse_options(["credit.cluster_theta=none"]) == TapoOptions()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("credit.bta=1", r"credit\.bta: unknown key; did you mean credit\.beta"),
        ("beta=1", r"found 'beta=1'; want credit\.name=value"),
        ("credit.beta", "found 'credit.beta'; want credit.name=value"),
        ("credit.beta=much", r"credit\.beta is 'much'; want a number"),
        ("credit.beta=-1", r"credit\.beta is -1\.0"),
        ("credit.use_clip=1", r"credit\.use_clip is '1'; want true or false"),
        ("credit.span=word", r"credit\.span is 'word'; want one of"),
        ("credit.theta_by_tool=0.5", r"want credit\.theta_by_tool\.TOOL=value"),
        ("credit.beta.x=0.5", r"want credit\.beta=value"),
    ],
)
def test_a_wrong_override_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_options([override])


def test_the_output_may_not_be_the_input(tmp_path: Path) -> None:
    path = str(golden_file(tmp_path))
    with pytest.raises(ConfigError, match="the file that is read"):
        main([path, "--out", path])
    with pytest.raises(ConfigError, match="--sweep-out without --sweep"):
        main([path, "--sweep-out", str(tmp_path)])
    with pytest.raises(DataError, match="cannot be written"):
        main([path, "--out", str(tmp_path / "no" / "such" / "folder")])


def test_the_command_loads_no_heavy_library(tmp_path: Path) -> None:
    code = (
        "import sys; from tapo_train.__main__ import main; "
        f"code = main(['analyze', {str(golden_file(tmp_path))!r}]); "
        "heavy = {'torch', 'vllm', 'deepspeed', 'transformers', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'{code} {heavy}' if heavy or code else 0)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_result_in_memory_equals_the_one_read_from_a_file(tmp_path: Path) -> None:
    rows = read_rollouts(golden_file(tmp_path)).rows
    here, there = Tapo(TapoOptions())(golden_rows()), Tapo(TapoOptions())(rows)
    assert here.steps == there.steps and here.sums == there.sums
