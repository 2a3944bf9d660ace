"""Tool metrics and budgets: exact over ranks, kept over resumptions."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from forked_runs import run_ranks

from tapo_train.errors import DataError, RolloutError, ToolBudgetError
from tapo_train.report.catalogue import require_known
from tapo_train.report.tool_metrics import tool_metrics
from tapo_train.rollout.failures import FailureBudget
from tapo_train.tools.ledger import CallRecord, Ledger
from tapo_train.training.audit import RolloutAudit
from tapo_train.types import Group, Outcome, Reward, StopReason, Task, Trajectory


def record(
    latency_s: float,
    *,
    tool: str = "search",
    outcome: Outcome = Outcome.OK,
    cached: bool = False,
    attempts: int = 1,
    cost: float = 0.5,
) -> CallRecord:
    return CallRecord(
        tool=tool,
        outcome=outcome,
        latency_s=latency_s,
        queue_s=latency_s / 10,
        attempts=attempts,
        cached=cached,
        cost=cost,
    )


def audit_of(ledger: Ledger, folder: Path, budget: float | None) -> RolloutAudit:
    return RolloutAudit(ledger, failures=FailureBudget(0.5), budget=budget, folder=folder)


def spent_in(folder: Path) -> Decimal:
    """The sum of what all ranks kept."""
    lines = [line for file in folder.glob("rank*.txt") for line in file.read_text().split()]
    return sum(map(Decimal, lines), start=Decimal(0))


def test_metrics_by_tool_are_those_of_all_calls() -> None:
    records = [record(second) for second in (1.0, 2.0, 3.0, 4.0)]
    records += [
        record(21.0, outcome=Outcome.TIMEOUT, attempts=3, cost=1.5),
        record(0.0, tool="zoom", cached=True, cost=0.0),
    ]
    found = tool_metrics(records, num_correct=2.0)
    assert found == {
        "tool/search/calls": 5.0,
        "tool/search/cached": 0.0,
        "tool/search/retries": 2.0,
        "tool/search/cost": 3.5,
        "tool/search/outcome/ok": 0.8,
        "tool/search/outcome/timeout": 0.2,
        "time/tool/search/latency_p50_s": 3.0,
        "time/tool/search/latency_p95_s": pytest.approx(17.6),
        "time/tool/search/latency_max_s": 21.0,
        "time/tool/search/queue_s": pytest.approx(0.62),
        "tool/zoom/calls": 1.0,
        "tool/zoom/cached": 1.0,
        "tool/zoom/retries": 0.0,
        "tool/zoom/cost": 0.0,
        "tool/zoom/outcome/ok": 1.0,
        "time/tool/zoom/latency_p50_s": 0.0,
        "time/tool/zoom/latency_p95_s": 0.0,
        "time/tool/zoom/latency_max_s": 0.0,
        "time/tool/zoom/queue_s": 0.0,
        "tool/cost": 3.5,
        "tool/cost_per_correct": 1.75,
    }
    require_known(found)
    assert tool_metrics([], num_correct=3.0) == {"tool/cost": 0.0}
    assert "tool/cost_per_correct" not in tool_metrics(records, num_correct=0.0)


def test_what_is_spent_is_kept_and_the_next_process_has_only_the_rest(tmp_path: Path) -> None:
    file, ledger = tmp_path / "spent", Ledger()
    audit = audit_of(ledger, file, 0.3)
    ledger.charge(0.1)
    found = audit([])
    assert found == {"tool/cost": 0.0, "tool/spent": 0.1, "tool/hung_threads": 0.0}
    require_known(found)
    assert spent_in(file) == Decimal("0.1")
    again = Ledger()
    audit = audit_of(again, file, 0.3)
    again.charge(0.1)
    again.charge(0.1)
    audit.settle()
    assert spent_in(file) == Decimal("0.3")
    with pytest.raises(ToolBudgetError):
        again.charge(0.1)
    with pytest.raises(ToolBudgetError, match=r"^tools\.budget: 0\.3 of 0\.3 is spent"):
        audit([])
    assert spent_in(file) == Decimal("0.3")


def test_calls_of_a_validation_are_no_metrics_of_the_next_step(tmp_path: Path) -> None:
    ledger = Ledger()
    audit = audit_of(ledger, tmp_path / "spent", None)
    ledger.add(record(9.0))
    ledger.events["private_address"] += 1
    audit.settle()
    ledger.add(record(1.0))
    found = audit([])
    assert found["tool/search/calls"] == 1.0
    assert found["time/tool/search/latency_max_s"] == 1.0
    assert not [name for name in found if name.startswith("tool/guard/")]


def test_without_prices_nothing_is_written_and_without_a_budget_nothing_ends(
    tmp_path: Path,
) -> None:
    file, ledger = tmp_path / "spent", Ledger()
    audit = audit_of(ledger, file, None)
    ledger.charge(0.0)
    audit([])
    assert not file.exists()
    ledger.charge(1e9)
    assert audit([])["tool/spent"] == 1e9


def test_attempts_that_oversampling_replaced_count_as_failures(tmp_path: Path) -> None:
    task = Task(id="q", question="?", images=(), answers=("a",))
    (answered, failed) = (
        Trajectory(
            id="t",
            task=task,
            tokens=np.zeros(3, dtype=np.int32),
            logprobs=np.zeros(0, dtype=np.float32),
            turns=(),
            images=(),
            answer=None,
            stop=stop,
            reward=Reward(total=0.0, accuracy=0.0),
        )
        for stop in (StopReason.ANSWER, StopReason.INFRA)
    )

    def step(num_lost: int) -> list[Group]:
        group = Group(task=task, trajectories=(answered,) * 16, lost=(failed,) * num_lost)
        return [group, group]

    file = tmp_path / "spent"
    audit_of(Ledger(), file, None)(step(16))
    with pytest.raises(RolloutError, match="34 of the last 66 trajectories failed"):
        audit_of(Ledger(), file, None)(step(17))


@pytest.mark.parametrize(
    "content", [b"much\n", b"0.5\n-1\n", b"0.5\n0.", b"NaN\n", b"Infinity\n", b"\n", b"\xff\n"]
)
def test_damaged_spending_is_not_taken_for_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rank0.txt").write_bytes(b"0.5\n")
    (tmp_path / "rank3.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"rank3\.txt: "):
        audit_of(Ledger(), tmp_path, 1.0)


def test_what_a_killed_process_had_bought_is_paid_for_in_the_next_one(tmp_path: Path) -> None:
    ledger = Ledger()
    audit_of(ledger, tmp_path, 1.0)
    ledger.charge(0.25)
    ledger.charge(0.5)
    ledger.give_back(0.5)
    assert (tmp_path / "rank0.txt").read_text() == "0.25\n0.5\n-0.5\n"
    # No audit came to its end.
    again = Ledger()
    audit_of(again, tmp_path, 1.0)
    again.charge(0.5)
    with pytest.raises(ToolBudgetError):
        again.charge(0.5)
    assert spent_in(tmp_path) == Decimal("0.75"), "what is not bought is not kept"


def test_what_cannot_be_kept_is_not_bought(tmp_path: Path) -> None:
    ledger = Ledger()
    audit_of(ledger, tmp_path, 1.0)
    (tmp_path / "rank0.txt").mkdir()
    with pytest.raises(OSError, match="rank0"):
        ledger.charge(0.5)
    assert ledger.spent == 0


WORKER = """
import os
import sys
from pathlib import Path
from tapo_train.errors import ToolBudgetError
from tapo_train.learner import distributed
from test_rollout_audit import audit_of, record
from tapo_train.tools.ledger import Ledger

