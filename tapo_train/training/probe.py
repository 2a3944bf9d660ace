"""One prompt, scored by engine and learner after every weight sync."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tapo_train.errors import ProbeError

Logprobs = npt.NDArray[np.float32]


def require_agreement(ours: Logprobs, theirs: Logprobs, *, version: int, tolerance: float) -> float:
    """The largest difference [nat] of the learner's and the engine's log-probabilities [T - 1].

    Raises:
        ProbeError: it is more than `tolerance`, or not a number.
    """
    difference = np.abs(ours - theirs)
    drift = float(difference.max())
    if not drift <= tolerance:
        raise ProbeError(
            f"probe: after the weight sync of version {version}, engine and learner "
            f"log-probabilities differ by {drift:.2g} nat at token "
            f"{int(difference.argmax()) + 1}; wanted at most probe.tolerance = {tolerance}. "
            "A stale cache, a weight that was not sent (a tied head?) or different image "
            "preprocessing would explain it"
        )
    return drift
