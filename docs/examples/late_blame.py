"""A credit stage: what went wrong late is blamed most.

credit=custom credit.path=late_blame:late_blame "credit.arguments={gamma: 0.5}"
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tapo_train.credit.steps import CreditRow


def late_blame(rows: Sequence[CreditRow], *, gamma: float = 0.5) -> list[npt.NDArray[np.float64]]:
    """[turns] each: a negative advantage times gamma to the number of turns that follow."""
    return [
        row.advantage * gamma ** np.arange(row.num_turns - 1, -1, -1.0)
        if row.advantage < 0
        else np.full(row.num_turns, row.advantage)
        for row in rows
    ]