distributed.init()
rank, ledger = distributed.rank(), Ledger()
audit = audit_of(ledger, Path(sys.argv[1]), 1.0)
for latency in ((1.0, 2.0, 3.0) if rank == 0 else (21.0,)):
    ledger.add(record(latency, cost=0.1))
    ledger.charge(0.1)
found = audit([])
said = [f"{found['tool/search/calls']:g} {found['time/tool/search/latency_p50_s']:g}"]
said.append(f"{found['tool/cost']:g} {found['tool/spent']:g} {ledger._purse}")
try:
    if rank == 1:
        ledger.charge(0.31)
except ToolBudgetError:
    said.append("not made")
try:
    audit.settle()
except ToolBudgetError as error:
    said.append(str(error)[:29])
sys.stdout.write(f"{rank}: {'; '.join(said)}\\n")
sys.stdout.flush()
distributed.barrier()
if rank == 1:
    ledger.charge(0.1)
    os._exit(0)
"""


@pytest.mark.slow
def test_two_ranks_share_what_is_left_and_stop_together(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    said = run_ranks(2, worker, tmp_path / "spent", deadline_s=100)
    stop = "tools.budget: 0.4 of 1.0 is s"
    assert sorted(said.splitlines()) == [
        f"0: 4 2.5; 0.4 0.4 0.3; {stop}",
        f"1: 4 2.5; 0.4 0.4 0.3; not made; {stop}",
    ]
    assert spent_in(tmp_path / "spent") == Decimal("0.5"), "rank 1 was killed after its last call"
    assert Decimal("0.3") == (Decimal("1.0") - Decimal("0.4")) / 2


def test_what_a_rollout_cost_that_was_given_up_is_kept_without_an_error(tmp_path: Path) -> None:
    file, ledger = tmp_path / "spent", Ledger()
    audit = audit_of(ledger, file, 0.3)
    ledger.charge(0.2)
    assert not audit.keep()
    assert spent_in(file) == Decimal("0.2")
    with pytest.raises(ToolBudgetError):
        ledger.charge(0.2)
    assert audit.keep()
    assert spent_in(file) == Decimal("0.2")


def test_what_is_paid_while_accounts_are_settled_is_in_the_next_sum() -> None:
    ledger = Ledger()
    ledger.fill(Decimal(9))
    ledger.charge(1.0)
    assert ledger.settle() == (1, False)
    ledger.charge(2.0)  # the ranks are still adding up
    ledger.grant(Decimal(3))
    assert ledger.spent == 2
    ledger.charge(1.0)
    with pytest.raises(ToolBudgetError):
        ledger.charge(1.0)
    assert ledger.settle() == (3, True)
