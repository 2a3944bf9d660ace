"""What tools keep open is closed once, however a run ends."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from closing_tool import FAULTY, IDLE_TOOL, NOTES, ClosingTool, notes
from forked_runs import tapo_train

from tapo_train.tools.recording import Recording, Replay
from tapo_train.tools.toolbox import Toolbox, close_tools


class Named(ClosingTool):
    """One of several."""

    def __init__(self, name: str) -> None:
        self.name = name


def test_every_tool_is_closed_once_also_beside_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(NOTES, str(tmp_path))
    monkeypatch.setenv(FAULTY, "1")
    box = Toolbox([Named("first"), Named("second")], deadline_s=1)
    box.close()
    box.close()
    assert notes(tmp_path) == ["closed\nclosed\n"]
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "tool first could not be closed: OSError: it is stuck",
        "tool second could not be closed: OSError: it is stuck",
    ]


def test_a_tool_that_hangs_in_its_close_does_not_hold_up_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Hanging(Named):
        def close(self) -> None:
            threading.Event().wait()

    started = time.perf_counter()
    close_tools([Hanging("stuck"), Named("mute")], within_s=0.2)
    assert time.perf_counter() - started < 5.0
    said = capsys.readouterr().err
    assert "tool stuck has not closed within 0.2 s" in said
    assert "tool mute could not be closed: KeyError" in said, "no notes to write"


def test_a_recording_is_closed_although_its_tool_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NOTES, str(tmp_path))
    monkeypatch.setenv(FAULTY, "1")
    recording = Recording(tmp_path / "recording")
    Toolbox([ClosingTool()], deadline_s=1, replay=Replay(recording, "record")).close()
    assert not (tmp_path / "recording" / "calls.sqlite-wal").exists(), "sqlite's log is left"


@pytest.mark.slow
def test_an_evaluation_that_fails_closes_its_tools_and_says_its_own_error(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NOTES, str(tmp_path))
    monkeypatch.setenv(FAULTY, "1")
    overrides = ["rollout/engine=hf", IDLE_TOOL, "rollout.max_tokens=100"]
    words = ["eval", "--model", "assets/warm_start", "--recipe", "recipes/demo_cpu.yaml"]
    words += ["--tasks", f"{small_world}/test.jsonl", "--questions", "1"]
    done = tapo_train(*words, *overrides)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "wanted fewer than rollout.max_tokens = 100" in done.stderr
    assert "tool idle could not be closed: OSError: it is stuck" in done.stderr
    assert notes(tmp_path) == ["closed\n"]
