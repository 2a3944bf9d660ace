"""What the credit stage sees of a rollout: rows, tool steps, calls.

A `CreditRow` is one trajectory, a `CreditStep` one assistant turn with at least one tool
call, a `CreditCall` one call. No tokens, no pixels, no tensors: pictures are names
(`ImageRef`), observations are text. The same rows come from a live `Trajectory` and from a
JSONL file of another framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from tapo_train.errors import CreditError
from tapo_train.types import Image, ImageRef, Outcome, ToolCall, Trajectory

Status = Literal["ok", "model_error", "infra_error"]
"""Who is to blame for the end of a call: nobody, the policy, the world around it."""

STATUSES: tuple[Status, ...] = ("ok", "model_error", "infra_error")


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditCall:
    """One tool call, as the policy asked for it and as the tool answered."""

    name: str
    arguments: Any = None
    """The JSON value under `arguments`: an object; None means {}; a string is parsed once."""
    valid: bool = True
    """Parsed, known tool, arguments of legal type and range."""
    executed: bool = True
    status: Status = "ok"
    observation: str | None = None
    """Text of the answer, for the determinism audit; None if not recorded."""
    observation_images: tuple[ImageRef, ...] = ()
    """Pictures of the answer, in order; equal references are equal content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditStep:
    """One assistant turn with at least one call."""

    turn: int
    """0-based among all assistant turns of the trajectory."""
    calls: tuple[CreditCall, ...]
    num_images: int = 1
    """Length of the picture registry when the turn was sampled: what an index meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditRow:
    """One trajectory."""

    id: str
    group: str
    """The question; all attempts at it share this."""
    correct: float
    """Outcome correctness in [0, 1], without format or tool bonuses."""
    advantage: float
    """Scalar group-relative advantage, after any renormalisation over the batch."""
    num_turns: int
    """All assistant turns, those without a tool call included."""
    steps: tuple[CreditStep, ...] = ()
    images: tuple[ImageRef, ...] = ()
    """Registry in the order the policy indexes it; grows during the rollout."""
    num_input_images: int = 0
    """The first so many of `images` belong to the question."""
    image_sizes: tuple[tuple[float, float], ...] = ()
    """(width, height) [px] per picture; only needed where boxes are in pixels."""
    reward: float | None = None
    """Total reward of the trajectory, where known."""
    turn_rewards: tuple[float, ...] = ()
    """[turns] what of `reward` is due to each turn; () if nothing is."""
    turn_advantages: tuple[float, ...] = ()
    """[turns] where the advantages of turns differ; () if every turn has `advantage`."""
    discarded: bool = False
    """Takes no part in the loss: its calls are ignored; it counts as a success if it is one."""

    def __post_init__(self) -> None:
        turns = [step.turn for step in self.steps]
        rises = all(low < high for low, high in pairwise([-1, *turns, self.num_turns]))
        if not rises:
            raise CreditError(
                f"row {self.id!r}: steps are at turns {turns} of {self.num_turns}; "
                "want rising numbers from 0 on"
            )
        for name in ("turn_rewards", "turn_advantages"):
            if (found := len(getattr(self, name))) not in (0, self.num_turns):
                raise CreditError(
                    f"row {self.id!r}: {found} {name} for {self.num_turns} turns; want one per "
                    "turn, or none"
                )

    def advantage_at(self, turn: int) -> float:
        """Of a turn, before the credit stage."""
        return self.turn_advantages[turn] if self.turn_advantages else self.advantage


def status_of(outcome: Outcome | None) -> Status:
    """Fold the tool outcomes into the three cases that credit distinguishes.

    Nothing is wrong with a call that was not run; that it was not, `executed` says.
    """
    if outcome is None or outcome is Outcome.OK:
        return "ok"
    if outcome is Outcome.MODEL_ERROR:
        return "model_error"
    return "infra_error"


def _call(call: ToolCall) -> CreditCall:
    observation = call.observation
    return CreditCall(
        name=call.name,
        arguments=call.arguments,
        # Unreadable arguments are None in a trajectory, and None means {} in a row.
        valid=call.valid and call.arguments is not None,
        executed=call.executed,
        status=status_of(call.outcome),
        observation=None if observation is None else observation.text,
        observation_images=() if observation is None else _refs(observation.images),
    )


def _refs(images: tuple[Image, ...]) -> tuple[ImageRef, ...]:
    return tuple(image.ref for image in images)


def from_trajectory(
    trajectory: Trajectory, advantage: float, turn_advantages: Sequence[float] = ()
) -> CreditRow:
    """The row of a scored trajectory.

    Args:
        trajectory: must carry a reward (raises `TapoError` otherwise), unless it failed outside
            the policy: then it is no success, whatever it answered.
        advantage: its scalar group-relative advantage.
        turn_advantages: [turns] where those of its turns differ.
    """
    steps = tuple(
        CreditStep(
            turn=turn.index,
            calls=tuple(_call(call) for call in turn.calls),
            num_images=turn.num_images_before,
        )
        for turn in trajectory.turns
        if turn.calls
    )
    reward = None if trajectory.failed_outside_policy else trajectory.scored()
    return CreditRow(
        id=trajectory.id,
        group=trajectory.task.id,
        correct=reward.accuracy if reward else 0.0,
        reward=reward.total if reward else None,
        turn_rewards=reward.turns if reward else (),
        advantage=float(advantage),
        turn_advantages=tuple(map(float, turn_advantages)),
        num_turns=len(trajectory.turns),
        steps=steps,
        images=_refs(trajectory.images),
        num_input_images=len(trajectory.task.images),
        image_sizes=tuple((image.width, image.height) for image in trajectory.images),
        discarded=trajectory.failed_outside_policy,
    )
