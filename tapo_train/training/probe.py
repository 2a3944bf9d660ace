"""One turn, scored by engine and learner after every weight sync.

Two programs that hold the same policy differ by rounding: by 1e-5 nat in float32, by hundredths
in bf16, where a token that no policy samples (log-probability -20) is easily off by .3. So what
is judged are tokens that could be sampled: a turn that the engine wrote at the first sync, and
what of the prompt is probable. Four numbers say what is wrong:

- the mean and a high quantile of |engine - learner|: other pictures, positions, weights;
- the maximum, a loose alarm: one token alone;
- the lag, the share of the learner's change since the first sync that the engine has not made:
  0 if it follows, 1 if its weights or caches are stale. It needs a change that stands out of
  the rounding and no more, so in float32 it sees the smallest update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tapo_train.errors import ProbeError
from tapo_train.types import Image

Logprobs = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]

PROBABLE = -5.0
"""[nat] a token of the prompt is judged from here on, by either side."""
QUANTILE = 0.9
QUANTILE_FACTOR = 4.0
"""Times the limit of the mean: errors of tokens are about exponentially distributed, whose
quantile of .9 is 2.3 means."""
MAXIMUM_FACTOR = 50.0
MOVED_FACTOR = 4.0
"""The learner has moved when its change is so many times the differences at the first sync, both
as means over the tokens: rounding in the change then looks like a lag of a quarter."""
RESOLUTION = 1e-5
"""[nat] mean change below which float32 itself rounds too much to tell."""
LARGEST_LAG = 0.5
HINT = (
    "A stale cache, a weight that was not sent (a tied head?), other positions or different image "
    "preprocessing would explain it"
)


class Scorer(Protocol):
    """A learner or an engine."""

    def score(self, tokens: Tokens, images: Sequence[Image]) -> Logprobs:
        """[T - 1] log-probabilities of tokens[1:] at temperature 1, nothing banned."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What both sides score."""

    tokens: Tokens
    """[T] prompt and the sampled turn."""
    images: tuple[Image, ...]
    sampled_from: int
    """First token of the turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Log-probabilities of the same tokens."""

    learner: Logprobs
    engine: Logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far engine and learner are apart on the judged tokens."""

    mean: float
    """[nat]"""
    quantile: float
    """[nat] `QUANTILE` of the tokens differ by less."""
    maximum: float
    """[nat]"""
    lag: float | None
    """Share of the learner's change that the engine has not made; None while there is none."""

    def metrics(self) -> dict[str, float]:
        """By name, for a row of metrics; of several ranks the largest counts."""
        shown = {
            "probe/mean_abs_diff": self.mean,
            "probe/p90_abs_diff": self.quantile,
            "probe/max_abs_diff": self.maximum,
        }
        return shown if self.lag is None else shown | {"probe/lag": self.lag}


class Probe:
    """Compares engine and learner, and stops the run where they are two policies.

    Args:
        first_turn: samples what is scored, with the weights of the first sync; on all ranks
            together, with the same answer.
        unsampled: ids that are never sampled and so never judged.
        tolerance: [nat] largest mean difference.
    """

    def __init__(
        self, first_turn: Callable[[], Turn], *, unsampled: Sequence[int], tolerance: float
    ) -> None:
        self._first_turn = first_turn
        self._unsampled = np.array(unsampled)
        self._tolerance = tolerance
        self._turn: Turn | None = None
        self._first: Scores | None = None
        self._judged = np.zeros(0, dtype=np.bool_)

    def __call__(self, learner: Scorer, engine: Scorer, *, version: int) -> Agreement:
        """Score on both sides, on all ranks together.

        Raises:
            ProbeError: they differ by more than rounding explains.
        """
        turn = self._turn = self._turn or self._first_turn()
        whole = Scores(
            learner=learner.score(turn.tokens, turn.images),
            engine=engine.score(turn.tokens, turn.images),
        )
        if self._first is None:
            self._judged = could_be_sampled(turn, whole, self._unsampled)
        now = Scores(learner=whole.learner[self._judged], engine=whole.engine[self._judged])
        self._first = self._first or now
        found = compare(now, self._first)
        require(found, version=version, tolerance=self._tolerance)
        return found


def could_be_sampled(turn: Turn, scores: Scores, unsampled: Tokens) -> npt.NDArray[np.bool_]:
    """[T - 1] of tokens[1:]: the sampled turn, and what of the prompt either side finds probable.

    Args:
        unsampled: ids that are banned, such as the placeholders of pictures.
    """
    is_sampled = np.arange(1, len(turn.tokens)) >= turn.sampled_from
    is_probable = np.maximum(scores.learner, scores.engine) >= PROBABLE
    answer: npt.NDArray[np.bool_] = is_sampled | (
        is_probable & ~np.isin(turn.tokens[1:], unsampled)
    )
    return answer


def compare(now: Scores, first: Scores) -> Agreement:
    """Scores of the judged tokens [J], at this sync and at the first."""
    difference = np.abs(now.learner - now.engine)
    ours, theirs = now.learner - first.learner, now.engine - first.engine
    moved, rounding = float(np.abs(ours).mean()), np.abs(first.learner - first.engine).mean()
    lag = None
    if moved > max(MOVED_FACTOR * float(rounding), RESOLUTION):
        # Along the learner's change, token by token; sums of absolutes, as some tokens round
        # a hundred times worse than others.
        lag = 1.0 - float((np.sign(ours) * theirs).mean()) / moved
    return Agreement(
        mean=float(difference.mean()),
        quantile=float(np.quantile(difference, QUANTILE)),
        maximum=float(difference.max()),
        lag=lag,
    )


def require(found: Agreement, *, version: int, tolerance: float) -> None:
    """Raise ProbeError if engine and learner are further apart than `tolerance` [nat] allows."""
    where = f"probe: after the weight sync of version {version}, engine and learner"
    limits = (
        ("on average", found.mean, 1.0),
        ("or more at a tenth of the tokens", found.quantile, QUANTILE_FACTOR),
        ("at one token", found.maximum, MAXIMUM_FACTOR),
    )
    for which, value, factor in limits:
        if not value <= factor * tolerance:
            times = "" if factor == 1 else f"{factor:g} times "
            raise ProbeError(
                f"{where} log-probabilities differ by {value:.2g} nat {which}; wanted at most "
                f"{times}probe.tolerance = {tolerance:g}. {HINT}"
            )
    if found.lag is not None and not found.lag <= LARGEST_LAG:
        raise ProbeError(
            f"{where} log-probabilities move apart: the engine lacks {found.lag:.0%} of the "
            f"learner's change since the first sync; wanted at most {LARGEST_LAG:.0%}. {HINT}"
        )
