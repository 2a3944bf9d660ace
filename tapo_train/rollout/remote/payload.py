"""Requests and completions as frames, and back."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tapo_train.errors import EngineError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.driver import require_complete
from tapo_train.rollout.engine import Completion, GenerationRequest, Sampling
from tapo_train.rollout.remote.messages import Completed, PolicyId, Submit
from tapo_train.types import Image

ROUNDING = 1e-3
"""[nat] by which a log-probability may exceed 0."""


def submit_message(request: GenerationRequest, policy: PolicyId) -> Submit:
    """A request as it is sent; its tokens are the body."""
    sampling = request.sampling
    return Submit(
        id=request.id,
        policy=policy,
        images=tuple(image.sha256 for image in request.images),
        max_tokens=request.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
    )


def request_of(message: Submit, body: bytearray, images: tuple[Image, ...]) -> GenerationRequest:
    """The request a client meant."""
    return GenerationRequest(
        id=message.id,
        tokens=int32(body),
        images=images,
        max_tokens=message.max_tokens,
        sampling=Sampling(
            temperature=message.temperature,
            top_p=message.top_p,
            top_k=message.top_k,
            seed=message.seed,
        ),
    )


class Expected:
    """What a completion may hold: the ids that can be sampled, with log-probabilities of them."""

    def __init__(self, chat: ChatFormat) -> None:
        self._end = chat.end_token_id
        self._sampled = chat.sampled_ids

    def completion(
        self, message: Completed, body: bytearray, request: GenerationRequest
    ) -> Completion:
        """The completion a server meant: half the body is tokens, half log-probabilities.

        Raises:
            EngineError: it is none that the engine of an honest server gives.
        """
        if len(body) % 8:
            raise EngineError(f"a completion of {len(body)} bytes; wanted pairs of 4")
        half = len(body) // 2
        tokens, logprobs = int32(body[:half]), float32(body[half:])
        completion = Completion(
            id=message.id,
            tokens=tokens,
            logprobs=logprobs,
            finished=message.finished,
            cached_tokens=message.cached_tokens,
        )
        require_complete(completion, request, self._end)
        strange = tokens[~np.isin(tokens, self._sampled)]
        if len(strange):
            raise EngineError(f"request {request.id}: token {strange[0]} cannot be sampled")
        if logprobs.max() > ROUNDING:
            raise EngineError(f"request {request.id}: a log-probability of {logprobs.max():g}")
        if message.cached_tokens > len(request.tokens):
            raise EngineError(
                f"request {request.id}: {message.cached_tokens} of {len(request.tokens)} tokens "
                "were cached"
            )
        return completion


def scores_of(body: bytearray, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """The scores a server meant; EngineError if they are not one per token but the first."""
    if len(body) != 4 * (len(tokens) - 1):
        raise EngineError(f"scores of {len(body)} bytes; wanted 4 for each of {len(tokens) - 1}")
    return float32(body)


def int32(body: bytearray) -> npt.NDArray[np.int32]:
    """Numbers of a body; a tail of fewer than four bytes is refused by numpy."""
    return np.frombuffer(body, dtype="<i4").astype(np.int32, copy=False)


def float32(body: bytearray) -> npt.NDArray[np.float32]:
    """Numbers of a body."""
    return np.frombuffer(body, dtype="<f4").astype(np.float32, copy=False)


def raw(numbers: npt.NDArray[Any], kind: Literal["<i4", "<f4"]) -> bytes:
    """Numbers as a body."""
    return numbers.astype(kind, copy=False).tobytes()
