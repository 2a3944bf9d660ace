"""What a sampler is: token ids and pictures in, token ids and log-probabilities out.

`Engine` is driven by one thread: submit what is ready, `step()`, hand the finished
completions to their owners, repeat. Nothing here imports an inference library.

The sampled distribution is  softmax(masked logits / temperature)  with the ids in
`ChatFormat.banned_token_ids` at -inf. `Completion.logprobs` are log-probabilities of
exactly that distribution, so a learner reproduces them by masking the same ids and
dividing by the same temperature; top_p or top_k cut the distribution further and
cannot be reproduced from the token alone, which is what `Sampling.is_exact` says.
"""

from __future__ import annotations

import zlib
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from tapo_train.errors import ConfigError, EngineError
from tapo_train.types import Image, VersionSpan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0
    """0 is greedy; log-probabilities are then those at temperature 1."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]; 1 is off."""
    top_k: int = 0
    """Number of candidates; 0 is off."""
    seed: int | None = None
    """With a seed each request draws from its own stream, derived from its id; None
    draws from the engine's shared stream (faster, depends on the order of requests)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"sampling.temperature is {self.temperature}; wanted in [0, 2]")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p is {self.top_p}; wanted in (0, 1]")
        if self.top_k < 0:
            raise ConfigError(f"sampling.top_k is {self.top_k}; wanted >= 0 (0 is off)")

    @property
    def is_greedy(self) -> bool:
        """True if the most probable token is always taken."""
        return self.temperature == 0

    @property
    def is_exact(self) -> bool:
        """True if a learner can recompute the sampled distribution."""
        return not self.is_greedy and self.top_p == 1 and self.top_k == 0

    def request_seed(self, request: str) -> int | None:
        """Seed of one request in [0, 2^32), the same in every process; None without a seed."""
        return None if self.seed is None else zlib.crc32(f"{self.seed}:{request}".encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Continue one token sequence."""

    id: str
    """Unique among the requests in flight."""
    tokens: npt.NDArray[np.int32] = field(repr=False)
    """[T] image placeholders EXPANDED, one id per image feature."""
    images: tuple[Image, ...]
    """In order of their placeholders."""
    max_tokens: int
    """Most tokens to sample, the end token included."""
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What was sampled for one request."""

    id: str
    tokens: npt.NDArray[np.int32] = field(repr=False)
    """[L] the end token included if it was sampled."""
    logprobs: npt.NDArray[np.float32] = field(repr=False)
    """[L] of the sampled distribution (see the module docstring)."""
    finished: Literal["stop", "length"]
    """"stop": the end token was sampled; "length": `max_tokens` were sampled without it."""
    cached_tokens: int = 0
    """Tokens of the request whose keys and values were reused."""
    versions: tuple[VersionSpan, ...] = ()
    """Which weights sampled which tokens, in order, covering [0, L). () means all by the weights
    that were loaded last: what an engine says whose weights never change under a request."""


def require_admissible(
    request: GenerationRequest, in_flight: Container[str], *, max_model_len: int
) -> None:
    """Raise EngineError if a request is in flight already, or longer than the engine takes."""
    if request.id in in_flight:
        raise EngineError(f"request {request.id} is in flight already")
    if len(request.tokens) + request.max_tokens > max_model_len:
        raise EngineError(
            f"request {request.id}: {len(request.tokens)} tokens and {request.max_tokens} "
            f"to sample exceed max_model_len = {max_model_len}"
        )


@runtime_checkable
class Sleeper(Protocol):
    """An engine that can give the device's memory back between rollouts."""

    def sleep(self) -> None:
        """Give it back, the weights' too; nothing may be in flight. Asleep already: no effect."""
        ...

    def wake(self) -> None:
        """Take it again; `load_weights` must follow before anything is asked. Awake: no effect."""
        ...


class Engine(Protocol):
    """A sampler with the policy's current weights."""

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises:
            AlignmentError: image placeholders and image features disagree.
            EngineError: the id is in flight already, or the request cannot be served.
        """
        ...

    def step(self) -> list[Completion]:
        """Run one iteration; return the completions that ended in it."""
        ...

    def has_unfinished(self) -> bool:
        """True while a submitted request has not been returned by `step`."""
        ...

    def idle_s(self) -> float:
        """[s] for which `step` will return nothing, unless something is submitted.

        0 for an engine that computes in `step`. One that works elsewhere says when to look
        again, so that its driver sleeps and lets the tools work instead of asking.
        """
        ...

    def capacity_tokens(self) -> int | None:
        """Tokens whose keys and values fit at the same time; None if there is no such limit."""
        ...

    def abort(self, ids: Sequence[str]) -> None:
        """Drop requests: `step` will not return them. Ids that are not in flight are ignored."""
        ...

    def score(
        self, tokens: npt.NDArray[np.int32], images: Sequence[Image]
    ) -> npt.NDArray[np.float32]:
        """[T-1] log-probabilities of tokens[1:] under the RAW model.

        Temperature 1 and nothing banned: the frame the learner's probe uses.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Take the learner's tensors and forget every cache.

        Names are those of the Hugging Face module's `named_parameters()`, which for
        Qwen2.5-VL are not those of the saved file. A tied `lm_head.weight` must be sent
        under its own name as well.

        Raises:
            EngineError: requests are in flight, or the weights do not fit.
        """
        ...

    def close(self) -> None:
        """Give back memory and process groups; the engine cannot be used afterwards."""
        ...
