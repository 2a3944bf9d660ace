"""Runs listed, compared and told about: numbers worked out by hand from a few rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from inspected_run import HOSTILE, four_attempts, write_run

from tapo_train.__main__ import main
from tapo_train.inspector.figures import by_stage, curve
from tapo_train.inspector.report import credit, tools, warnings, write_report
from tapo_train.inspector.runs import Run, differences, listing, read_run, variants


def row(step: int, **metrics: float | None) -> dict[str, Any]:
    """A line of metrics.jsonl; `__` in a name stands for `/`."""
    return {"step": step, "time": 1000.0 + step} | {
        name.replace("__", "/"): value for name, value in metrics.items()
    }


def make_run(path: Path, rows: list[dict[str, Any]], **recipe: Any) -> Path:
    """A run folder without dumps."""
    path.mkdir(parents=True)
    steps = {"run": {"steps": 2, "seed": 0, "dir": str(path)}}
    (path / "recipe.yaml").write_text(yaml.safe_dump(steps | recipe))
    (path / "manifest.json").write_text("{}")
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    return path


def test_runs_that_differ_in_much_are_named_by_their_folders(tmp_path: Path) -> None:
    many = {f"field_{number}": "a value of some length" for number in range(9)}
    rows = [row(0, reward__mean=1.0)]
    runs = [
        read_run(make_run(tmp_path / "plain", rows)),
        read_run(make_run(tmp_path / "other", rows, credit=many)),
    ]
    assert list(variants(runs)) == [(tmp_path / name).as_posix() for name in ("plain", "other")]


def test_a_tools_outcomes_are_weighted_by_its_calls(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "tool/find/calls": 10.0, "tool/find/outcome/ok": 1.0, "tool/find/cost": 2.0},
        {"step": 1, "tool/find/calls": 30.0, "tool/find/outcome/ok": 0.5, "tool/find/cost": 1.0},
    ]
    rows[1]["tool/find/outcome/timeout"] = 0.5
    rows[1]["time/tool/find/latency_p50_s"] = 0.25
    (found,) = tools(read_run(make_run(tmp_path / "a", rows)))
    assert (found["calls"], found["cost"], found["p50_s"]) == (40, 3.0, 0.25)
    assert found["outcomes"] == {"ok": 25 / 40, "timeout": 15 / 40}


def test_credit_is_summed_over_the_steps(tmp_path: Path) -> None:
    rows = [
        row(
            step,
            tapo__by_turn__0__total=4,
            tapo__by_turn__0__matched=2,
            tapo__by_turn__0__corrected=1,
        )
        for step in range(2)
    ]
    (found,) = credit(read_run(make_run(tmp_path / "a", rows)))
    assert found == {"kind": "turn", "name": "0", "total": 8, "matched": 4, "corrected": 2}


def test_a_warning_says_when_it_held(tmp_path: Path) -> None:
    rows = [row(step, warning__stuck=float(step in (1, 3))) for step in range(5)]
    (found,) = warnings(read_run(make_run(tmp_path / "a", rows)))
    assert found == {"name": "stuck", "first": 2, "last": 4, "steps": 2}


def test_stage_times_are_medians_without_the_whole_step(tmp_path: Path) -> None:
    times = (1.0, 9.0, 2.0)
    rows = [row(i, time__update_s=t, time__step_s=99.0) for i, t in enumerate(times)]
    assert by_stage(read_run(make_run(tmp_path / "a", rows))) == {"update": 2.0}


def test_seeds_of_one_recipe_are_one_variant(tmp_path: Path) -> None:
    def run(name: str, seed: int, credit: str) -> Run:
        path = make_run(tmp_path / name, [row(0, reward__mean=1.0)], credit={"name": credit})
        recipe = yaml.safe_load((path / "recipe.yaml").read_text())
        recipe["run"]["seed"] = seed
        (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return read_run(path)

    runs = [run("a", 0, "tapo"), run("b", 1, "tapo"), run("c", 0, "none")]
    found = {label: [held.name for held in held] for label, held in variants(runs).items()}
    assert found == {"credit.name=tapo": ["a", "b"], "credit.name=none": ["c"]}
    assert list(variants(runs[:2]).values()) == [runs[:2]]


def test_differences_name_absent_fields_too() -> None:
    found = differences([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}])
    assert found == {"b": [2, 3], "c": [None, 4]}


def test_fields_of_another_part_follow_from_its_name_and_are_no_differences() -> None:
    tapo = {"credit.name": "tapo", "credit.beta": 0.8, "credit.span": "turn", "lr": 1}
    none = {"credit.name": "none", "credit.span": "call", "lr": 1, "creditor": 2}
    assert differences([tapo, none]) == {
        "credit.name": ["tapo", "none"],
        "credit.span": ["turn", "call"],
        "creditor": [None, 2],
    }
    del none["credit.name"], tapo["credit.name"]
    assert differences([tapo, none])["credit.beta"] == [0.8, None]


def test_a_curve_nobody_logged_is_not_drawn(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", [row(0, reward__mean=None)]))
    assert curve("reward/mean", {"a": [run]}) is None


def test_the_list_tells_done_running_and_stopped_apart(tmp_path: Path) -> None:
    done = read_run(make_run(tmp_path / "done", [row(0), row(1, reward__accuracy=0.5)]))
    begun = read_run(make_run(tmp_path / "begun", [row(0)]))
    assert "done" in listing([done], now=1e9).splitlines()[1]
    assert "0.500" in listing([done], now=1e9).splitlines()[1]
    assert "running" in listing([begun], now=1100.0).splitlines()[1]
    assert "stopped" in listing([begun], now=1e9).splitlines()[1]
    assert "2 min ago" in listing([begun], now=1120.0).splitlines()[1]


def test_the_report_is_one_page_in_which_text_stays_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", [four_attempts()])
    (run / "recipe.yaml").write_text(yaml.safe_dump({"run": {"steps": 1}, "note": HOSTILE}))
    (run / "manifest.json").write_text("{}")
    (run / "metrics.jsonl").write_text(json.dumps(row(0, reward__accuracy=0.5)) + "\n")
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/png;base64,") == 1
    assert (run / "report" / "reward_accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "1 pictures" in capsys.readouterr().out
    assert main(["ls", str(tmp_path)]) == 0
    assert "1/1" in capsys.readouterr().out


def test_what_differs_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make_run(tmp_path / "one", [row(0)], credit={"name": "tapo"})
    two = make_run(tmp_path / "two", [row(0)], credit={"name": "none"})
    assert main(["diff", str(one), str(two)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["credit.name", "run.dir"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere"], "nowhere has no recipe.yaml"),
        (["diff", "nowhere"], "wanted two runs or more"),
        (["ls", "nowhere"], "is no folder"),
        (["report", "{run}", "--out", "x.pdf"], "ends in .html"),
        (["report", "{empty}"], "no step is logged"),
    ],
)
def test_what_is_no_run_is_refused_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    run = make_run(tmp_path / "run", [row(0)])
    empty = make_run(tmp_path / "empty", [])
    assert main([part.format(run=run, empty=empty) for part in arguments]) == 2
    assert message in capsys.readouterr().err


def test_several_runs_are_drawn_with_the_range_of_their_seeds(tmp_path: Path) -> None:
    paths = [
        make_run(
            tmp_path / f"s{seed}", [row(0, reward__mean=float(seed)), row(1, reward__mean=2.0)]
        )
        for seed in range(2)
    ]
    page, *pictures = write_report([read_run(path) for path in paths], tmp_path / "both.html")
    assert [path.name for path in pictures] == ["reward_mean.png"]
    assert "nowhere but in folder names" in page.read_text()
