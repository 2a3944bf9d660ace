"""A run on real rows, with a local index and a judge that fails every fifth time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loopback import threaded

from tapo_train.__main__ import main
from tapo_train.recipe.compose import load_recipe
from tapo_train.runs import train
from tapo_train.tools.corpus_index import build_index

ROOT = Path(__file__).resolve().parent.parent
REAL_ROWS = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT / "scripts"))

from scripted_judge import FAILURES, ScriptedJudge  # noqa: E402


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(not REAL_ROWS.is_dir(), reason=f"no real rows at {REAL_ROWS}")
def test_no_verdict_that_failed_touches_a_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAPO_DATA", str(REAL_ROWS))
    build_index(tmp_path / "index", [ROOT / "recipes" / "livevqa_local_pages"])
    with threaded(ScriptedJudge(fail=0.2)) as judge:
        monkeypatch.setenv("JUDGE_ENDPOINT", judge.endpoint)
        train(
            load_recipe(
                "recipes/livevqa_local.yaml",
                [
                    f"run.dir={tmp_path}/run",
                    f"tools.corpus={tmp_path}/index",
                    "run.steps=2",
                    "rollout/engine=hf",
                    "report.dump_images=none",
                ],
            )
        )
        asked = judge.asked
    failed = [response for response, said in asked if said in FAILURES]
    assert len(asked) > 10 and len(failed) == len(asked) // 5
    lost = 0
    for step in range(2):
        views = lines(tmp_path / "run" / "tokens" / f"step_{step:06d}.jsonl")
        trained = {
            row["id"] for row in lines(tmp_path / "run" / "rollouts" / f"step_{step:06d}.jsonl")
        }
        unscored = [view for view in views if view["unscored"] is not None]
        lost += len(unscored)
        for view in unscored:
            assert view["reward"] is None and view["id"] not in trained
            assert {turn["advantage"] for turn in view["turns"]} == {0.0} == {view["advantage"]}
        for group in {view["group"] for view in views}:
            # The baseline is that of the scored attempts alone, worked out anew.
            own = [view for view in views if view["group"] == group and view["reward"] is not None]
            totals = np.array([view["reward"]["total"] for view in own])
            for view, total in zip(own, totals, strict=True):
                spread = totals.std(ddof=1) if len(own) > 1 else 0.0
                expected = (total - totals.mean()) / (spread + 1e-6)
                assert view["advantage"] == pytest.approx(expected, abs=1e-4)
                assert view["reward"]["parts"]["accuracy"] in (0.0, 1.0)
    assert lost == len(failed), "each failed verdict left its attempt out, and no other"
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert sum(row["rollout/unscored"] for row in rows) > 0


@pytest.mark.slow
@pytest.mark.skipif(not REAL_ROWS.is_dir(), reason=f"no real rows at {REAL_ROWS}")
def test_real_rows_have_a_table_and_what_the_judge_left_open_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_index(tmp_path / "index", [ROOT / "recipes" / "livevqa_local_pages"])
    words = ["--model", "assets/warm_start", "--recipe", "recipes/livevqa_local.yaml"]
    words += ["--benchmarks", f"news={REAL_ROWS}/livevqa_news", "--questions", "6"]
    words += ["--repeats", "2", "--out", str(tmp_path / "out"), "rollout/engine=hf"]
    words += [f"tools.corpus={tmp_path}/index", "reward.min_scored=0.2"]
    with threaded(ScriptedJudge(fail=0.4)) as judge:
        monkeypatch.setenv("JUDGE_ENDPOINT", judge.endpoint)
        assert main(["eval", *words]) == 0
        failed = sum(said in FAILURES for _, said in judge.asked)
        first = json.loads((tmp_path / "out" / "results.json").read_text())["tables"]["news"]
        judge.fail = 0.0
        capsys.readouterr()
        assert main(["eval", *words]) == 0
        verdicts = [said for _, said in judge.asked]
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    second = results["tables"]["news"]
    assert (first["attempts"], first["failed"]) == (12, failed) and failed > 0
    assert (second["attempts"], second["failed"], second["answered_for"]) == (12, 0, 6)
    written = lines(tmp_path / "out" / "attempts.jsonl")
    right = [attempt["accuracy"] for attempt in written if not attempt["failed"]]
    assert sum(right) == verdicts.count("yes") > 0, "each verdict is one attempt's"
    last = {(one["task"], one["repeat"]): one["accuracy"] for one in written}
    assert second["avg@2"]["value"] == pytest.approx(np.mean(list(last.values())))
    (told,) = results["manifest"]["judges"]
    assert (told["model"], told["endpoint"]) == ("scripted", judge.endpoint)
    assert "| news | 6 of 6 | 0 | " in shown and "(judge in the paper, judge here)" in shown
