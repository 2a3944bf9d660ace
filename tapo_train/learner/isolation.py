"""Do rows see only themselves when they are packed? Asked once, before anything is learned.

Attention keeps to the boundaries of rows (`attention.py`). A layer that mixes tokens in another
way (a convolution, a recurrent state) knows none, and every row behind another would be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tapo_train.errors import ConfigError
from tapo_train.learner import distributed
from tapo_train.learner.batch import TrainingRow, join
from tapo_train.learner.policy import Policy
from tapo_train.learner.scorer import RAW
from tapo_train.types import Span

TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}
"""[nat] mean difference that rounding may explain where a longer sequence is summed otherwise; on a
CPU there is next to none. Rows that see those before them are off by .13 in a random model of two
layers and by 2.4 in a trained one."""


def require_isolation(policy: Policy, texts: Sequence[npt.NDArray[np.int32]]) -> None:
    """Score rows packed together and alone, on all ranks together.

    Args:
        texts: [T] tokens of each row, none of them a picture's; two rows or more.

    Raises:
        ConfigError: they differ by more than rounding, on some rank.
    """
    rows = [
        TrainingRow.supervised(
            id=f"text {number}", tokens=tokens, images=(), spans=(Span(start=1, end=len(tokens)),)
        )
        for number, tokens in enumerate(texts)
    ]
    batches = [join(rows), *(join([row]) for row in rows)]
    packed, *alone = policy.logprobs_of_all(batches, distribution=RAW)
    apart = packed.numpy() - np.concatenate([logprobs.numpy() for logprobs in alone])
    # The same on all ranks but for rounding; agreed, so that none goes on without the others.
    found = max(distributed.all_gather_objects(float(np.abs(apart).mean())))
    tolerance = TOLERANCE[policy.settings.precision]
    if not found <= tolerance:
        raise ConfigError(
            f"model.path: found a model of type {policy.model.config.model_type!r} whose rows see "
            f"each other when they are packed: log-probabilities are {found:.2g} nat from those of "
            f"each row alone, on average; wanted at most {tolerance:g}, as of a model whose tokens "
            "meet in attention only"
        )
