"""What an engine server answers, checked: a sampler's word becomes training data here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from tapo_train.errors import EngineError, EngineLostError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.driver import require_complete
from tapo_train.rollout.engine import Completion, GenerationRequest
from tapo_train.rollout.servers.identity import Served, WeightNames, chat_identity
from tapo_train.types import VersionSpan

ROUNDING = 1e-3
"""[nat] by which a log-probability may exceed 0."""
LOWEST = -9999.0
"""[nat] What vLLM says instead of a log-probability that is not finite."""


@contextmanager
def understood() -> Iterator[None]:
    """Around what reads an answer that may be anything."""
    try:
        yield
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise EngineError(f"an answer nobody knows: {type(error).__name__}: {error}") from error


class Expected:
    """What answers may hold.

    Every method raises EngineError for what no honest server says, and EngineLostError for
    what has to be asked again.
    """

    def __init__(self, chat: ChatFormat, names: WeightNames) -> None:
        self._identity = chat_identity(chat)
        self._end = chat.end_token_id
        self._sampled = chat.sampled_ids
        self._names = names

    @understood()
    def served(self, body: bytes) -> Served:
        """What a server says of itself."""
        served = Served(**json.loads(body))
        if served.identity != self._identity:
            raise EngineError(
                "serves another model: its tokens, template, banned ids or pixels differ; "
                "wanted a server of the recipe's model.path"
            )
        return served

    @understood()
    def prompt(self, body: bytes, tokens: npt.NDArray[np.int32]) -> Any:
        """The answer to `tokens`, if the server expanded its pictures as we did."""
        answer = json.loads(body)
        found = np.array(answer["prompt_token_ids"], dtype=np.int32)
        if not np.array_equal(found, tokens):
            raise EngineError(
                f"another prompt than ours: {len(found)} tokens instead of {len(tokens)}, or "
                "others; it processes pictures in another way"
            )
        return answer

    @understood()
    def completion(self, body: bytes, request: GenerationRequest) -> Completion:
        """The completion of a request."""
        answer = self.prompt(body, request.tokens)
        (choice,) = answer["choices"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise EngineLostError(f"{request.id} was ended by {choice['finish_reason']!r}")
        entries = choice["logprobs"]["content"]
        if [entry["token_id"] for entry in entries] != choice["token_ids"]:
            raise EngineError(f"request {request.id}: log-probabilities of other tokens")
        details = answer["usage"]["prompt_tokens_details"] or {}
        completion = Completion(
            id=request.id,
            tokens=np.array(choice["token_ids"], dtype=np.int32),
            logprobs=_logprobs([entry["logprob"] for entry in entries]),
            finished=choice["finish_reason"],
            cached_tokens=int(details.get("cached_tokens") or 0),
            versions=self._versions(choice["weight_versions"]),
        )
        require_complete(completion, request, self._end)
        self._require_possible(completion, len(request.tokens))
        return completion

    @understood()
    def scores(self, body: bytes, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """[T-1] log-probabilities of tokens[1:] under the present weights."""
        answer = self.prompt(body, tokens)
        versions = self._versions(answer["choices"][0]["weight_versions"])
        pairs = zip(tokens[1:].tolist(), answer["prompt_logprobs"][1:], strict=True)
        scores = _logprobs([entry[str(token)]["logprob"] for token, entry in pairs])
        if {span.version for span in versions} != {self._names.number}:
            raise EngineLostError(f"scored by {versions}; wanted {self._names.present}")
        if not np.isfinite(scores).all():
            raise EngineError("a score that is not finite")
        return scores

    def _versions(self, spans: Any) -> tuple[VersionSpan, ...]:
        found = []
        for span in spans:
            version = self._names.version(span["version"])
            if version is None:
                raise EngineLostError(f"sampled by weights {span['version']}, not by this run's")
            found.append(VersionSpan(start=span["start"], end=span["end"], version=version))
        return tuple(found)

    def _require_possible(self, completion: Completion, prompt_length: int) -> None:
        name, spans = f"request {completion.id}", completion.versions
        starts, ends = [span.start for span in spans], [span.end for span in spans]
        if [*starts, len(completion.tokens)] != [0, *ends] or sorted(set(starts)) != starts:
            raise EngineError(f"{name}: weights are not named for each of its tokens: {spans}")
        # They are in order; `isin` would look at the whole vocabulary for each turn.
        nearest = self._sampled.take(np.searchsorted(self._sampled, completion.tokens), mode="clip")
        strange = completion.tokens[nearest != completion.tokens]
        if len(strange):
            raise EngineError(f"{name}: token {strange[0]} cannot be sampled")
        if completion.logprobs.max() > ROUNDING:
            raise EngineError(f"{name}: a log-probability of {completion.logprobs.max():g}")
        if not 0 <= completion.cached_tokens <= prompt_length:
            raise EngineError(
                f"{name}: {completion.cached_tokens} of {prompt_length} tokens were cached"
            )


def _logprobs(numbers: list[float]) -> npt.NDArray[np.float32]:
    """With what stands for a number that is not finite as one."""
    found = np.array(numbers, dtype=np.float32)
    return np.where(found <= LOWEST, -np.inf, found).astype(np.float32)
