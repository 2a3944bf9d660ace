"""One engine server as a trainer knows it: what vLLM's routes are used for.

    nothing comes back, HTTP 5xx, aborted, others' weights    lost: greeted until it is there again
    another model, HTTP 4xx, an answer that cannot be right   forsaken: not asked again

Both are EngineLostError for the request, which is asked elsewhere.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from tapo_train.errors import EngineError, EngineLostError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.engine import Completion, GenerationRequest
from tapo_train.rollout.servers.answers import Expected, understood
from tapo_train.rollout.servers.client import Body, Client, ServerFailedError
from tapo_train.rollout.servers.gate import SERVED_PATH
from tapo_train.rollout.servers.identity import TORN, Served
from tapo_train.rollout.vllm_settings import bans, sampling_parameters
from tapo_train.types import Image

ONE_TOKEN = {"max_tokens": 1, "detokenize": False}
"""Of an answer that nobody reads."""
BEFORE_ALL = -1
"""Priority of scores: the learner waits for them after each change of weights, and behind answers
whose keys and values are computed anew it would wait long."""
LOADING_S = 1800.0
"""[s] a server may take over new weights; one that dies meanwhile is noticed at once."""


@dataclass(slots=True, eq=False)
class Seat:
    """One of the engines behind a server's port."""

    server: EngineServer
    replica: int
    load: int = 0
    """Requests of this trainer under way there."""


