"""Four ranks do what one does: every ZeRO stage, offloading, adapters, any micro-batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forked_runs import run_ranks
from learner_equality_worker import ADAPTED, VARIANTS, outcome

from tapo_train.learner.engine import end_process_group

WORKER = Path(__file__).with_name("learner_equality_worker.py")
TOLERANCE = 1e-5
DEADLINE_S = 400


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_four_ranks_update_like_one_under_every_sharding_with_a_reference(
    tiny_qwen3_vl: Path, tmp_path: Path
) -> None:
    run_ranks(4, WORKER, tiny_qwen3_vl, tmp_path, deadline_s=DEADLINE_S)
    found = torch.load(tmp_path / "results.pt", weights_only=True)
    assert set(found) == set(VARIANTS | ADAPTED)
    for variants in (VARIANTS, ADAPTED):
        budget, settings = next(iter(variants.values()))
        wanted, weights = outcome(tiny_qwen3_vl, budget, settings)
        assert all(norm > 0.1 for _, norm in wanted)
        for name in variants:
            steps, theirs = found[name]
            for ours, others in zip(wanted, steps, strict=True):
                assert others == pytest.approx(ours, abs=TOLERANCE, rel=TOLERANCE), name
            torch.testing.assert_close(theirs, weights, atol=TOLERANCE, rtol=0, msg=name)
    end_process_group()
