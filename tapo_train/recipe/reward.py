"""What a trajectory is worth: parts with weights, by data source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from tapo_train.recipe.custom import CustomOrPath
from tapo_train.recipe.tools import ToolLimitSettings
from tapo_train.recipe.values import STRICT, Count, CountOrZero, Fraction, NonNegative, Positive

TEMPLATES = ("answer", "support", "complete", "faithful")
"""Names of a judge's prompts."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class ExactMatch:
    """1 if the answer equals an accepted one after SQuAD's normalisation, else 0."""

    name: Literal["exact_match"] = "exact_match"
    weight: NonNegative = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class TokenF1:
    """Harmonic mean of precision and recall of normalised words, best of the accepted answers."""

    name: Literal["token_f1"] = "token_f1"
    weight: NonNegative = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class NumericMatch:
    """1 if the answer's number or range meets an accepted one (InfoSeek), else 0."""

    name: Literal["numeric"] = "numeric"
    weight: NonNegative = 1.0
    relative: NonNegative = 0.1
    """Slack around one accepted number, as a share of it."""
    absolute: NonNegative = 0.0
    """The same in its unit; the larger of both counts."""
    overlap: Fraction = 0.5
    """Least intersection over union of two ranges."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class InfoSeek:
    """1 by InfoSeek's rules (exact match; of a numerical question ranges that overlap), else 0."""

    name: Literal["infoseek"] = "infoseek"
    weight: NonNegative = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class MultipleChoice:
    """1 if the answer chooses an accepted letter, or says an option's whole text."""

    name: Literal["multiple_choice"] = "multiple_choice"
    weight: NonNegative = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Maths:
    """1 if the answer equals an accepted one as mathematics (LaTeX or plain; extra maths)."""

    name: Literal["maths"] = "maths"
    weight: NonNegative = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class WellFormed:
    """1 for one non-empty <answer> in the last turn and readable calls before it, else 0."""

    name: Literal["format"] = "format"
    weight: NonNegative = 0.5


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Overlong:
    """DAPO's soft punishment of length: from 0 down to -1 over the last tokens allowed."""

    name: Literal["overlong"] = "overlong"
    weight: NonNegative = 1.0
    longest: Count = 4096
    """[tokens] the policy may write in all turns; from there on -1."""
    buffer: Count = 1024
    """[tokens] below longest in which the punishment grows; at most longest."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class CallPenalty:
    """-1 for each tool call of a kind, at its turn."""

    name: Literal["call_penalty"] = "call_penalty"
    weight: NonNegative = 0.05
    count: Literal["executed", "failed", "repeated"] = "executed"
    """executed: that was run; failed: the policy's errors; repeated: asked before."""
    free: CountOrZero = 0
    """The first so many of a trajectory cost nothing."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Supported:
    """1 if an observation holds the answer's normalised words, else 0 (tool verification)."""

    name: Literal["supported"] = "supported"
    weight: NonNegative = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class JudgePart:
    """1 or 0 by a language model behind an OpenAI-compatible endpoint.

    A judge that fails is an infrastructure failure: its trajectory leaves loss, baseline and
    validation. With tools.replay its verdicts are recorded and played back like tools' answers.
    """

    name: Literal["judge"] = "judge"
    weight: NonNegative = 1.0
    endpoint: str
    """http(s)://host[:port]/v1; `/chat/completions` is added."""
    model: str
    """As the endpoint calls it."""
    template: str = "answer"
    """answer: is the response right; support: do the observations support it (tool verification);
    complete: does it hold all that the accepted answers say; faithful: does it say nothing that the
    observations do not; or a text of your own with {question}, {accepted}, {response},
    {observations}, which asks for <judge>Yes</judge> or <judge>No</judge> first."""
    exact_first: bool = True
    """An answer that equals an accepted one is right without asking; never with support."""
    with_images: bool = False
    """Send the question's pictures along."""
    key_variable: str | None = None
    """Name of the environment variable that holds the endpoint's key; none: no key is sent."""
    options: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.0})
    """Further fields of the request."""
    limits: ToolLimitSettings = field(
        default_factory=lambda: ToolLimitSettings(concurrency=32, deadline_s=60.0, retries=3)
    )
    """Seats, rate, deadline with all retries, and price of a judgement, on each rank."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class EnvironmentPart:
    """A number of the state of the trajectory's environment (tools.environment)."""

    name: Literal["environment"] = "environment"
    weight: float = 1.0
    attribute: str = "reward"
    """Of the instance, read when the trajectory is over."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class CustomPart:
    """A reward of your own: (trajectory) → a number or a Score, async or blocking."""

    name: Literal["custom"] = "custom"
    weight: float = 1.0
    path: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    """`package.module:name`, as everywhere (docs/extending.md)."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments, checked against the signature at the start."""


RewardPart = Annotated[
    ExactMatch
    | TokenF1
    | NumericMatch
    | InfoSeek
    | MultipleChoice
    | Maths
    | WellFormed
    | Overlong
    | CallPenalty
    | Supported
    | JudgePart
    | EnvironmentPart
    | CustomPart,
    Field(discriminator="name"),
]
Parts = Mapping[str, RewardPart | None]


def _parts() -> Parts:
    return {"accuracy": ExactMatch(), "format": WellFormed()}


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class RewardSettings:
    """reward = sum of weight · part.

    A part has a name of your choice and, under `name`, a kind. The one called accuracy says
    whether the outcome is right, in [0, 1]: validation and credit go by it.
    """

    parts: Parts = field(default_factory=_parts)
    """By name; a part that is null is left out."""
    by_source: Mapping[str, Parts] = field(default_factory=dict)
    """By the data source of a task: parts in place of those above."""
    process: tuple[CustomOrPath, ...] = ()
    """Stages of your own after the rollout, one after the other: (trajectories, policy) → as many
    trajectories, with rewards of turns or left out. They may ask the policy (docs/extending.md);
    validation and evaluation go without them."""
    deadline_s: Positive = 300.0
    """[s] for the reward of one trajectory; later it has none and leaves loss and baseline."""
    min_scored: Fraction = 0.95
    """The run stops when a smaller share of the trajectories that ended got a reward, over the step
    and, where it is small, over those before it until there are 32. 0: never."""
