"""The slow reference: a plain sampling loop over the Hugging Face model.

One request at a time, keys and values cached within a request only. It shares no code
with the fast engine except the chat format, so agreement of the two means something.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch.nn.functional import linear

from tapo_train.errors import EngineError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.engine import Completion, GenerationRequest, Sampling
from tapo_train.types import Image


class HfEngine:
    """The `Engine` protocol with `transformers`; each step serves one whole request.

    Args:
        seed: of the shared stream, for requests without a seed of their own.
    """

    def __init__(
        self,
        chat: ChatFormat,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self._chat = chat
        self._device = device
        self._model: Any = getattr(transformers, chat.family.auto_class).from_pretrained(
            chat.model, dtype=dtype
        )
        self._model.to(device).eval()
        self._banned = torch.tensor(chat.banned_token_ids, device=device)
        self._shared = torch.Generator(device).manual_seed(seed)
        self._queue: deque[GenerationRequest] = deque()
        self.version = 0

    def submit(self, request: GenerationRequest) -> None:
        """See `Engine.submit`."""
        if any(request.id == queued.id for queued in self._queue):
            raise EngineError(f"request {request.id} is in flight already")
        self._queue.append(request)

    def step(self) -> list[Completion]:
        """See `Engine.step`."""
        return [self._generate(self._queue.popleft())] if self._queue else []

    def has_unfinished(self) -> bool:
        """See `Engine.has_unfinished`."""
        return bool(self._queue)

    def idle_s(self) -> float:
        """See `Engine.idle_s`."""
        return 0.0

    def capacity_tokens(self) -> int | None:
        """See `Engine.capacity_tokens`: requests are served one by one."""
        return None

    def abort(self, ids: Sequence[str]) -> None:
        """See `Engine.abort`."""
        dropped = frozenset(ids)
        self._queue = deque(request for request in self._queue if request.id not in dropped)

    def score(
        self, tokens: npt.NDArray[np.int32], images: Sequence[Image]
    ) -> npt.NDArray[np.float32]:
        """See `Engine.score`."""
        logits = self.logits(tokens, images)[:-1]
        chosen = torch.from_numpy(tokens[1:]).long().to(logits.device)
        logprobs = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
        scored: npt.NDArray[np.float32] = logprobs.cpu().numpy()
        return scored

    @torch.inference_mode()
    def logits(self, tokens: npt.NDArray[np.int32], images: Sequence[Image]) -> torch.Tensor:
        """[T, V] raw logits in float32, from one pass without a cache."""
        return self._logits(self._prefilled(tokens, images, use_cache=False))

    def processed(self, logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        """[..., V] log-probabilities of the distribution that is sampled from."""
        logits = logits.index_fill(-1, self._banned, -torch.inf)
        if not sampling.is_greedy:
            logits = logits / sampling.temperature
        return _keep_top(logits, sampling).log_softmax(-1)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """See `Engine.load_weights`."""
        if self._queue:
            raise EngineError(f"load_weights needs an idle engine; {len(self._queue)} in flight")
        given = dict(weights)
        if any(".experts." in name for name in given):
            # As they are saved, one by one; transformers keep them stacked.
            kind, config = type(self._model), self._model.config
            loaded = kind.from_pretrained(None, config=config, state_dict=given)
            given = loaded.state_dict()
        differing = sorted(given.keys() ^ self._model.state_dict().keys())
        if differing:
            raise EngineError(
                f"weights do not fit {self._chat.model}: {len(differing)} names are missing "
                f"or unknown, the first is {differing[0]}"
            )
        self._model.load_state_dict(given)
        self.version = version

    def close(self) -> None:
        """See `Engine.close`."""
        del self._model

    @torch.inference_mode()
    def _generate(self, request: GenerationRequest) -> Completion:
        generator = self._generator(request)
        output = self._prefilled(request.tokens, request.images, use_cache=True)
        tokens: list[int] = []
        logprobs: list[float] = []
        while True:
            scores = self.processed(self._logits(output, last=1)[0], request.sampling)
            token = _draw(scores, request.sampling, generator)
            tokens.append(token)
            logprobs.append(float(scores[token]))
            if token == self._chat.end_token_id or len(tokens) == request.max_tokens:
                break
            output = self._model.model(
                input_ids=torch.tensor([[token]], device=self._device),
                past_key_values=output.past_key_values,
                use_cache=True,
            )
        return Completion(
            id=request.id,
            tokens=np.array(tokens, dtype=np.int32),
            logprobs=np.array(logprobs, dtype=np.float32),
            finished="stop" if tokens[-1] == self._chat.end_token_id else "length",
        )

    def _generator(self, request: GenerationRequest) -> torch.Generator:
        seed = request.sampling.request_seed(request.id)
        return self._shared if seed is None else torch.Generator(self._device).manual_seed(seed)

    def _logits(self, output: Any, *, last: int = 0) -> torch.Tensor:
        """[T, V] raw logits in float32 whatever the model's type; of the `last` tokens, 0: all."""
        hidden = output.last_hidden_state[0, -last:]
        return linear(hidden.float(), self._model.lm_head.weight.float())

    def _prefilled(
        self, tokens: npt.NDArray[np.int32], images: Sequence[Image], *, use_cache: bool
    ) -> Any:
        """What the model without its head makes of a prompt, from one pass."""
        ids = torch.from_numpy(tokens).long().to(self._device)[None]
        pixels = {key: value.to(self._device) for key, value in self._chat.pixels(images).items()}
        types = (ids == self._chat.image_token_id).long()
        body = self._model.model
        beside = self._chat.family.prompt_inputs(body, ids, types, pixels)
        return body(input_ids=ids, use_cache=use_cache, **beside)


def _draw(scores: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.is_greedy:
        return int(scores.argmax())
    return int(torch.multinomial(scores.exp(), 1, generator=generator))


def _keep_top(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """-inf outside the `top_k` largest and outside the smallest set of mass `top_p`."""
    if sampling.top_k:
        threshold = logits.topk(min(sampling.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        mass = ordered.softmax(-1)
        outside = mass.cumsum(-1) - mass >= sampling.top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits
