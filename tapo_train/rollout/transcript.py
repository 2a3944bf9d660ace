"""The append-only token list of one trajectory, with what lies over it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tapo_train.rollout.chat import Tokens
from tapo_train.rollout.engine import Completion
from tapo_train.types import Image, Span, Turn


class Transcript:
    """The append-only token list of one trajectory, with what lies over it."""

    def __init__(self, prompt: Tokens, images: tuple[Image, ...], *, capacity: int) -> None:
        self._buffer = np.empty(capacity, dtype=np.int32)
        self._length = 0
        self._logprobs: list[npt.NDArray[np.float32]] = []
        self.images = images
        self.turns: list[Turn] = []
        self._append(prompt)

    @property
    def tokens(self) -> Tokens:
        """[T] a view; what was written is never changed."""
        return self._buffer[: self._length]

    @property
    def logprobs(self) -> npt.NDArray[np.float32]:
        """Log-probabilities of all sampled tokens, in order."""
        return np.concatenate([np.empty(0, dtype=np.float32), *self._logprobs])

    @property
    def room(self) -> int:
        """How many tokens may still be appended."""
        return len(self._buffer) - self._length

    def append_sampled(self, completion: Completion) -> Span:
        """Append a turn's tokens; returns where they lie."""
        self._logprobs.append(completion.logprobs)
        return self._append(completion.tokens)

    def append_observation(self, tokens: Tokens, images: tuple[Image, ...]) -> Span:
        """Append an observation and register its pictures; returns where it lies."""
        self.images += images
        return self._append(tokens)

    def _append(self, tokens: Tokens) -> Span:
        start, end = self._length, self._length + len(tokens)
        self._buffer[start:end] = tokens
        self._length = end
        return Span(start=start, end=end)
