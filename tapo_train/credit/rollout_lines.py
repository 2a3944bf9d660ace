"""The lines of a corrected file."""

from __future__ import annotations

import json
from typing import Any

from tapo_train.credit.result import CreditResult, StepRecord
from tapo_train.credit.steps import CreditRow


def corrected_line(row: CreditRow, result: CreditResult, index: int) -> str:
    """One line of a corrected file: row `index` of the result, without the line end."""
    data: dict[str, Any] = {
        "id": row.id,
        "advantage": row.advantage,
        "steps": [_step(record) for record in result.steps[index]],
    }
    if result.call_advantages[index]:
        data["calls"] = [call._asdict() for call in result.call_advantages[index]]
    # ASCII only: a lone surrogate has no UTF-8 form.
    return json.dumps(data, ensure_ascii=True, allow_nan=False)


def _step(record: StepRecord) -> dict[str, Any]:
    return {
        "turn": record.turn,
        "advantage": record.advantage,
        "matched": record.matched,
        "similarity": record.similarity,
        "support": record.support,
        "reference_advantage": record.reference_advantage,
        "transfer": record.transfer,
        "gates": {"theta": record.theta, "alpha": record.alpha},
        "clipped": record.clipped,
    }
