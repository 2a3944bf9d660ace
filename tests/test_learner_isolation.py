"""A model whose packed rows see each other is refused before anything is learned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_rows import make_policy
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tapo_train.build.learner import PACKED_TEXTS
from tapo_train.errors import ConfigError
from tapo_train.learner import attention
from tapo_train.learner.attention import Boundaries
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.isolation import TOLERANCE, require_isolation
from tapo_train.learner.policy import Policy
from tapo_train.rollout.chat import ChatFormat

KINDS = [
    ("tiny_qwen3_vl", "fp32"),
    ("tiny_qwen3_vl", "bf16"),
    ("tiny_qwen2_5_vl", "fp32"),
    ("tiny_qwen2_5_vl", "bf16"),
]


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    yield
    end_process_group()


@pytest.fixture(params=KINDS, ids="-".join)
def policy(request: pytest.FixtureRequest) -> Iterator[Policy]:
    family, precision = request.param
    folder = request.getfixturevalue(family)
    made = make_policy(folder, ChatFormat(folder), precision=precision, temperature=0.1)
    yield made
    made.close()


def texts(folder: Path) -> list[np.ndarray]:
    chat = ChatFormat(folder)
    return [chat.plain(text) for text in PACKED_TEXTS]


def one_row(real: Any) -> Any:
    """Attention that takes what is packed for one long row."""

    def leaking(*args: Any, boundaries: Boundaries, **kwargs: Any) -> Any:
        whole = Boundaries.of([0, boundaries.ends[-1]], torch.device("cpu"))
        return real(*args, boundaries=whole, **kwargs)

    return leaking


def test_rows_that_see_each_other_are_refused_with_the_models_type(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = texts(policy.source)
    require_isolation(policy, asked)
    leaking = one_row(ALL_ATTENTION_FUNCTIONS[attention.PACKED])
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, attention.PACKED, leaking)
    kind = policy.model.config.model_type
    words = f"model of type '{kind}' whose rows see each other .* wanted at most "
    with pytest.raises(ConfigError, match=words + f"{TOLERANCE[policy.settings.precision]:g}"):
        require_isolation(policy, asked)
