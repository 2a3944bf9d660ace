"""The run folder: manifest, recipe, resumption, and the dashboard's id."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from inspected_run import HOSTILE, four_attempts, write_run
from process_environment import environment

from tapo_train.__main__ import main
from tapo_train.errors import ConfigError, DataError
from tapo_train.report.files import naming, write_atomically
from tapo_train.report.manifest import (
    describe_data,
    describe_model,
    describe_process,
    git_state,
)
from tapo_train.report.run_folder import RunFolder
from tapo_train.report.wandb_sink import WandbSink, require_login, resolve_mode
from tapo_train.types import Task


def data(tasks: int, fingerprint: str, *, validation: int = 1) -> dict[str, Any]:
    return {
        "train": {"tasks": tasks, "fingerprint": fingerprint},
        "validation": {"tasks": validation, "fingerprint": "aa"},
    }


def manifest(**changes: Any) -> dict[str, Any]:
    return {
        "command": ["python", "-m", "tapo_train"],
        "model": {"path": "tiny", "sha256": "00"},
        "data": data(2, "11"),
        "seed": 3,
        **changes,
    }


def test_a_new_run_holds_recipe_and_manifest(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "demo")
    assert not folder.holds_run
    folder.begin(recipe="run: {}\n", manifest=manifest(), step=0)
    assert folder.holds_run
    assert folder.recipe.read_text() == "run: {}\n"
    assert json.loads(folder.manifest.read_text()) == {**manifest(), "resumed": []}
    assert sorted(path.name for path in folder.path.iterdir()) == ["manifest.json", "recipe.yaml"]


def test_everything_of_a_run_lies_in_its_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert [folder.metrics, folder.checkpoints, folder.export] == [
        tmp_path / "metrics.jsonl",
        tmp_path / "checkpoints",
        tmp_path / "export",
    ]


def test_weights_that_a_killed_process_left_for_its_servers_go_with_the_next_start(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(recipe="run: {}\n", manifest=manifest(), step=0)
    (folder.weights / "weights-1" / "2").mkdir(parents=True)
    folder.begin(recipe="run: {}\n", manifest=manifest(), step=1)
    assert not folder.weights.exists()


def test_resuming_keeps_the_first_description_and_adds_to_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(recipe="steps: 5\n", manifest=manifest(), step=0)
    folder.begin(recipe="steps: 9\n", manifest=manifest(command=["again"]), step=4)
    folder.begin(recipe="steps: 9\n", manifest=manifest(command=["more"]), step=6)
    held = json.loads(folder.manifest.read_text())
    assert held["command"] == ["python", "-m", "tapo_train"]
    assert held["resumed"] == [
        {"step": 4, "command": ["again"]},
        {"step": 6, "command": ["more"]},
    ]
    assert folder.recipe.read_text() == "steps: 9\n"
    assert (tmp_path / "recipe.before_step_4.yaml").read_text() == "steps: 5\n"
    assert not (tmp_path / "recipe.before_step_6.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 4}, "seed 3 but is resumed with 4;"),
        ({"model": {"path": "tiny", "sha256": "01"}}, "model.sha256 00 but is resumed with 01;"),
        (
            {"data": data(2, "11", validation=3)},
            "data.validation.tasks 1 but is resumed with 3;",
        ),
        (
            {"data": {}},
            "data.validation {'tasks': 1, 'fingerprint': 'aa'} but is resumed with None",
        ),
    ],
)
def test_a_refused_resumption_names_the_first_difference(
    tmp_path: Path, changes: dict[str, Any], difference: str
) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(recipe="", manifest=manifest(), step=0)
    with pytest.raises(DataError) as caught:
        folder.begin(recipe="", manifest=manifest(**changes), step=1)
    assert f"the run was started with {difference}" in str(caught.value)
    assert str(caught.value).endswith("; give the same, or another run.dir")


def test_tasks_to_train_on_may_be_mended_and_that_is_said_and_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    said = [
        folder.begin(recipe="", manifest=manifest(data=held), step=step)
        for step, held in enumerate([data(2, "11"), data(2, "11"), data(1, "12"), data(1, "12")])
    ]
    assert said == ["", "", "data.train.tasks is 1, was 2", ""]
    held = json.loads(folder.manifest.read_text())
    assert held["data"] == data(2, "11")
    assert [resumed.get("data") for resumed in held["resumed"]] == [None, data(1, "12"), None]


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl"])
def test_files_that_are_of_no_run_are_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    folder = RunFolder(tmp_path)
    message = rf"run\.dir: found .*, which holds {name} and is of no run"
    with pytest.raises(ConfigError, match=message):
        folder.begin(recipe="", manifest=manifest(), step=0)
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / name).rename(tmp_path / "notes.txt")
    folder.begin(recipe="", manifest=manifest(), step=0)
    folder.require_own()


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir: found /proc/runs/1, where nothing can be wr"):
        RunFolder("/proc/runs/1").require_writable()
    RunFolder(tmp_path / "a" / "b").require_writable()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_full_disk_is_said_with_the_file_it_has_no_room_for(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"),
        naming(tmp_path / "metrics.jsonl"),
        Path("/dev/full").open("w") as file,
    ):
        file.write("a row")


@pytest.mark.parametrize("below", ["", "run", "run/deeper"])
def test_a_file_in_the_place_of_the_run_folder_is_refused(tmp_path: Path, below: str) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    with pytest.raises(ConfigError, match=r"run\.dir: found .*taken is a file; wanted a folder"):
        RunFolder(taken / below)


@pytest.mark.parametrize("name", ["model", "seed"])
def test_resuming_with_another_model_or_seed_is_refused(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(recipe="", manifest=manifest(), step=0)
    with pytest.raises(DataError, match=rf"manifest\.json: the run was started with {name}"):
        folder.begin(recipe="", manifest=manifest(**{name: 4}), step=1)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_manifest_is_refused_by_name(tmp_path: Path, content: str) -> None:
    folder = RunFolder(tmp_path)
    folder.manifest.write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        folder.begin(recipe="", manifest=manifest(), step=1)


def test_a_process_is_described_with_versions_and_command() -> None:
    described = describe_process()
    assert json.loads(json.dumps(described)) == described
    assert described["packages"]["numpy"].count(".") >= 1
    assert described["python"].startswith("3.")
    assert described["command"]


def commit(folder: Path) -> None:
    for arguments in (
        ["init", "-q"],
        ["add", "code.py"],
        ["-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", "m"],
    ):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True)


def test_git_state_tells_commit_and_whether_tracked_files_differ(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("a = 1\n")
    assert git_state(tmp_path) is None
    commit(tmp_path)
    (tmp_path / "notes.txt").write_text("untracked")
    clean = git_state(tmp_path)
    assert clean is not None
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "code.py").write_text("a = 2\n")
    assert git_state(tmp_path) == {"commit": clean["commit"], "dirty": True}


def test_a_package_inside_a_foreign_checkout_has_no_git_state(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("a = 1\n")
    commit(tmp_path)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "installed.py").write_text("")
    assert git_state(tmp_path / "site-packages") is None


def test_a_model_hash_sees_names_and_contents_and_not_the_place(tmp_path: Path) -> None:
    hashes = []
    for number, files in enumerate(
        [{"a": "1", "b": "2"}, {"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1", "c": "2"}]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
        hashes.append(describe_model(str(folder))["sha256"])
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_a_hub_name_has_no_hash() -> None:
    assert describe_model("Qwen/nowhere") == {"path": "Qwen/nowhere", "sha256": None}


def test_data_is_described_split_by_split() -> None:
    one = Task(id="a", question="q", images=(), answers=("x",))
    described = describe_data({"train": [one], "validation": [one, one]})
    assert described["train"]["tasks"] == 1
    assert described["validation"]["tasks"] == 2
    assert described["train"]["fingerprint"] != described["validation"]["fingerprint"]


def test_an_atomic_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_atomically(tmp_path / "sub" / "file", "old")
    write_atomically(tmp_path / "sub" / "file", b"new")
    assert (tmp_path / "sub" / "file").read_bytes() == b"new"
    assert len(list((tmp_path / "sub").iterdir())) == 1


@pytest.fixture
def logged_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without credentials for the dashboard, whoever runs the tests."""
    (tmp_path / "netrc").touch()
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("logged_out")
def test_auto_is_offline_for_a_user_who_is_not_logged_in() -> None:
    assert resolve_mode("auto") == "offline"
    assert resolve_mode("online") == "online"


