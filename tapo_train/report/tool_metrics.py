"""What tool calls took and cost, from the records of all ranks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from tapo_train.tools.ledger import CallRecord

__all__ = ["tool_metrics"]


def tool_metrics(records: Sequence[CallRecord], *, num_correct: float) -> dict[str, float]:
    """Metrics by tool over all calls of a step.

    Args:
        records: of all ranks; quantiles are those of the calls, not means of quantiles.
        num_correct: right answers of the step on all ranks, partly right ones in part.
    """
    metrics: dict[str, float] = {}
    for tool in sorted({record.tool for record in records}):
        metrics |= _of_tool(tool, [record for record in records if record.tool == tool])
    cost = math.fsum(record.cost for record in records)
    metrics["tool/cost"] = cost
    if cost and num_correct:
        metrics["tool/cost_per_correct"] = cost / num_correct
    return metrics


def _of_tool(tool: str, records: Sequence[CallRecord]) -> dict[str, float]:
    num = len(records)
    latency = np.array([record.latency_s for record in records])
    p50, p95 = np.quantile(latency, (0.5, 0.95))
    outcomes = Counter(record.outcome for record in records)
    return {
        f"tool/{tool}/calls": float(num),
        f"tool/{tool}/cached": sum(record.cached for record in records) / num,
        f"tool/{tool}/retries": float(sum(record.attempts for record in records) - num),
        f"tool/{tool}/cost": math.fsum(record.cost for record in records),
        **{f"tool/{tool}/outcome/{kind}": count / num for kind, count in outcomes.items()},
        f"time/tool/{tool}/latency_p50_s": float(p50),
        f"time/tool/{tool}/latency_p95_s": float(p95),
        f"time/tool/{tool}/latency_max_s": float(latency.max()),
        f"time/tool/{tool}/queue_s": math.fsum(record.queue_s for record in records) / num,
    }
