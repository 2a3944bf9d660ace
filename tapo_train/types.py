"""The nouns: what a task, a picture, a turn and a trajectory are.

A trajectory is one append-only list of token ids with half-open spans over it.
Everything else (loss mask, per-step advantages, viewer, packing) is derived from
the spans, so there is nothing to keep aligned. All types are frozen: a stage
returns new objects and never fills in a field of its input.

A miniature, with `·` for one token:

    tokens   system+question+picture  think+call  observation  think+answer
             ····················     ······      ·····        ····
    turns                             turn 0                   turn 1
    trained                           ██████                   ████

Pictures travel as (sha256, encoded bytes, size); pixels exist only inside a
tool call or a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from tapo_train.errors import TapoError

Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1), x to the right and y down; the frame is said where it is used."""

JsonObject = Mapping[str, Any]


class Outcome(StrEnum):
    """How a tool call ended. Only OK and MODEL_ERROR are the policy's doing."""

    OK = "ok"
    MODEL_ERROR = "model_error"
    TOOL_ERROR = "tool_error"
    TIMEOUT = "timeout"
    INFRA_ERROR = "infra_error"
    REFUSED = "refused"


class StopReason(StrEnum):
    """Why a trajectory ended."""

    ANSWER = "answer"
    """The policy gave a final turn without a tool call."""
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"
    """A turn was cut by its token limit, or the next observation would not fit."""
    INFRA = "infra"
    """A failure outside the policy; such a trajectory leaves loss and baseline."""
    DEADLINE = "deadline"
    """Cut at an observation border because its time was up; leaves loss and baseline too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRef:
    """Where a picture comes from: a region of a root picture.

    `root` is "sha256:<hex of the root's encoded bytes>"; `box` is in [0, 1]^2 of
    the root. A crop keeps its parent's root and composes the boxes; a search
    thumbnail is its own root.
    """

    root: str
    box: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An encoded picture (PNG or JPEG bytes), never pixels."""

    sha256: str
    """Hex digest of `data`; the content id used for caches."""
    data: bytes = field(repr=False)
    width: int
    """[px]"""
    height: int
    """[px]"""
    ref: ImageRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A question about zero or more pictures, with every accepted answer."""

    id: str
    question: str
    images: tuple[Image, ...]
    answers: tuple[str, ...]
    source: str = ""
    """Name of the data set, for metrics by source."""
    metadata: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Half-open range [start, end) of token positions in `Trajectory.tokens`."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan(Span):
    """Half-open range [start, end) of the sampled tokens of a turn, and whose tokens they are."""

    version: int
    """Of the weights that sampled them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a tool answered. `text` may hold `<image>` nowhere: pictures follow in order."""

    text: str
    images: tuple[Image, ...] = ()
    outcome: Outcome = Outcome.OK
    latency_s: float = 0.0
    """[s] from the start of the call to its answer, attempts included, the queue not."""
    cached: bool = False
    """Whether a store of earlier answers gave it, so that it cost nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One parsed `<tool_call>` of a turn, valid or not, executed or not."""

    name: str
    """As written by the policy; "" if it could not be read."""
    arguments: JsonObject | None
    """Parsed JSON object; None if unreadable."""
    valid: bool
    """Parsed, known tool, arguments of legal type and range."""
    executed: bool
    span: Span | None = None
    """Tokens of `<tool_call>…</tool_call>`."""
    observation: Observation | None = None
    """None when the call was not executed and nothing was said about it."""

    @property
    def outcome(self) -> Outcome | None:
        """The observation's; without one MODEL_ERROR if it is invalid, else None: not run."""
        if self.observation is not None:
            return self.observation.outcome
        return None if self.valid else Outcome.MODEL_ERROR


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One assistant turn: what the policy wrote, and what the tools answered."""

    index: int
    """0-based among the assistant turns of the trajectory."""
    span: Span
    """Every sampled token of the turn, the end token included."""
    text: str
    """Decoded sampled tokens, without the end token."""
    calls: tuple[ToolCall, ...] = ()
    observation_span: Span | None = None
    """Tokens appended after the turn (template glue, tool texts, image tokens)."""
    num_images_before: int = 0
    """Length of the picture registry when the turn was sampled: what img_idx meant."""
    policy_version: int = 0
    """Of the weights that were there when the turn was asked for."""
    versions: tuple[VersionSpan, ...] = ()
    """Which weights sampled which of its tokens, covering [0, len(span)); () is all by
    `policy_version`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A total and the named parts it is the weighted sum of."""

    total: float
    accuracy: float
    """Outcome correctness in [0, 1], without format or tool bonuses."""
    parts: Mapping[str, float] = field(default_factory=dict)
    turns: tuple[float, ...] = ()
    """[turns] what of the total is due to each assistant turn; () if nothing is. The rest is the
    outcome's. Only advantages by turn tell the two apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One attempt at a task."""

    id: str
    task: Task
    tokens: npt.NDArray[np.int32] = field(repr=False)
    """[T] prompt, turns and observations; image placeholders EXPANDED (one per feature)."""
    logprobs: npt.NDArray[np.float32] = field(repr=False)
    """[sum of turn lengths] sampler's log-probabilities of the sampled tokens, in order."""
    turns: tuple[Turn, ...]
    images: tuple[Image, ...]
    """Registry in order of appearance; equals the order of image tokens in `tokens`."""
    answer: str | None
    """Text inside the last turn's `<answer>`; None if there is none."""
    stop: StopReason
    policy_version: int = 0
    """Of the weights that sampled its last token; others may be older."""
    reward: Reward | None = None
    unscored: str | None = None
    """Why it has no reward although it ended: the reward failed, outside the policy."""

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first sampled token."""
        return self.turns[0].span.start if self.turns else len(self.tokens)

    @property
    def failed_outside_policy(self) -> bool:
        """True if the trajectory must leave loss and baseline."""
        return self.stop in (StopReason.INFRA, StopReason.DEADLINE) or self.unscored is not None

    def token_versions(self) -> npt.NDArray[np.int64]:
        """[sum of turn lengths] version of the weights that sampled each token."""
        spans = [
            (part.version, len(part))
            for turn in self.turns
            for part in turn.versions
            or (VersionSpan(start=0, end=len(turn.span), version=turn.policy_version),)
        ]
        versions = np.array([version for version, _ in spans], dtype=np.int64)
        return np.repeat(versions, [length for _, length in spans])

    def scored(self) -> Reward:
        """The reward; raises if there is none: not yet, or because it failed outside the policy."""
        if self.reward is None:
            raise TapoError(f"trajectory {self.id} has no reward yet")
        return self.reward

    def with_reward(self, reward: Reward) -> Trajectory:
        """A copy that carries `reward`."""
        return replace(self, reward=reward)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All attempts at one task in one step; a group never crosses ranks."""

    task: Task
    trajectories: tuple[Trajectory, ...]
    surplus: int = 0
    """Attempts that were started and dropped because others were there first."""
    lost: tuple[Trajectory, ...] = ()
    """Those of them that had failed outside the policy: counted as failures, not trained."""
