"""After each rollout: what the tools did, and whether the run may go on. All ranks agree.

Both budgets are judged over all ranks in one exchange, so that no rank stops alone and leaves
the others waiting in a collective.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from tapo_train.errors import OutageError, ToolBudgetError
from tapo_train.learner import distributed
from tapo_train.report.tool_metrics import tool_metrics
from tapo_train.rollout.failures import FailureBudget, Failures, failures_of
from tapo_train.tools.ledger import Ledger, Spending
from tapo_train.tools.threads import num_abandoned
from tapo_train.types import Group

__all__ = ["RolloutAudit"]


class RolloutAudit:
    """Gathers the ledgers of all ranks, and holds the budgets of failures and of money.

    What is spent is kept in the run folder, call by call, and not in the checkpoint: money spent
    after the last checkpoint is spent too, also by a rank that was killed. Each rank gets an
    equal share of the rest before a rollout, so the budget cannot be overdrawn between two
    exchanges.

    Args:
        ledger: of this rank's toolbox.
        failures: how many trajectories may fail.
        budget: what a whole run may spend; None: anything.
        folder: where each rank keeps what it spends; rank 0 adds up what was spent before.
    """

    def __init__(
        self, ledger: Ledger, *, failures: FailureBudget, budget: float | None, folder: Path
    ) -> None:
        self._ledger = ledger
        self._failures = failures
        self._validations = failures.anew()
        self._budget = None if budget is None else Decimal(repr(budget))
        self._spending = Spending(folder, rank=distributed.rank())
        ledger.keep = self._spending.write
        before = self._spending.total() if distributed.rank() == 0 else None
        self._spent: Decimal = distributed.broadcast_object(before)
        self._refill()

    def __call__(self, groups: Sequence[Group]) -> dict[str, float]:
        """Metrics of the tools in a rollout of all ranks; every rank calls it.

        Args:
            groups: this rank's, scored.

        Raises:
            OutageError: too many trajectories failed outside the policy.
            ToolBudgetError: a call was not made because the budget could not pay for it.
        """
        trajectories = [t for group in groups for t in group.trajectories]
        correct = sum(t.scored().accuracy for t in trajectories if not t.failed_outside_policy)
        records = self._ledger.drain()
        events = self._ledger.drain_events()
        lost = [t for group in groups for t in group.lost]
        failures = failures_of([*trajectories, *lost])
        own = (records, correct, failures, num_abandoned(), events)
        ranks = distributed.all_gather_objects(own)
        self.settle()
        everywhere, rights, failed, hung, guarded = zip(*ranks, strict=True)
        self._failures.check(sum(failed, start=Failures()))
        metrics = tool_metrics([r for rank in everywhere for r in rank], num_correct=sum(rights))
        metrics |= {f"tool/guard/{k}": float(n) for k, n in sum(guarded, start=Counter()).items()}
        return metrics | {"tool/spent": float(self._spent), "tool/hung_threads": float(sum(hung))}

    def of_validation(self, failures: Failures) -> OutageError | ToolBudgetError | None:
        """As `settle`; why the run may not go on after a validation. Every rank calls it.

        Validations are judged apart from training: a few questions, asked in between.

        Args:
            failures: of all ranks.
        """
        try:
            self.settle()
            self._validations.check(failures)
        except (OutageError, ToolBudgetError) as error:
            return error
        return None

    def settle(self) -> None:
        """Add up what all ranks spent since the last time, share out the rest.

        Records of calls go, too: those of a validation are no metrics of the next step.

        Raises:
            ToolBudgetError: a call was not made because the budget could not pay for it.
        """
        if self.keep():
            raise ToolBudgetError(
                f"tools.budget: {self._spent} of {self._budget} is spent, and the rest, shared "
                f"among {distributed.world_size()} ranks, does not pay for the next call; raise "
                "tools.budget to go on from the last checkpoint"
            )

    def keep(self) -> bool:
        """As `settle`; whether a call was not made because the budget could not pay for it.

        For a rollout that was given up: what its calls cost is spent all the same.
        """
        own = self._ledger.settle()
        spent, exhausted = zip(*distributed.all_gather_objects(own), strict=True)
        self._ledger.drain()
        self._ledger.drain_events()
        self._spent += sum(spent, start=Decimal(0))
        self._spending.force()
        self._refill()
        return any(exhausted)

    def _refill(self) -> None:
        if self._budget is None:
            self._ledger.grant(Decimal("Infinity"))
        else:
            rest = max(Decimal(0), self._budget - self._spent)
            self._ledger.grant(rest / distributed.world_size())
