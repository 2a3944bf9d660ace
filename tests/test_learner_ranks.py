"""Two ranks do what one does, also when one of them has no picture, or nothing at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forked_runs import run_ranks
from learner_rank_worker import STAGES, Outcome, two_updates
from learner_rows import make_policy, some_rows, weights_of
from tiny_families import BUILDERS, build

from tapo_train.learner.engine import end_process_group
from tapo_train.rollout.chat import ChatFormat

WORKER = Path(__file__).with_name("learner_rank_worker.py")
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-6
DEADLINE_S = 350


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_two_ranks_update_like_one_under_every_sharding_and_with_every_family(
    tiny_qwen3_vl: Path, tmp_path: Path
) -> None:
    families = [build(kind, tmp_path / kind) for kind in BUILDERS]
    run_ranks(2, WORKER, tmp_path, tiny_qwen3_vl, *families, deadline_s=DEADLINE_S)
    found = torch.load(tmp_path / "results.pt", weights_only=True)
    wanted = one_rank(tiny_qwen3_vl)
    for stage in STAGES:
        compare(found.pop(f"{tiny_qwen3_vl.name} {stage}"), wanted)
    assert set(found) == set(BUILDERS)
    for family in families:
        compare(found[family.name], one_rank(family))
    end_process_group()


def one_rank(model: Path) -> Outcome:
    """What one rank makes of the rows of both."""
    chat = ChatFormat(model)
    policy = make_policy(model, chat, learning_rate=0.1)
    rows = some_rows(chat, policy.layout)
    losses, weights = two_updates(policy, chat, [rows, rows]), weights_of(policy)
    policy.close()
    return losses, weights


def compare(found: Outcome, wanted: Outcome) -> None:
    losses, weights = found
    assert losses == pytest.approx(wanted[0], abs=LOSS_TOLERANCE)
    torch.testing.assert_close(weights, wanted[1], atol=WEIGHT_TOLERANCE, rtol=0)
