"""An `Engine` that replays written turns: for everything that is not about a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from tapo_train.errors import EngineError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.engine import Completion, GenerationRequest
from tapo_train.types import Image

Script = Callable[[GenerationRequest], str]
"""What the policy writes in reply to a request (without the end token)."""


@dataclass
class ScriptedEngine:
    """Writes each turn `steps` steps after it was asked for, all requests side by side.

    The log-probability of the k-th token of a turn is -(k + 1) / 1000.
    """

    chat: ChatFormat
    script: Script
    steps: int = 1
    requests: list[GenerationRequest] = field(default_factory=list)
    most_in_flight: int = 0
    num_steps: int = 0
    aborted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._left: dict[str, tuple[GenerationRequest, int]] = {}

    def submit(self, request: GenerationRequest) -> None:
        if request.id in self._left:
            raise EngineError(f"request {request.id} is in flight already")
        self.requests.append(request)
        self._left[request.id] = (request, self.steps)
        self.most_in_flight = max(self.most_in_flight, len(self._left))

    def step(self) -> list[Completion]:
        self.num_steps += 1
        self._left = {id: (request, left - 1) for id, (request, left) in self._left.items()}
        done = [request for request, left in self._left.values() if left == 0]
        for request in done:
            del self._left[request.id]
        return [self._completion(request) for request in done]

    def has_unfinished(self) -> bool:
        return bool(self._left)

    def idle_s(self) -> float:
        return 0.0

    def capacity_tokens(self) -> int | None:
        return None

    def abort(self, ids: Sequence[str]) -> None:
        self.aborted += [id for id in ids if self._left.pop(id, None) is not None]

    def score(
        self, tokens: npt.NDArray[np.int32], images: Sequence[Image]
    ) -> npt.NDArray[np.float32]:
        raise EngineError("a scripted engine has no probabilities")

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        raise EngineError("a scripted engine has no weights")

    def close(self) -> None:
        self._left.clear()

    def _completion(self, request: GenerationRequest) -> Completion:
        tokens = self.chat.assistant(self.script(request))
        cut = len(tokens) > request.max_tokens
        tokens = tokens[: request.max_tokens]
        logprobs = -(np.arange(len(tokens)) + 1) / 1000
        return Completion(
            id=request.id,
            tokens=tokens,
            logprobs=logprobs.astype(np.float32),
            finished="length" if cut else "stop",
        )


def turn_of(request: GenerationRequest) -> int:
    """Which turn of its trajectory a request asks for."""
    return int(request.id.rpartition(":")[2])
