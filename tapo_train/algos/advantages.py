"""Rewards [N] to advantages [N], in numpy float64 (no torch: the analyser uses it too).

`group` says which rows answer the same task. `leave_out` marks rows that failed
outside the policy: they take no part in any mean, deviation or count, their
reward is never read, and their advantage is 0.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from tapo_train.errors import ConfigError, CreditError

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

AdvantageKind = Literal[
    "grpo", "mean_only", "leave_one_out", "reinforce_pp", "reinforce_pp_baseline"
]
StdKind = Literal["unbiased", "population"]

_ROUNDING = 1e-12
"""A mean below this share of the largest value is 0."""


def group_advantages(
    rewards: npt.ArrayLike,
    group: npt.ArrayLike,
    *,
    kind: AdvantageKind = "grpo",
    std: StdKind = "unbiased",
    eps: float = 1e-6,
    leave_out: npt.ArrayLike | None = None,
    weights: npt.ArrayLike | None = None,
) -> Floats:
    """One advantage per trajectory, relative to its group or to the batch.

        grpo                   (r - mean_g) / (std_g + eps)          GRPO, 2402.03300
        mean_only              r - mean_g                            Dr. GRPO, 2503.20783
        leave_one_out          r - mean of the group's other rows    RLOO, 2402.14740
        reinforce_pp           (r - mean_b) / (std_b + eps)          REINFORCE++, 2501.03262
        reinforce_pp_baseline  (a - mean_b(a)) / (std_b(a) + eps), a = r - mean_g

    A group (for the batch kind: a batch) with fewer than two rows, or with equal
    rewards, gets exactly 0. Deviates from verl on purpose: there a lone row keeps
    its raw reward as advantage.

    The two REINFORCE++ kinds use statistics of the batch: hand in the rows of ALL
    ranks and take your own out of the result.

    Args:
        rewards: [N] finite numbers (rows that are left out may hold anything).
        group: [N] integers or strings.
        std: divisor n - 1 (verl, TRL) or n (the GRPO paper does not say).
        eps: added to the standard deviation [reward].
        leave_out: [N] booleans; None leaves none out.
        weights: [N] weight of each row in the batch statistics, e.g. its number of
            trained tokens (REINFORCE++ normalises over tokens); None weighs rows alike.

    Raises:
        CreditError: shapes differ, a reward is not finite, a weight is not positive.
        ConfigError: unknown `kind` or `std`.
    """
    values, kept = _checked(rewards, leave_out, where="group_advantages")
    index, num_groups = _group_index(group, values.shape[0])
    if kind not in get_args(AdvantageKind):
        raise ConfigError(f"advantage kind is {kind!r}; wanted one of {get_args(AdvantageKind)}")
    if kind == "reinforce_pp":
        return _standardised(values, kept, weights, std=std, eps=eps)
    counts = np.bincount(index[kept], minlength=num_groups).astype(np.float64)
    centred = _centred(values, index, kept, counts)
    if kind == "grpo":
        return _divided_by_std(centred, index, counts, std=std, eps=eps)
    if kind == "leave_one_out":
        scale: Floats = counts / np.maximum(counts - 1, 1)
        return np.asarray(centred * scale[index], dtype=np.float64)
    if kind == "reinforce_pp_baseline":
        return _standardised(centred, kept, weights, std=std, eps=eps)
    return centred


def batch_renorm(
    values: npt.ArrayLike, *, leave_out: npt.ArrayLike | None = None, eps: float = 1e-9
) -> Floats:
    """Batch z-score of advantages: (a - mean) / (population std + eps), [N] -> [N].

    The BN of BN-GSPO (SenseNova-MARS, 2512.24330), applied after the group
    normalisation and before the credit stage. As group-normalised advantages sum
    to 0 it only rescales them. Hand in the rows of all ranks.
    """
    numbers, kept = _checked(values, leave_out, where="batch_renorm")
    return _standardised(numbers, kept, None, std="population", eps=eps)


def informative_rows(
    scores: npt.ArrayLike, group: npt.ArrayLike, *, leave_out: npt.ArrayLike | None = None
) -> Mask:
    """[N] rows of groups whose scores differ: the filter of dynamic sampling (DAPO).

    A group with fewer than two rows left, or with equal scores, teaches nothing and
    is dropped whole. Rows that are left out are False.
    """
    values, kept = _checked(scores, leave_out, where="informative_rows")
    index, num_groups = _group_index(group, values.shape[0])
    return _differs(values, index, kept, num_groups)[index] & kept


def _checked(
    values: npt.ArrayLike, leave_out: npt.ArrayLike | None, *, where: str
) -> tuple[Floats, Mask]:
    """`values` as float64 with 0 in the rows left out, and the mask of rows kept."""
    numbers = np.array(values, dtype=np.float64)
    kept = np.ones(numbers.shape, dtype=np.bool_)
    if leave_out is not None:
        kept = ~np.asarray(leave_out, dtype=np.bool_)
    if numbers.ndim != 1 or kept.shape != numbers.shape:
        raise CreditError(
            f"{where}: values have shape {numbers.shape}, leave_out {kept.shape}; wanted [N] both"
        )
    numbers[~kept] = 0.0
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if wrong.size:
        raise CreditError(
            f"{where}: row {wrong[0]} holds {numbers[wrong[0]]} ({wrong.size} such rows); "
            "wanted finite numbers"
        )
    return numbers, kept


def _group_index(group: npt.ArrayLike, num_rows: int) -> tuple[npt.NDArray[np.intp], int]:
    """[N] dense group index and the number of groups."""
    labels = np.asarray(group)
    if labels.shape != (num_rows,):
        raise CreditError(f"group has shape {labels.shape}; wanted ({num_rows},), one per reward")
    names, index = np.unique(labels, return_inverse=True)
    return index, len(names)


def _differs(values: Floats, index: npt.NDArray[np.intp], kept: Mask, num_groups: int) -> Mask:
    """[num_groups] True where the rows kept do not all hold the same number."""
    lowest = np.full(num_groups, np.inf)
    highest = np.full(num_groups, -np.inf)
    np.minimum.at(lowest, index[kept], values[kept])
    np.maximum.at(highest, index[kept], values[kept])
    return highest > lowest


def _centred(values: Floats, index: npt.NDArray[np.intp], kept: Mask, counts: Floats) -> Floats:
    """[N] values minus their group's mean; exactly 0 in groups of equal values."""
    means = np.bincount(index, weights=values, minlength=len(counts)) / np.maximum(counts, 1)
    # Equal rewards are asked for by comparison: their mean may be off by one rounding,
    # which the division by std + eps would blow up.
    informative = _differs(values, index, kept, len(counts))[index] & kept
    return np.where(informative, values - means[index], 0.0)


