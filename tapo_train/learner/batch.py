"""Trajectories with advantages -> packed micro-batches.

One index frame: the trained tokens of a micro-batch are a flat vector [K]; entry k
speaks about one token, its log-probability given everything before it. The hidden
state that predicts token p stands at position p - 1: the shift by one happens in
`predicting_positions` and nowhere else.

    row 0   a b C D e F        C, D, F trained (capital)
    row 1   g h I              I trained
    packed  a b C D e F g h I  positions 0..8
    index       1 2   4     7  where C, D, F, I are predicted
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tapo_train.errors import LearnerError
from tapo_train.learner.packing import best_fit, together
from tapo_train.types import Image, Span, Trajectory

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRow:
    """One token list with the spans to learn from."""

    id: str
    tokens: npt.NDArray[np.int32]
    """[T], image placeholders expanded."""
    images: tuple[Image, ...]
    """In the order of their placeholders."""
    spans: tuple[Span, ...]
    """What is trained: ascending, disjoint, none at position 0."""
    advantages: Floats
    """[K] one per trained token; weights of the tokens in supervised training."""
    sampler_logprobs: npt.NDArray[np.float32]
    """[K] as sampled; zeros where nobody sampled."""
    age: npt.NDArray[np.int64] | None = None
    """[K] updates since the weights that sampled each token; None: they are the present ones."""
    group: str = ""
    """What attempts at the same question share; "" for a row that belongs to no group."""

    def __post_init__(self) -> None:
        start = 1
        for span in self.spans:
            if span.start < start or span.end < span.start or span.end > len(self.tokens):
                raise LearnerError(
                    f"row {self.id}: span [{span.start}, {span.end}) in {len(self.tokens)} tokens; "
                    f"wanted ascending, disjoint spans within [{start}, {len(self.tokens)})"
                )
            start = span.end
        for name in ("advantages", "sampler_logprobs", "age"):
            values = getattr(self, name)
            if values is None:
                continue
            found = values.shape
            if found != (self.num_trained,):
                raise LearnerError(
                    f"row {self.id}: {name} has shape {found}; wanted ({self.num_trained},), "
                    "one per trained token"
                )

    @property
    def num_trained(self) -> int:
        """K, the number of trained tokens."""
        return sum(len(span) for span in self.spans)

    @classmethod
    def from_turns(cls, trajectory: Trajectory, turn_advantages: npt.ArrayLike) -> TrainingRow:
        """Every sampled token of a trajectory, with the advantage of its turn.

        Args:
            turn_advantages: [turns] one per assistant turn.
        """
        spans = tuple(turn.span for turn in trajectory.turns)
        values = np.asarray(turn_advantages, dtype=np.float64)
        if values.shape != (len(spans),):
            raise LearnerError(
                f"row {trajectory.id}: turn_advantages has shape {values.shape}; "
                f"wanted ({len(spans)},), one per turn"
            )
        return cls(
            id=trajectory.id,
            tokens=trajectory.tokens,
            images=trajectory.images,
            spans=spans,
            advantages=np.repeat(values, [len(span) for span in spans]),
            sampler_logprobs=trajectory.logprobs,
            group=trajectory.task.id,
        )

    @classmethod
    def from_tokens(
        cls, trajectory: Trajectory, advantages: Floats, *, version: int
    ) -> TrainingRow:
        """Every sampled token of a trajectory, each with its own advantage [K].

        Args:
            version: of the weights that are about to learn from it.
        """
        return cls(
            id=trajectory.id,
            tokens=trajectory.tokens,
            images=trajectory.images,
            spans=tuple(turn.span for turn in trajectory.turns),
            advantages=advantages,
            sampler_logprobs=trajectory.logprobs,
            age=version - trajectory.token_versions(),
            group=trajectory.task.id,
        )

    @classmethod
    def supervised(
        cls,
        *,
        id: str,
        tokens: npt.NDArray[np.int32],
        images: tuple[Image, ...],
        spans: tuple[Span, ...],
        weights: Sequence[float] | None = None,
    ) -> TrainingRow:
        """A demonstration; `weights` holds one number per span (1 if not given)."""
        lengths = [len(span) for span in spans]
        values = np.ones(len(spans)) if weights is None else np.asarray(weights, dtype=np.float64)
        if values.shape != (len(spans),):
            raise LearnerError(
                f"row {id}: weights has shape {values.shape}; wanted ({len(spans)},), one per span"
            )
        return cls(
            id=id,
            tokens=tokens,
            images=images,
            spans=spans,
            advantages=np.repeat(values, lengths),
            sampler_logprobs=np.zeros(sum(lengths), dtype=np.float32),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Whole trajectories, concatenated; n rows, S tokens, K trained tokens.

    Pictures stay encoded here: pixels are made when the forward pass needs them.
    """

    row_ids: tuple[str, ...]
    input_ids: Tensor
    """[S] int64."""
    boundaries: tuple[int, ...]
    """[n + 1] 0, ..., S."""
    num_turns: int
    """Spans of the row with the most of them."""
    max_age: int
    """Largest of `age`."""
    images: tuple[tuple[Image, ...], ...]
    """[n] the pictures of each row."""
    trained_index: Tensor
    """[K] int64, positions in [0, S) that predict the trained tokens."""
    targets: Tensor
    """[K] int64, the trained tokens."""
    trajectory: Tensor
    """[K] int64, 0..n-1."""
    turn: Tensor
    """[K] int64, which of its row's spans each token is in: the assistant turn."""
    lengths: Tensor
    """[n] int64, trained tokens of each row."""
    group: Tensor
    """[n] int64, 0..groups-1 within the micro-batch: rows of one question share a number."""
    advantages: Tensor
    """[K] float32."""
    sampler_logprobs: Tensor
    """[K] float32."""
    old_logprobs: Tensor
    """[K] float32 at the start of the step: the sampler's, until the learner's replace them."""
    age: Tensor
    """[K] int64 updates since the weights that sampled each token."""
    reference_logprobs: Tensor | None = None
    """[K] float32 of the frozen reference policy; None without a KL term."""
    idle_tokens: int = 0
    idle_sequences: int = 0
    """Trained tokens of rows that take part in the step's means alone, and such rows with any."""

    def to(self, device: torch.device) -> MicroBatch:
        """A copy whose tensors are on `device`; itself if they are there already."""
        if self.input_ids.device == device:
            return self
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    @property
    def num_tokens(self) -> int:
        """S."""
        return self.boundaries[-1]

    @property
    def num_trained(self) -> int:
        """K."""
        return self.targets.shape[0]

    @property
    def num_sequences(self) -> int:
        """Rows with at least one trained token: what a mean over sequences divides by."""
        return int((self.lengths > 0).sum())


