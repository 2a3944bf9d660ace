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
   Where the step's time is up, the episode can be advanced later instead, with other weights:
   the turn is then sampled anew, or its tools are called again.

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
from tapo_train.rollout.engine import Completion, GenerationRequest, Sampling
from tapo_train.rollout.limits import NEVER, Deadlines, Limits
from tapo_train.rollout.parse import ParsedCall, parse_turn
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
    ) -> None:
        self._id = id
        self._task = task
        self._generate = generate
        self._chat = chat
        self._toolbox = toolbox
        self._limits = limits
        self._sampling = sampling
        self._deadlines = deadlines
        self._transcript = Transcript(prompt, task.images, capacity=limits.max_tokens)
        self._answer: str | None = None
        self._unanswered: Written | None = None
        self._stop: StopReason | None = None
        self._version = 0
        self._used_s = 0.0
        self.interruptions = 0
        """How often the step's time was up before the episode was over."""

    async def run(self, *, policy_version: int, until: float = math.inf) -> Trajectory:
        """Play until a rule ends the episode.

        Args:
            until: when it has to be over, on the event loop's clock [s].
        """
        await self.advance(policy_version=policy_version, until=until)
        return self.trajectory()

    def move_to(self, generate: Generate) -> None:
        """Ask another engine from now on, or the same one on another event loop."""
        self._generate = generate

    async def advance(self, *, policy_version: int, until: float = math.inf) -> bool:
        """Play until the episode is over; False if `until` was there first.

        Then it may be advanced again. The time between does not count for
        `Deadlines.trajectory_s`.
        """
        self._version = policy_version
        clock = asyncio.get_running_loop().time
        started = clock()
        last = started + self._deadlines.trajectory_s - self._used_s
        while self._stop is None:
            own = min(last, clock() + self._deadlines.turn_s)
            if await self._turn_until(min(own, until)):
                continue
            if until <= own:
                self._used_s += clock() - started
                self.interruptions += 1
                return False
            self._stop = StopReason.DEADLINE
        return True

    def trajectory(self) -> Trajectory:
        """What was played; if that is not over, it is cut here (DEADLINE)."""
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
        if until <= asyncio.get_running_loop().time():
            return False
        scope = asyncio.timeout_at(until)
        try:
            async with scope:
                self._stop = await self._turn()
                return True
        except TimeoutError:
            if not scope.expired():
                raise
        return False

    async def _turn(self) -> StopReason | None:
        """One turn with its tools; the reason to stop, or None to go on."""
        if self._unanswered is None:
            self._unanswered = self._write(await self._generate(self._request()))
        written = self._unanswered
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
        parsed = parse_turn(decoded.text)
        if not parsed.calls:
            self._answer = parsed.answer
        return Written(
            span=self._transcript.append_sampled(completion),
            decoded=decoded,
            calls=parsed.calls,
            requests=[self._read(call) for call in parsed.calls],
            num_images=len(self._transcript.images),
            policy_version=self._version,
            stop=self._stop_before_tools(is_cut, bool(parsed.calls)),
        )

    def _record(
        self, written: Written, calls: tuple[ToolCall, ...], observation_span: Span | None
    ) -> None:
        """The turn is over: note what it was."""
        turns = self._transcript.turns
        turns.append(
            Turn(
                index=len(turns),
                span=written.span,
                text=written.decoded.text,
                calls=calls,
                observation_span=observation_span,
                num_images_before=written.num_images,
                policy_version=written.policy_version,
            )
        )
        self._unanswered = None

    def _request(self) -> GenerationRequest:
        transcript = self._transcript
        # What is sampled anew draws other numbers than what was given up.
        anew = f"~{self.interruptions}" if self.interruptions else ""
        return GenerationRequest(
            id=f"{self._id}{anew}:{len(transcript.turns)}",
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
        context = ToolContext(images=self._transcript.images, task=self._task)
        runs = [self._run_call(request, context) for request in requests]
        return [await runs[0]] if len(runs) == 1 else await asyncio.gather(*runs)

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