def _divided_by_std(
    centred: Floats, index: npt.NDArray[np.intp], counts: Floats, *, std: StdKind, eps: float
) -> Floats:
    """[N] centred values over their group's standard deviation plus eps."""
    squares = np.bincount(index, weights=centred**2, minlength=len(counts))
    deviation = np.sqrt(squares / np.maximum(counts - _lost_degrees(std), 1))
    return np.asarray(centred / (deviation[index] + eps), dtype=np.float64)


def _standardised(
    values: Floats, kept: Mask, weights: npt.ArrayLike | None, *, std: StdKind, eps: float
) -> Floats:
    """[N] (values - mean) / (std + eps) over the rows kept, weighted by frequency."""
    weight = np.where(kept, 1.0 if weights is None else np.asarray(weights, dtype=np.float64), 0.0)
    if not np.all(weight[kept] > 0) or not np.all(np.isfinite(weight)):
        raise CreditError("weights of the rows kept must be finite and positive")
    one_group = np.zeros(len(values), dtype=np.intp)
    if not _differs(values, one_group, kept, 1)[0]:
        return np.zeros_like(values)
    total = weight.sum()
    mean = (weight * values).sum() / total
    # Values that were centred before have a mean of a rounding or two. Taking it away would give
    # the zeros of uniform groups a sign, and the credit stage goes by the sign.
    mean = 0.0 if abs(mean) <= _ROUNDING * np.abs(values).max() else mean
    centred = np.where(kept, values - mean, 0.0)
    variance = (weight * centred**2).sum() / max(total - _lost_degrees(std), 1.0)
    return np.asarray(centred / (np.sqrt(variance) + eps), dtype=np.float64)


def _lost_degrees(std: StdKind) -> int:
    """Degrees of freedom the standard deviation loses: 1 or 0."""
    if std not in get_args(StdKind):
        raise ConfigError(f"std is {std!r}; wanted one of {get_args(StdKind)}")
    return 1 if std == "unbiased" else 0
