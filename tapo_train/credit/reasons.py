"""Why TAPO corrected a tool step, or did not: in words, with the numbers and the references.

The same rows and options as the credit stage give the same decisions, so nothing of this has to
be kept while a run trains: it is worked out again from the dumped rows when somebody asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tapo_train.credit.actions import Reader, Role, as_object, gather
from tapo_train.credit.options import TapoOptions
from tapo_train.credit.steps import CreditCall, CreditRow
from tapo_train.credit.tapo import Judgement, decide


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A call of a successful attempt that a failing one is compared with."""

    row: int
    """Position among the rows."""
    turn: int
    call: int
    """0-based among the calls of its turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallReason:
    """What the credit stage thought of one call."""

    corrected: bool
    why: str
    """A clause without a full stop."""
    similarity: float | None = None
    """To the best cluster; None where there is none to compare with."""
    support: float | None = None
    reference_advantage: float | None = None
    theta: float | None = None
    """Least similarity asked of this tool."""
    transfer: float = 0.0
    cluster: tuple[Reference, ...] = ()
    """The best cluster's calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReason:
    """A tool step before and after."""

    turn: int
    before: float
    after: float
    transfer: float
    """Reduced over the calls, before beta."""
    clipped: bool
    calls: tuple[CallReason, ...]


def explain(rows: Sequence[CreditRow], options: TapoOptions) -> list[tuple[StepReason, ...]]:
    """Per row, one reason for each tool step.

    Raises:
        CreditError: as the credit stage does.
    """
    reader = Reader(options)
    actions = gather(rows, options, reader)
    judgement = decide(rows, actions, options, reader)
    queries = actions.queries
    place = {
        key: i for i, key in enumerate(zip(queries.row, queries.step, queries.call, strict=True))
    }
    steps = {
        (int(row), int(position)): i
        for i, (row, position) in enumerate(zip(judgement.row, judgement.position, strict=True))
    }
    explainer = _Explainer(rows, options, reader, judgement, place)
    found: list[tuple[StepReason, ...]] = []
    for i, row in enumerate(rows):
        reasons = []
        for s, step in enumerate(row.steps):
            at = steps.get((i, s))
            reasons.append(
                StepReason(
                    turn=step.turn,
                    before=row.advantage,
                    after=row.advantage if at is None else float(judgement.advantage[at]),
                    transfer=0.0 if at is None else float(judgement.transfer[at]),
                    clipped=at is not None and bool(judgement.clipped[at]),
                    calls=tuple(explainer.call(i, s, c) for c in range(len(step.calls))),
                )
            )
        found.append(tuple(reasons))
    return found


@dataclass(slots=True)
class _Explainer:
    rows: Sequence[CreditRow]
    options: TapoOptions
    reader: Reader
    judgement: Judgement
    place: dict[tuple[int, int, int], int]
    """(row, step, call) to the position among the eligible calls of failing rows."""

    def call(self, row: int, step: int, call: int) -> CallReason:
        """The reason of one call."""
        at = self.place.get((row, step, call))
        if at is not None:
            return self._judged(row, step, call, at)
        outside = self._of_row(row) or self._of_call(self.rows[row].steps[step].calls[call])
        return CallReason(corrected=False, why=outside or "its arguments say nothing to compare")

    def _of_row(self, index: int) -> str | None:
        """Why no call of this row is judged."""
        row, part = self.rows[index], self.judgement.actions.roles[index]
        if row.discarded:
            return "the attempt failed outside the policy and takes no part"
        if part is Role.SUCCESS:
            return "the attempt succeeded: its calls are what others are compared with"
        if part is Role.FAILING:
            return None
        if row.advantage == 0.0:
            return "the attempt's advantage is 0: there is no blame to take back"
        sign = "above" if row.advantage > 0.0 else "below"
        right = "right" if row.correct >= self.options.success_threshold else "wrong"
        return f"the answer is {right} and the advantage {sign} 0: neither success nor failure"

    def _of_call(self, call: CreditCall) -> str | None:
        """Why this call of a failing row is not judged."""
        if not call.valid or as_object(call.arguments) is None:
            return "the call could not be read or has illegal arguments"
        if not call.executed and not self.options.correct_unexecuted:
            return "the call was not executed"
        if call.status != "ok" and not (
            call.status == "infra_error" and self.options.correct_infra_error
        ):
            return f"the call ended in {call.status}"
        if self.reader(call.name) is None:
            return f"{call.name} is outside credit.tools"
        return None

    def _judged(self, row: int, step: int, call: int, at: int) -> CallReason:
        matches, options = self.judgement.matches, self.options
        held = self.rows[row]
        name = held.steps[step].calls[call].name
        number = int(matches.cluster[at])
        if number < 0:
            in_group = self.judgement.actions.num_successes.get(held.group, 0)
            nobody = "no attempt at this question succeeded"
            why = f"no successful attempt used {name}" if in_group else nobody
            return CallReason(corrected=False, why=why)
        read = self.reader(name)
        theta = options.theta if read is None else options.theta_of(read[0])
        similarity, support = float(matches.similarity[at]), float(matches.support[at])
        transfer = float(self.judgement.given[at])
        library = self.judgement.actions.library
        return CallReason(
            corrected=transfer > 0.0,
            why=self._gates(at, similarity, support, theta),
            similarity=similarity,
            support=support,
            reference_advantage=float(matches.advantage[at]),
            theta=theta,
            transfer=transfer,
            cluster=tuple(
                Reference(row=library.row[i], turn=library.turn[i], call=library.call[i])
                for i in matches.clusters[number].members
            ),
        )

    def _gates(self, at: int, similarity: float, support: float, theta: float) -> str:
        matches, options = self.judgement.matches, self.options
        if not matches.theta[at]:
            return f"too far from what successful attempts asked: {similarity:.2f} < {theta:.2f}"
        if not matches.alpha[at]:
            confidence = similarity * support if options.use_support else similarity
            sum_of = "similarity × support" if options.use_support else "similarity"
            return f"too rare among them: {sum_of} {confidence:.2f} < {options.alpha_min:.2f}"
        if self.judgement.given[at] > 0.0:
            return "successful attempts asked for the same"
        if matches.advantage[at] <= 0.0:
            return "the successful attempts that asked for it were no better than average"
        if matches.transfer[at] > 0.0 and options.correct_repeats == "first":
            return "it repeats an earlier call, or the answers did not agree"
        return "the answers to the matched calls did not agree"
