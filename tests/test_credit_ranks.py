"""A credit stage that looks beyond single questions gives two ranks what it gives one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from credit_rank_worker import STAGES, credited, questions
from forked_runs import run_ranks
from process_environment import ROOT

from tapo_train.build.algo import build_credit
from tapo_train.recipe.compose import load_recipe
from tapo_train.training.credit_over_ranks import OverRanks

WORKER = Path(__file__).with_name("credit_rank_worker.py")


def test_stages_beyond_single_questions_give_two_ranks_the_credit_of_one(tmp_path: Path) -> None:
    run_ranks(2, WORKER, tmp_path, deadline_s=120)
    alone = json.loads(json.dumps(credited()))
    left, right = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for stage in STAGES:
        assert len(left[stage]["turns"]) > 2 and len(right[stage]["turns"]) > 2
        for what in ("turns", "steps"):
            assert left[stage][what] | right[stage][what] == alone[stage][what], stage
        assert left[stage]["sums"] == alone[stage]["sums"] and not right[stage]["sums"], stage
    # Nobody was right about the lost question: only the library of the other rank's helps it.
    assert "lost0" in right["tapo"]["turns"] and "0" in left["tapo"]["turns"]
    call, answer = right["tapo"]["turns"]["lost0"]
    assert call > answer == -1.0


def test_on_one_rank_each_row_keeps_its_own_credit_whatever_the_order() -> None:
    rows = [row for question in questions() for row in question]
    stage = OverRanks(STAGES["shrink"])
    there, back = stage(rows), stage(rows[::-1])
    for ours, theirs in zip(there.step_advantages, back.step_advantages[::-1], strict=True):
        assert ours.tolist() == theirs.tolist()
    assert [len(turns) for turns in there.step_advantages] == [row.num_turns for row in rows]


@pytest.mark.parametrize(
    ("overrides", "gathers"),
    [
        (["credit=tapo"], False),
        (["credit=tapo", "credit.scope=batch"], True),
        (["credit=placebo"], True),
        (["credit=shrink"], True),
        (["credit=gigpo"], False),
        (["credit=none"], False),
    ],
)
def test_a_recipe_gathers_the_rows_of_all_ranks_where_its_stage_looks_beyond_a_question(
    overrides: list[str], gathers: bool
) -> None:
    stage = build_credit(load_recipe(ROOT / "recipes/demo_cpu.yaml", overrides))
    assert isinstance(stage, OverRanks) is gathers
