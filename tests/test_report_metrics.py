"""Catalogue, console, metrics file, statistics, curves."""

from __future__ import annotations

import ast
import io
import json
import math
import os
import pty
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from tapo_train.errors import DataError, TapoError
from tapo_train.report.catalogue import (
    METRICS,
    SECTIONS,
    SUMMARIES,
    meaning_of,
    panels_of,
    require_known,
    unit_of,
)
from tapo_train.report.live_console import LiveConsole, open_console
from tapo_train.report.metrics_file import MetricsFile, read_metrics
from tapo_train.report.plots import plot_metrics
from tapo_train.report.sinks import Console, duration, write_all
from tapo_train.report.statistics import accuracy_of


def test_a_name_outside_the_catalogue_is_refused_and_those_inside_pass() -> None:
    require_known(["reward/mean", "rollout/calls/text_search_tool", "time/rollout_s"])
    with pytest.raises(TapoError, match=r"\['reward/meen'\]"):
        require_known(["reward/mean", "reward/meen"])


PACKAGE = Path(__file__).parents[1] / "tapo_train"
SOURCES = [
    *(PACKAGE / "algos").glob("*.py"),
    *(PACKAGE / "learner").glob("*.py"),
    *(PACKAGE / "training").glob("*.py"),
]
GROUPS = {name.split("/")[0] for name in METRICS}


