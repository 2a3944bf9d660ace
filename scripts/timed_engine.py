"""An `Engine` without a model: a written turn is there a given time after it was asked for."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from tapo_train.errors import EngineError
from tapo_train.rollout.engine import Completion, GenerationRequest
from tapo_train.types import Image

Reply = Callable[[GenerationRequest], tuple[npt.NDArray[np.int32], float]]
"""Tokens of the turn (end token included), and after how many seconds they are there."""


class TimedEngine:
    """Serves any number of requests at the same time and burns no CPU while it waits."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._due: list[tuple[float, str]] = []
        self._open: dict[str, npt.NDArray[np.int32]] = {}

    def submit(self, request: GenerationRequest) -> None:
        """See `Engine.submit`."""
        tokens, seconds = self._reply(request)
        self._open[request.id] = tokens
        heapq.heappush(self._due, (time.perf_counter() + seconds, request.id))

    def step(self) -> list[Completion]:
        """See `Engine.step`."""
        now, done = time.perf_counter(), []
        while self._due and self._due[0][0] <= now:
            id = heapq.heappop(self._due)[1]
            tokens = self._open.pop(id, None)
            if tokens is not None:
                logprobs = np.full(len(tokens), -1.0, dtype=np.float32)
                done.append(Completion(id=id, tokens=tokens, logprobs=logprobs, finished="stop"))
        return done

    def idle_s(self) -> float:
        """See `Engine.idle_s`."""
        return max(0.0, self._due[0][0] - time.perf_counter()) if self._due else math.inf

    def has_unfinished(self) -> bool:
        """See `Engine.has_unfinished`."""
        return bool(self._open)

    def capacity_tokens(self) -> int | None:
        """See `Engine.capacity_tokens`."""
        return None

    def abort(self, ids: Sequence[str]) -> None:
        """See `Engine.abort`."""
        for id in ids:
            self._open.pop(id, None)

    def score(
        self, tokens: npt.NDArray[np.int32], images: Sequence[Image]
    ) -> npt.NDArray[np.float32]:
        """See `Engine.score`."""
        raise EngineError("a timed engine has no probabilities")

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """See `Engine.load_weights`."""
        raise EngineError("a timed engine has no weights")

    def close(self) -> None:
        """See `Engine.close`."""
        self._open.clear()
