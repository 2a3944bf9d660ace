"""A frozen vision tower stays as it is, and the rest is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learner_rows import make_policy, some_rows, weights_of

from tapo_train.learner.batch import join, pack
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.objective import supervised
from tapo_train.rollout.chat import ChatFormat


@pytest.mark.parametrize(("is_frozen", "zero_stage"), [(True, 0), (True, 2), (False, 2)])
def test_an_update_changes_the_vision_tower_unless_it_is_frozen(
    tiny_qwen3_vl: Path, is_frozen: bool, zero_stage: int
) -> None:
    chat = ChatFormat(tiny_qwen3_vl)
    policy = make_policy(tiny_qwen3_vl, chat, freeze_vision=is_frozen, zero_stage=zero_stage)
    before = weights_of(policy)
    policy.update(pack(some_rows(chat, policy.layout), budget_tokens=4096), supervised)
    after = weights_of(policy)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    policy.close()
    end_process_group()
    assert any("visual" in name for name in changed) != is_frozen
    assert any("language_model" in name for name in changed)


def test_every_micro_batch_is_a_sign_of_life(tiny_qwen3_vl: Path) -> None:
    chat, beats = ChatFormat(tiny_qwen3_vl), []
    policy = make_policy(tiny_qwen3_vl, chat, on_progress=lambda: beats.append(1))
    rows = some_rows(chat, policy.layout)
    batches = [join(rows[:1]), join(rows[1:2]), join(rows[2:])]
    policy.update(batches, supervised)
    assert len(beats) == 3
    policy.logprobs_of_all(batches[:2])
    assert len(beats) == 5
    policy.close()