def test_every_metric_named_in_the_source_is_in_the_catalogue() -> None:
    constants = {
        node.value
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    named = {text for text in constants if re.fullmatch(rf"({'|'.join(GROUPS)})/\w+", text)}
    assert len(named) > 20
    require_known(named)


def test_a_placeholder_stands_for_one_word_only() -> None:
    assert meaning_of("rollout/outcome/ok") == METRICS["rollout/outcome/<outcome>"]
    assert meaning_of("rollout/outcome/") is None
    assert meaning_of("rollout/outcome/a/b") is None
    assert meaning_of("rollout/outcome/<outcome>") is None
    assert meaning_of("xrollout/outcome/ok") is None


def test_an_exact_name_goes_before_a_pattern() -> None:
    assert meaning_of("time/step_s") == "[s] wall time of the step"


def test_a_dashboard_shows_every_metric_of_the_catalogue_once() -> None:
    shown = [name for section in SECTIONS for name in panels_of(section)]
    assert sorted(shown) == sorted(METRICS)
    assert set(SUMMARIES) <= set(METRICS)
    assert (unit_of("time/step_s"), unit_of("policy/entropy")) == ("s", "nat")
    assert (unit_of("rollout/call_rate"), unit_of("reward/mean")) == ("share", "")


def test_the_workspace_of_wandb_is_made_from_the_catalogue() -> None:
    pytest.importorskip("wandb_workspaces", reason="extra dashboard")
    from tapo_train.report.wandb_workspace import make_workspace

    made = make_workspace(entity="me", project="mine", name="view")
    assert [section.name for section in made.sections] == list(SECTIONS)
    panels = [panel for section in made.sections for panel in section.panels]
    asked = {str(y) for panel in panels for y in panel.y}
    patterns = [re.compile(panel.metric_regex) for panel in panels if panel.metric_regex]
    assert asked == {name for name in METRICS if "<" not in name}
    assert any(pattern.fullmatch("tool/text_search_tool/calls") for pattern in patterns)
    (seconds,) = [panel for panel in panels if panel.y == ["time/step_s"]]
    assert (seconds.title_y, seconds.title) == ("s", "time/step_s: [s] wall time of the step")


def test_every_metric_has_a_one_line_meaning() -> None:
    assert all(meaning and "\n" not in meaning for meaning in METRICS.values())


def test_the_console_shows_one_line_with_progress_cost_and_time_left() -> None:
    stream = io.StringIO()
    times = iter([100.0, 130.0, 160.0])
    console = Console(total_steps=60, stream=stream, clock=lambda: next(times))
    metrics = {
        "reward/mean": 0.8125,
        "reward/accuracy": 0.5,
        "rollout/call_rate": 0.9,
        "throughput/tokens_per_s": 1834.4,
        "time/step_s": 20.0,
        "policy/lr": 1.0,
    }
    for step in range(3):
        console.write(step, metrics)
    console.close()
    row = "reward 0.812  accuracy 0.500  tool calls 90%  1834 tokens/s  20.0 s"
    assert stream.getvalue().splitlines() == [
        f"step  1/60  {row}  19 min 40 s left",
        f"step  2/60  {row}  29 min 00 s left",
        f"step  3/60  {row}  28 min 30 s left",
    ]


def test_the_time_left_follows_the_last_ten_steps() -> None:
    stream = io.StringIO()
    times = iter([0.0, 1000.0, *(1000.0 + 2 * index for index in range(1, 12))])
    console = Console(total_steps=113, stream=stream, clock=lambda: next(times))
    for step in range(13):
        console.write(step, {})
    assert stream.getvalue().splitlines()[-1] == "step  13/113  3 min 20 s left"


def test_a_row_of_validation_alone_is_shown_without_training_columns() -> None:
    stream = io.StringIO()
    Console(total_steps=4, stream=stream).write(1, {"eval/accuracy": 0.25})
    assert stream.getvalue() == "step 2/4  validation 0.250\n"


@contextmanager
def terminal() -> Iterator[tuple[TextIO, Callable[[], str]]]:
    """A stream that is a terminal, and what was shown on it so far."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        yield stream, lambda: os.read(ours, 1 << 16).decode()
    os.close(ours)


def test_on_a_terminal_a_line_below_the_rows_says_what_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    with terminal() as (stream, shown):
        console = open_console(total_steps=12, first_step=3, stream=stream)
        assert isinstance(console, LiveConsole)
        console.enter("rollout")
        console.write(3, {"reward/mean": 0.5, "time/step_s": 20.0, "warning/tool_use_dying": 1.0})
        console.enter("update")
        time.sleep(0.5)
        console.close()
        seen = shown()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert "step  4/12  reward 0.500  20.0 s  2 min 40 s left\r\n" in plain
    assert "  warning: tool use is dying out" in plain
    assert re.search(r"step  5/12  update  \d s  2 min (40|39) s left", plain)
    assert seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l"), "the cursor is gone"


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("TERM", "dumb")])
def test_where_nobody_watches_lines_are_plain(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    with terminal() as (stream, shown):
        console = open_console(total_steps=4, stream=stream)
        console.enter("rollout")
        console.write(1, {"eval/accuracy": 0.25})
        assert shown() == "step 2/4  validation 0.250\r\n"
    assert isinstance(open_console(total_steps=4, stream=io.StringIO()), Console)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    write_all([sink], 0, {"reward/mean": 0.5})
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (row["step"], row["reward/mean"]) == (0, 0.5)
    assert row["time"] > 1.7e9
    sink.close()


def test_resuming_drops_the_rows_that_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    for step in range(5):
        first.write(step, {"reward/mean": float(step)})
    first.close()
    again = MetricsFile(path, resume_step=3)
    again.write(3, {"reward/mean": 30.0})
    again.close()
    assert [(row["step"], row["reward/mean"]) for row in read_metrics(path)] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]


@pytest.mark.parametrize("torn", ['{"step": 2, "rew', '{"step"', "\0\0\0", "{}", "12"])
def test_a_torn_last_line_is_left_out_and_overwritten(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "reward/mean": 1.0}\n' + torn)
    assert [row["step"] for row in read_metrics(path)] == [1]
    resumed = MetricsFile(path, resume_step=2)
    resumed.write(2, {"reward/mean": 2.0})
    resumed.close()
    assert [row["step"] for row in map(json.loads, path.read_text().splitlines())] == [1, 2]


def test_a_broken_line_in_the_midst_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not valid JSON"):
        read_metrics(path)


def test_a_metric_logged_twice_for_a_step_is_refused(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "metrics.jsonl", resume_step=4)
    with pytest.raises(TapoError, match=r"\['reward/mean'\] of step 2 were logged before"):
        sink.write(2, {"reward/mean": 1.0})
    sink.write(4, {"reward/mean": 1.0})
    sink.write(4, {"eval/accuracy": 1.0})
    with pytest.raises(TapoError, match=r"\['reward/mean'\] of step 4"):
        sink.write(4, {"reward/mean": 1.0})
    sink.write(5, {"reward/mean": 1.0})
    sink.close()


def test_values_that_are_not_finite_become_null_and_come_back_as_nan(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = MetricsFile(path)
    sink.write(0, {"policy/loss": math.nan, "policy/kl": math.inf})
    sink.close()
    assert '"policy/loss": null' in path.read_text()
    (row,) = read_metrics(path)
    assert math.isnan(row["policy/loss"])
    assert math.isnan(row["policy/kl"])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cut=st.integers(0, 200), resume_step=st.integers(0, 4))
def test_wherever_a_run_is_killed_no_step_is_there_twice(
    tmp_path: Path, cut: int, resume_step: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(b'{"step": %d, "reward/mean": 0.5}\n' % n for n in range(5))[:cut])
    complete = sum(row["step"] < resume_step for row in read_metrics(path))
    sink = MetricsFile(path, resume_step=resume_step)
    for step in range(resume_step, 6):
        sink.write(step, {"reward/mean": 1.0})
    sink.close()
    steps = [row["step"] for row in read_metrics(path)]
    assert steps == [*range(complete), *range(resume_step, 6)]


@pytest.mark.parametrize(
    ("correct", "num", "low", "high"),
    [  # roots of (p - x)^2 = z^2 x (1 - x) / n, found by bisection
        (176, 200, 0.82766, 0.91802),
        (82, 200, 0.34416, 0.47924),
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (1, 2, 0.09453, 0.90547),
    ],
)
def test_wilson_intervals_are_those_computed_independently(
    correct: int, num: int, low: float, high: float
) -> None:
    accuracy = accuracy_of(correct, num)
    assert (accuracy.low, accuracy.high) == pytest.approx((low, high), abs=6e-6)


@given(st.integers(1, 3000), st.data())
def test_wilson_bounds_solve_the_score_equation(num: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, num))
    accuracy = accuracy_of(correct, num, z=2.0)
    for bound in (accuracy.low, accuracy.high):
        error = 4 * bound * (1 - bound) / num
        assert (accuracy.value - bound) ** 2 == pytest.approx(error, abs=1e-12)
    assert 0 <= accuracy.low <= accuracy.value <= accuracy.high <= 1


def test_an_accuracy_reads_with_its_interval_and_number() -> None:
    assert str(accuracy_of(176, 200)) == "0.880 (95 % interval 0.828 to 0.918, n=200)"


@pytest.mark.parametrize(("correct", "num"), [(1, 0), (3, 2), (-1, 2), (0, 0)])
def test_impossible_counts_are_refused(correct: int, num: int) -> None:
    with pytest.raises(DataError, match=f"{correct} correct of {num}"):
        accuracy_of(correct, num)


def test_curves_that_were_logged_are_drawn_into_a_png(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(3):
        sink.write(step, {"reward/mean": step / 3, "reward/accuracy": math.nan})
    sink.write(3, {"eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.6})
    sink.close()
    drawn = plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "plots" / "curve.png")
    assert drawn == ["reward/mean", "eval/accuracy"]
    with Pillow.open(tmp_path / "plots" / "curve.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (960, 540))
        colours = picture.convert("RGB").getcolors(maxcolors=10**6)
    assert colours is not None
    assert {(31, 119, 180), (255, 127, 14)} <= {colour for _, colour in colours}


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to draw"):
        plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
