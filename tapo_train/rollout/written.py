"""What the policy wrote in a turn, before its tools have answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tapo_train.rollout.byte_text import DecodedText
from tapo_train.rollout.parse import ParsedCall
from tapo_train.tools.base import ToolRequest
from tapo_train.types import Observation, Outcome, Span, StopReason, ToolCall, VersionSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A sampled turn whose tools have not answered yet."""

    span: Span
    decoded: DecodedText
    calls: tuple[ParsedCall, ...]
    requests: list[ToolRequest]
    """The calls as the toolbox read them."""
    num_images: int
    """Registered before the turn."""
    versions: tuple[VersionSpan, ...]
    """Which weights sampled it; () if the engine does not say."""
    stop: StopReason | None
    """Why the trajectory ends with this turn; None if its tools have to answer first."""

    def calls_with(self, observations: Sequence[Observation]) -> tuple[ToolCall, ...]:
        """The calls of the turn, of which the first ones were answered."""
        records = []
        for index, (call, request) in enumerate(zip(self.calls, self.requests, strict=True)):
            span = self.decoded.token_span(call.start, call.end)
            observation = observations[index] if index < len(observations) else None
            is_wrong = observation is not None and observation.outcome is Outcome.MODEL_ERROR
            start = self.span.start
            records.append(
                ToolCall(
                    name=call.name,
                    arguments=call.arguments,
                    valid=request.error is None and not is_wrong,
                    executed=observation is not None and request.error is None,
                    span=Span(start=start + span.start, end=start + span.end),
                    observation=observation,
                )
            )
        return tuple(records)
