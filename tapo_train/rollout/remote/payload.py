"""Requests and completions as frames, and back."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tapo_train.errors import EngineLostError
from tapo_train.rollout.engine import Completion, GenerationRequest, Sampling
from tapo_train.rollout.remote.messages import Completed, PolicyId, Submit
from tapo_train.types import Image


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


def completion_of(message: Completed, body: bytearray, *, peer: str) -> Completion:
    """The completion a server meant: half the body is tokens, half log-probabilities."""
    if len(body) % 8:
        raise EngineLostError(f"{peer}: a completion of {len(body)} bytes; wanted pairs of 4")
    half = len(body) // 2
    return Completion(
        id=message.id,
        tokens=int32(body[:half]),
        logprobs=float32(body[half:]),
        finished=message.finished,
        cached_tokens=message.cached_tokens,
    )


def int32(body: bytearray) -> npt.NDArray[np.int32]:
    """Numbers of a body; a tail of fewer than four bytes is refused by numpy."""
    return np.frombuffer(body, dtype="<i4").astype(np.int32, copy=False)


def float32(body: bytearray) -> npt.NDArray[np.float32]:
    """Numbers of a body."""
    return np.frombuffer(body, dtype="<f4").astype(np.float32, copy=False)


def raw(numbers: npt.NDArray[Any], kind: Literal["<i4", "<f4"]) -> bytes:
    """Numbers as a body."""
    return numbers.astype(kind, copy=False).tobytes()