def predicting_positions(
    spans: Sequence[Span], *, offset: int | npt.NDArray[np.int64] = 0
) -> npt.NDArray[np.int64]:
    """[K] positions whose hidden state predicts the tokens of `spans`: p - 1 for token p.

    Args:
        offset: where the row starts in the packed sequence; [spans] for spans of many rows.
    """
    starts = np.array([span.start for span in spans], dtype=np.int64) + offset
    lengths = np.array([len(span) for span in spans], dtype=np.int64)
    # Entry k of a span stands `k - (entries before the span)` after the span's start.
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before - 1, lengths) + np.arange(lengths.sum())


def pack(
    rows: Sequence[TrainingRow], *, budget_tokens: int, whole_groups: bool = False
) -> list[MicroBatch]:
    """Micro-batches of at most `budget_tokens` tokens, holding every row once.

    A row longer than the budget gets a micro-batch of its own: rows are never cut. With
    `whole_groups` the same holds for the rows of a group, which stay together.
    """
    chosen = pack_numbers(rows, budget_tokens=budget_tokens, whole_groups=whole_groups)
    return [join([rows[i] for i in numbers]) for numbers in chosen]


def pack_numbers(
    rows: Sequence[TrainingRow], *, budget_tokens: int, whole_groups: bool = False
) -> list[list[int]]:
    """Row numbers of each micro-batch of `pack`."""
    units = together([row.group if whole_groups else "" for row in rows])
    lengths = [sum(len(rows[i].tokens) for i in unit) for unit in units]
    chosen = best_fit(lengths, budget_tokens=budget_tokens)
    return [[i for number in numbers for i in units[number]] for numbers in chosen]


def join(rows: Sequence[TrainingRow]) -> MicroBatch:
    """One micro-batch of the given rows, in order; without rows an empty one."""
    starts = np.array([0, *accumulate(len(row.tokens) for row in rows)], dtype=np.int64)
    counts = [row.num_trained for row in rows]
    turns = [np.repeat(np.arange(len(row.spans)), list(map(len, row.spans))) for row in rows]
    group = np.zeros(len(rows), dtype=np.int64)
    for number, unit in enumerate(together([row.group for row in rows])):
        group[unit] = number
    index = predicting_positions(
        [span for row in rows for span in row.spans],
        offset=np.repeat(starts[:-1], [len(row.spans) for row in rows]),
    )
    tokens = _concatenate([row.tokens for row in rows], np.int64)
    ages = [np.zeros(row.num_trained) if row.age is None else row.age for row in rows]
    sampled = torch.from_numpy(_concatenate([row.sampler_logprobs for row in rows], np.float32))
    return MicroBatch(
        row_ids=tuple(row.id for row in rows),
        input_ids=torch.from_numpy(tokens),
        boundaries=tuple(starts.tolist()),
        images=tuple(row.images for row in rows),
        trained_index=torch.from_numpy(index),
        targets=torch.from_numpy(tokens[index + 1]),
        trajectory=torch.from_numpy(np.repeat(np.arange(len(rows)), counts)),
        turn=torch.from_numpy(_concatenate(turns, np.int64)),
        num_turns=max((len(row.spans) for row in rows), default=0),
        max_age=max((int(age.max(initial=0)) for age in ages), default=0),
        lengths=torch.tensor(counts, dtype=torch.int64),
        group=torch.from_numpy(group),
        advantages=torch.from_numpy(_concatenate([row.advantages for row in rows], np.float32)),
        sampler_logprobs=sampled,
        old_logprobs=sampled,
        age=torch.from_numpy(_concatenate(ages, np.int64)),
    )


def _concatenate(pieces: Sequence[npt.NDArray[Any]], kind: type) -> npt.NDArray[Any]:
    """Pieces as one vector of the given kind, made once; without pieces an empty one."""
    if not pieces:
        return np.zeros(0, dtype=kind)
    joined: npt.NDArray[Any] = np.concatenate(pieces, dtype=kind, casting="unsafe")
    return joined