@pytest.mark.usefixtures("logged_out")
def test_online_without_a_login_is_refused_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "run.wandb: found online, but .*; wanted a login"
    with pytest.raises(ConfigError, match=message):
        require_login("online")
    with pytest.raises(ConfigError, match=message):
        WandbSink(tmp_path, name="x", mode="online", config={})
    require_login("auto")
    require_login("offline")
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match=message):
        require_login("auto")
    require_login("offline")


@pytest.mark.usefixtures("logged_out")
def test_a_workspace_without_a_login_is_refused_and_can_be_read_all_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["dashboard"]) == 2
    assert "wanted a login" in capsys.readouterr().err
    assert main(["dashboard", "--dry-run"]) == 0
    assert "time/step_s" in capsys.readouterr().out


WITHOUT_NETWORK = """
import sys
from pathlib import Path
from tapo_train.errors import ConfigError
from tapo_train.report.wandb_sink import WandbSink
folder, mode = Path(sys.argv[1]), sys.argv[2]
try:
    sink = WandbSink(folder, name="x", mode=mode, config={})
except ConfigError as error:
    sys.exit(f"refused: {error}")
sink.write(0, {"reward/mean": 1.0})
print(sink.mode)
sink.close()
"""


@pytest.mark.parametrize(
    ("mode", "said", "status"),
    [
        ("auto", r"wandb: .*; logging offline to .*wandb \(`wandb sync` sends it later\)", 0),
        ("online", "refused: run.wandb: found online, but ", 1),
    ],
)
def test_a_login_without_a_network_logs_offline_unless_online_is_wanted(
    tmp_path: Path, mode: str, said: str, status: int
) -> None:
    unreachable = {
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_INIT_TIMEOUT": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NETWORK, str(tmp_path), mode],
        env=environment() | unreachable,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert re.search(said, done.stderr), done.stderr
    assert done.returncode == status, done.stderr
    assert ("offline" in done.stdout.splitlines()) == (mode == "auto")


@pytest.mark.usefixtures("logged_out")
def test_auto_leaves_it_to_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") is None
    assert resolve_mode("offline") == "offline"


@pytest.mark.usefixtures("logged_out")
def test_a_resumed_run_goes_on_under_the_same_dashboard_id_and_tells_no_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "tools.text_endpoint=http://h/?key=S3CRET"])
    attempts = four_attempts()
    attempts[2]["turns"][1]["credit"] = {"transfer": 0.5}
    write_run(tmp_path, [[{**held, "accepted": [HOSTILE]} for held in attempts]])
    for step in range(2):
        sink = WandbSink(tmp_path, name="demo", mode="auto", config={"run": {"seed": 1}}, samples=2)
        assert sink.mode == "offline"
        sink.write(step, {"reward/mean": 0.5})
        sink.close()
    identifier = (tmp_path / "wandb_id").read_text().strip()
    assert len(identifier) == 16
    stored = [path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    assert set(stored) == {f"run-{identifier}.wandb"}
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"reward/mean" in data for data in written)
    assert not any(b"S3CRET" in data for data in written)
    (table,) = tmp_path.rglob("*.table.json")
    held = json.loads(table.read_text())
    rows = [dict(zip(held["columns"], row, strict=True)) for row in held["data"]]
    assert [row["corrected"] for row in rows] == [1, 0]
    assert rows[0]["accepted"] == HOSTILE
    assert "turn 2, advantage -0.500 → +0.000\n<think>step 1</think>" in rows[0]["turns"]
    assert '→ text_search_tool({"query": "anna house"}): ok' in rows[0]["turns"]
    waiting = [
        json.loads(path.read_text())
        for path in tmp_path.glob("wandb/data/**/tmp*")
        if path.read_bytes()[:1] == b"{"
    ]
    table = next(held for held in waiting if held["_type"] == "table")
    picture = table["data"][0][table["columns"].index("picture")]
    (box,) = picture["boxes"]["cuts"]
    assert box["position"] == {"minX": 0.5, "minY": 0.0, "maxX": 1.0, "maxY": 0.5}
