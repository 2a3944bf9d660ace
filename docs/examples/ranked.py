"""An advantage: the place among the attempts at the question, whatever the rewards' scale.

algo.advantage.custom=ranked:ranked
"""

from __future__ import annotations

from collections.abc import Sequence

from tapo_train.algos.turn_advantages import RewardRow


def ranked(rows: Sequence[RewardRow]) -> list[float]:
    """In [-1, 1]: attempts that it beats minus attempts that beat it, over the number of others."""
    found = []
    for row in rows:
        others = [other.total for other in rows if other.group == row.group and not other.left_out]
        beaten = sum(total < row.total for total in others)
        better = sum(total > row.total for total in others)
        alone = row.left_out or len(others) == 1
        found.append(0.0 if alone else (beaten - better) / (len(others) - 1))
    return found
