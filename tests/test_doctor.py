"""The doctor: a line per check, a way to mend what fails, and an exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tapo_train.__main__ import main
from tapo_train.commands import doctor, doctor_checks


def test_a_sound_environment_passes(
    tiny_qwen3_vl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tiny_qwen3_vl), "--only", "versions", "image_tokens"]
    assert main(["doctor", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok   versions")
    assert lines[1].startswith("ok   image_tokens")
    assert "64×64 → 4" in lines[1]
    assert lines[2] == "all 2 checks passed"


def test_a_failure_says_how_to_mend_it_and_fails_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tmp_path / "nothing"), "--only", "versions", "chat_template"]
    assert main(["doctor", *arguments]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("FAIL chat_template")
    assert lines[2].strip().startswith("mend: take a model whose chat template")
    assert lines[3] == "1 of 2 checks failed: chat_template"


def test_a_check_that_hangs_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty = doctor.Check(name="imports", mend="", timeout_s=0.01)
    monkeypatch.setattr(doctor, "CHECKS", (hasty,))
    assert doctor.main(["--model", "m"]) == 1
    assert "FAIL imports        no answer within 0 s" in capsys.readouterr().out


def test_every_check_of_the_report_exists() -> None:
    known = {check.__name__ for check in doctor_checks.CHECKS}
    assert set(doctor.names()) == known - {"tiny_policy"}


def test_versions_name_a_package_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy<1", "nowhere-to-be-found>=2", 'ruff<0.1; extra == "dev"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    with pytest.raises(
        ValueError, match=r"numpy is [\d.]+, wanted <1; nowhere-to-be-found is miss"
    ):
        doctor_checks.versions(Path())
