"""One task → one trajectory: sample a turn, run its tool, append the observation, repeat.

    prompt ─ generate ─ parse ─┬─ no call: ANSWER
                  ▲            └─ call ─ tool ─ observation ─┐
                  └────────────────────────────────────────────┘

Rules, in order:

1. A turn cut by its token limit ends the trajectory (MAX_TOKENS); its calls are recorded.
2. A tool call wins over an `<answer>` in the same turn; no call at all ends it (ANSWER).
3. A call in the last allowed turn is recorded, not run (MAX_TURNS).
4. The first `max_parallel_calls` calls of a turn are run, further ones are recorded.
5. A call that cannot be read, names no tool or has wrong arguments gets an error
   observation the policy reads, and the episode goes on.
6. A tool that broke or gave no answer in time ends the trajectory (INFRA): nobody can say
   how the attempt would have gone on, so it leaves loss and baseline.
7. An observation that would not fit is left out and ends it at the border (MAX_TOKENS).
8. When its time is up (`Deadlines`), a turn that is being sampled is given up, a turn whose
   tools have not answered is kept without their answers, and that ends it (DEADLINE).

The work of a turn is proportional to its new tokens: nothing is rendered, tokenised,
parsed or copied again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from tapo_train.errors import AlignmentError
from tapo_train.rollout.chat import ChatFormat, Tokens
from tapo_train.rollout.clock import PlayClock
from tapo_train.rollout.engine import Completion, GenerationRequest, Sampling
from tapo_train.rollout.limits import NEVER, Deadlines, Limits
from tapo_train.rollout.parse import ParsedCall
from tapo_train.rollout.transcript import Transcript
from tapo_train.rollout.written import Written
from tapo_train.tools.base import ToolContext, ToolRequest
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import (
    Observation,
    Outcome,
    Span,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
    Turn,
)

OUTSIDE_POLICY = frozenset({Outcome.INFRA_ERROR, Outcome.TIMEOUT})
"""Outcomes that end a trajectory without judging it."""

Generate = Callable[[GenerationRequest], Awaitable[Completion]]


class Episode:
    """One attempt at one task.

    Args:
        id: of the trajectory; the request of turn t is `id:t`.
        prompt: [T] expanded tokens, shared by the attempts of a group.
        generate: asks the engine and waits for the completion.
        clock: what deadlines are measured by; None: one that never stands still.
    """

    def __init__(
        self,
        *,
        id: str,
        task: Task,
        prompt: Tokens,
        generate: Generate,
        chat: ChatFormat,
        toolbox: Toolbox,
        limits: Limits,
        sampling: Sampling,
        deadlines: Deadlines = NEVER,
        clock: PlayClock | None = None,
    ) -> None:
        self._id = id
        self._task = task
        self._generate = generate
        self._chat = chat
        self._toolbox = toolbox
        self._limits = limits
        self._sampling = sampling
        self._deadlines = deadlines
        self._clock = clock or PlayClock()
        self._transcript = Transcript(prompt, task.images, capacity=limits.max_tokens)
        self._answer: str | None = None
        self._unanswered: Written | None = None
        self._stop: StopReason | None = None
        self._version = 0

    async def run(self, *, policy_version: int, until: float = math.inf) -> Trajectory:
        """Play until a rule ends the episode.

        Args:
            policy_version: of the weights that are there at the beginning. Turns of an engine that
                says which weights sampled them may have later ones.
            until: when it has to be over, on the clock [s].
        """
        self._version = policy_version
        last = self._clock.now() + self._deadlines.trajectory_s
        while self._stop is None:
            own = min(last, self._clock.now() + self._deadlines.turn_s, until)
            if not await self._turn_until(own):
                self._stop = StopReason.DEADLINE
        return self._trajectory()

    def _trajectory(self) -> Trajectory:
        """What was played."""
        if self._unanswered is not None:
            self._record(self._unanswered, self._unanswered.calls_with(()), None)
        transcript = self._transcript
        return Trajectory(
            id=self._id,
            task=self._task,
            tokens=transcript.tokens.copy(),
            logprobs=transcript.logprobs,
            turns=tuple(transcript.turns),
            images=transcript.images,
            answer=self._answer,
            stop=self._stop or StopReason.DEADLINE,
            policy_version=self._version,
        )

    async def _turn_until(self, until: float) -> bool:
        """A turn, and whether the episode ends with it; False if there was no time for it."""
        if until == math.inf:
            self._stop = await self._turn()
            return True
        if until <= self._clock.now():
            return False
        try:
            async with self._clock.until(until) as scope:
                self._stop = await self._turn()
                return True
        except TimeoutError:
            if not scope.expired():
                raise
        return False

    async def _turn(self) -> StopReason | None:
        """One turn with its tools; the reason to stop, or None to go on."""
        written = self._unanswered = self._write(await self._generate(self._request()))
        allowed = 0 if written.stop else self._limits.max_parallel_calls
        calls = written.calls_with(await self._run_calls(written.requests[:allowed]))
        stop, observation_span = written.stop, None
        if stop is None:
            stop, observation_span = self._observe(calls)
        self._record(written, calls, observation_span)
        return stop

    def _write(self, completion: Completion) -> Written:
        """Append what was sampled, and read it."""
        is_cut = completion.finished == "length"
        decoded = self._chat.decode(completion.tokens if is_cut else completion.tokens[:-1])
        parsed = self._chat.read(decoded.text)
        calls = tuple(self._typed(call) for call in parsed.calls)
        if not calls:
            self._answer = parsed.answer
        return Written(
            span=self._transcript.append_sampled(completion),
            decoded=decoded,
            calls=calls,
            requests=[self._read(call) for call in calls],
            num_images=len(self._transcript.images),
            versions=completion.versions,
            stop=self._stop_before_tools(is_cut, bool(calls)),
        )

    def _record(
        self, written: Written, calls: tuple[ToolCall, ...], observation_span: Span | None
    ) -> None:
        """The turn is over: note what it was."""
        turns, spans = self._transcript.turns, written.versions
        first = spans[0].version if spans else self._version
        self._version = spans[-1].version if spans else self._version
        turns.append(
            Turn(
                index=len(turns),
                span=written.span,
                text=self._chat.template.opening + written.decoded.text,
                calls=calls,
                observation_span=observation_span,
                num_images_before=written.num_images,
                policy_version=first,
                versions=spans if len(spans) > 1 else (),
            )
        )
        self._unanswered = None

    def _request(self) -> GenerationRequest:
        transcript = self._transcript
        return GenerationRequest(
            id=f"{self._id}:{len(transcript.turns)}",
            tokens=transcript.tokens,
            images=transcript.images,
            max_tokens=min(self._limits.max_turn_tokens, transcript.room),
            sampling=self._sampling,
        )

    def _stop_before_tools(self, is_cut: bool, has_calls: bool) -> StopReason | None:
        if is_cut:
            return StopReason.MAX_TOKENS
        if not has_calls:
            return StopReason.ANSWER
        is_last = len(self._transcript.turns) + 1 >= self._limits.max_turns
        return StopReason.MAX_TURNS if is_last else None

    async def _run_calls(self, requests: Sequence[ToolRequest]) -> Sequence[Observation]:
        """Run calls at the same time; their observations in order."""
        context = ToolContext(images=self._transcript.images, task=self._task, trajectory=self._id)
        runs = [self._run_call(request, context) for request in requests]
        return [await runs[0]] if len(runs) == 1 else await asyncio.gather(*runs)

    def _typed(self, call: ParsedCall) -> ParsedCall:
        """The call with values of the types its tool wants, where the dialect knows texts alone."""
        if not self._chat.reads_texts or call.arguments is None:
            return call
        return replace(call, arguments=self._toolbox.typed(call.name, call.arguments))

    def _read(self, call: ParsedCall) -> ToolRequest:
        if call.error is not None:
            return ToolRequest(name=call.name, error=call.error)
        return self._toolbox.read(call.name, call.arguments)

    async def _run_call(self, request: ToolRequest, context: ToolContext) -> Observation:
        observation = await self._toolbox.execute(request, context)
        return self._usable(request.name, observation)

    def _usable(self, tool: str, observation: Observation) -> Observation:
        """The observation, or a tool error if the model cannot take one of its pictures."""
        try:
            for image in observation.images:
                self._chat.image_tokens(image)
        except AlignmentError as error:
            text = f"Error: {tool} returned a picture the model cannot take: {error}"
            return replace(observation, text=text, images=(), outcome=Outcome.TOOL_ERROR)
        return observation

    def _observe(self, calls: tuple[ToolCall, ...]) -> tuple[StopReason | None, Span | None]:
        """Append what the tools answered, if that is possible."""
        observations = [call.observation for call in calls if call.observation is not None]
        if any(observation.outcome in OUTSIDE_POLICY for observation in observations):
            return StopReason.INFRA, None
        tokens = self._chat.observation(observations)
        # One token must be left: a turn without tokens cannot be sampled.
        if len(tokens) + 1 > self._transcript.room:
            return StopReason.MAX_TOKENS, None
        images = tuple(image for observation in observations for image in observation.images)
        return None, self._transcript.append_observation(tokens, images)