class EngineServer:
    """A server, the weights it holds, and why it cannot be used if that is so."""

    def __init__(self, url: str, client: Client, chat: ChatFormat, expected: Expected) -> None:
        self.url = url
        self.weights: str | None = None
        """Name of the weights it holds; None: unknown, and not to be used."""
        self.served: Served | None = None
        self.seats: tuple[Seat, ...] = ()
        self.problem = "no answer yet"
        self.is_forsaken = False
        self.is_changing = False
        """Its weights are being replaced."""
        self._client = client
        self._chat = chat
        self._expected = expected
        self._bias = bans(chat)
        self._known: set[str] = set()
        """Pictures it was given, by their hash."""
        self._wanted: Counter[str] = Counter()
        """The same of pictures of requests under way, and in how many of them each is."""
        self._uploads: dict[str, asyncio.Task[None]] = {}
        self._lives = 0

    @property
    def name(self) -> str:
        """Another one after it went away."""
        return f"{self.url}#{self._lives}"

    @property
    def devices(self) -> int:
        """Of all its engines together; 0 before it introduced itself."""
        return 0 if self.served is None else self.served.devices

    async def greet(self) -> None:
        """See that its engines live, what it serves and which weights it holds."""
        known = self.weights
        with self._judged(), understood():
            served = self._expected.served(await self._client.ask("GET", SERVED_PATH))
            held = json.loads(await self._client.ask("GET", "/weight_info"))["weight_version"]
        if len(self.seats) != served.replicas:
            self.seats = tuple(Seat(server=self, replica=k) for k in range(served.replicas))
        self.served = served
        # Weights that changed meanwhile are newer than its answer.
        if self.weights == known and not (self.is_changing or self.is_forsaken):
            self.weights = str(held)

    async def generate(self, request: GenerationRequest, replica: int) -> Completion:
        """The completion of a request."""
        parameters = sampling_parameters(request, end=self._chat.end_token_id, bias=self._bias)
        with self._judged():
            body = await self._sample(
                request.id, request.tokens, request.images, parameters, replica
            )
            return self._expected.completion(body, request)

    async def score(
        self, tokens: npt.NDArray[np.int32], images: Sequence[Image], replica: int
    ) -> npt.NDArray[np.float32]:
        """[T-1] log-probabilities of tokens[1:] under the raw model."""
        parameters = {"temperature": 0.0, "prompt_logprobs": 0, **ONE_TOKEN}
        with self._judged():
            body = await self._sample(
                "score", tokens, images, parameters, replica, priority=BEFORE_ALL
            )
            return self._expected.scores(body, tokens)

    async def pause(self) -> None:
        """Stop in the middle of answers, so that the weights can be replaced.

        Whoever asks before `resume` waits. Should this trainer die meanwhile, nobody takes what
        the server holds for anybody's weights.
        """
        self.is_changing, self.weights = True, None
        # Behind several engines pictures are kept in a way in which vLLM cannot read them again
        # for an answer under way (see launch.py): such a server finishes its answers first.
        mode, read_s = ("keep", None) if len(self.seats) == 1 else ("wait", LOADING_S)
        with self._judged():
            # Or the server would forget every picture at each change of weights.
            path = f"/pause?mode={mode}&clear_cache=false"
            await self._client.ask("POST", path, read_s=read_s)
            await self._client.ask("POST", "/update_weight_version", {"new_version": TORN})

    async def load(self, path: str, body: Body) -> None:
        """A step of taking weights; EngineError if the server lives and does not want them."""
        with self._judged():
            try:
                await self._client.ask("POST", path, body, read_s=LOADING_S)
                return
            except ServerFailedError as error:
                await self._client.ask("GET", "/health")
                problem = f"{self.url}: did not take the weights: {error}"
        self._give_up(EngineLostError(problem))
        raise EngineError(problem)

    async def resume(self, weights: str) -> None:
        """Go on with new weights, and with nothing that was computed with the old ones.

        The keys and values of answers under way are computed anew, so that each of their tokens
        is sampled by the weights it names and by no others. Processed pictures stay, as no
        weight took part in them.
        """
        with self._judged():
            path = "/reset_prefix_cache?reset_running_requests=true"
            if not json.loads(await self._client.ask("POST", path))["success"]:
                raise EngineError("keeps keys and values of the old weights")
            await self._client.ask("POST", "/reset_encoder_cache")
            await self._client.ask("POST", "/update_weight_version", {"new_version": weights})
        await self.go_on()
        self.is_changing, self.weights = False, weights

    async def go_on(self) -> None:
        """Answer again, if it was paused."""
        with self._judged():
            await self._client.ask("POST", "/resume")

    async def close(self) -> None:
        """Hang up. The server goes on; it belongs to whoever started it."""
        await self._client.close()

    async def _sample(
        self,
        id: str,
        tokens: npt.NDArray[np.int32],
        images: Sequence[Image],
        parameters: Body,
        replica: int,
        *,
        priority: int = 0,
    ) -> bytes:
        """The answer to a request, whose pictures are sent in full where the server lacks them."""
        named = {image.sha256 for image in images}
        self._wanted.update(named)
        try:
            whole = await self._carried(images, replica)
            collapsed = self._chat.collapse(tokens)
            ask = partial(
                self._infer, id, collapsed, images, parameters, replica, priority=priority
            )
            try:
                answer = await ask(whole)
            except EngineError as error:
                # An HTTP status, as it says that it forgot a picture, among other things.
                if not images or type(error) is EngineLostError:
                    raise
                answer = await ask(named)
        finally:
            self._wanted -= Counter(named)
        self._known |= named
        return answer

    async def _carried(self, images: Sequence[Image], replica: int) -> set[str]:
        """Which pictures a request carries in full: those that the server lacks and it alone has.

        One that others have as well goes ahead of them all, once, as they must not wait for the
        answer of whichever carries it.
        """
        if all(image.sha256 in self._known for image in images):
            return set()
        await asyncio.sleep(0)  # the others of a group come together with this one
        new = {image.sha256: image for image in images if image.sha256 not in self._known}
        shared = [name for name in new if self._wanted[name] > 1 or name in self._uploads]
        await asyncio.gather(*(self._give(new[name], replica) for name in shared))
        return new.keys() - set(shared)

    async def _infer(
        self,
        id: str,
        tokens: list[int],
        images: Sequence[Image],
        parameters: Body,
        replica: int,
        whole: Set[str],
        *,
        priority: int = 0,
    ) -> bytes:
        """However long it takes: `greet` sees whether the server still lives."""
        parts = [_part(image, whole=image.sha256 in whole) for image in images]
        body = {
            # A request that was given up here may still be under way when it is asked again.
            "request_id": f"{id}@{uuid4().hex[:8]}",
            "token_ids": tokens,
            "content_parts": parts or None,
            "sampling_params": parameters,
            "return_token_ids": True,
            "priority": priority,
        }
        engine = {"X-data-parallel-rank": str(replica)} if len(self.seats) > 1 else None
        path = "/inference/v1/generate"
        return await self._client.ask("POST", path, body, read_s=math.inf, headers=engine)

    async def _give(self, image: Image, replica: int) -> None:
        """Have the server know a picture, which is sent once however many requests wait for it."""
        name = image.sha256
        if name not in self._uploads:
            self._uploads[name] = asyncio.create_task(self._upload(image, replica))
        # The request that came first may be aborted; the picture is still wanted.
        await asyncio.shield(self._uploads[name])

    async def _upload(self, image: Image, replica: int) -> None:
        tokens, name = self._chat.picture_tokens, image.sha256
        answer = await self._infer("picture", tokens.tolist(), [image], ONE_TOKEN, replica, {name})
        self._expected.prompt(answer, self._chat.expand(tokens, [image]))
        self._known.add(name)

    @contextmanager
    def _judged(self) -> Iterator[None]:
        """Around what is asked of the server; whoever sees first that it failed says so."""
        life = self._lives
        try:
            yield
        except EngineError as error:
            if life == self._lives:
                self._give_up(error)
            raise EngineLostError(f"{self.url}: {self.problem}") from error

    def _give_up(self, error: EngineError) -> None:
        """Send it nothing before it has been greeted, or, unless it just went away, nothing more.

        What is under way there comes to nothing.
        """
        self.weights, self.is_changing = None, False
        self._lives += 1
        self._known.clear()
        self._uploads.clear()
        self._client.cut()
        if self.is_forsaken:
            return
        self.problem, self.is_forsaken = str(error), not isinstance(error, EngineLostError)
        if self.is_forsaken:
            print(f"engine server dropped: {self.url}: {error}", file=sys.stderr, flush=True)


def _part(image: Image, *, whole: bool) -> dict[str, str | None]:
    """A picture by its name, or in full."""
    data = f"data:image;base64,{base64.b64encode(image.data).decode()}" if whole else None
    return {"type": "image_url", "url": data, "uuid": image.sha256}
