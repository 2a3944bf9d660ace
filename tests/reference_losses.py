"""Losses, averages, advantages and weights written a second time, from the papers.

Plain Python floats and loops over padded sequences with a 0/1 mask, one formula at a
time. It shares no code and no frame with the package: here masks exist and may hide
anything (-inf, nan), there the tokens are flat and masked ones do not occur.
"""

from __future__ import annotations

import math
import statistics

Rows = list[list[float]]
Mask = list[list[int]]


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def grpo_token(
    logp: float, old: float, advantage: float, low: float, high: float, dual: float | None
) -> float:
    ratio = math.exp(clip(logp - old, -20.0, 20.0))
    objective = min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)
    if dual is not None and advantage < 0:
        objective = max(objective, dual * advantage)
    return -objective


def sapo_token(logp: float, old: float, advantage: float, tau_pos: float, tau_neg: float) -> float:
    ratio = math.exp(clip(logp - old, -20.0, 20.0))
    tau = tau_pos if advantage > 0 else tau_neg
    return -4.0 / tau / (1.0 + math.exp(-tau * (ratio - 1.0))) * advantage


def gspo_sequence(
    logp: list[float],
    frozen: list[float],
    old: list[float],
    advantages: list[float],
    mask: list[int],
    low: float,
    high: float,
) -> list[float]:
    """GSPO-token, eq. 13-14: `frozen` is the value of `logp` under the stop-gradient."""
    kept = [t for t, m in enumerate(mask) if m]
    if not kept:
        return [0.0] * len(mask)
    mean_log_ratio = sum(frozen[t] - old[t] for t in kept) / len(kept)
    sequence_ratio = math.exp(min(mean_log_ratio, 10.0))
    losses = [0.0] * len(mask)
    for t in kept:
        ratio = sequence_ratio * math.exp(logp[t]) / math.exp(frozen[t])
        a = advantages[t]
        losses[t] = -min(ratio * a, clip(ratio, 1 - low, 1 + high) * a)
    return losses


def gmpo_sequence(
    logp: list[float],
    frozen: list[float],
    old: list[float],
    advantages: list[float],
    mask: list[int],
    low: float,
    high: float,
) -> list[float]:
    """GMPO, eq. 4, in token form: the mean is a constant, a free token carries the gradient."""
    kept = [t for t, m in enumerate(mask) if m]
    if not kept:
        return [0.0] * len(mask)
    held = {}
    for t in kept:
        d = frozen[t] - old[t]
        held[t] = min(d, high) if advantages[t] > 0 else max(d, -low)
    mean = math.exp(math.fsum(held.values()) / len(kept))
    losses = [0.0] * len(mask)
    for t in kept:
        is_free = held[t] == frozen[t] - old[t]
        losses[t] = -advantages[t] * mean * (math.exp(logp[t] - frozen[t]) if is_free else 1.0)
    return losses


def cispo_token(
    logp: float, frozen: float, old: float, advantage: float, low: float, high: float
) -> float:
    """CISPO, eq. 4: the clipped ratio is a weight under the stop-gradient."""
    weight = clip(math.exp(clip(frozen - old, -20.0, 20.0)), 1 - low, 1 + high)
    return -weight * advantage * logp


def gmpo_plain(
    logp: list[float], old: list[float], advantage: float, low: float, high: float
) -> float:
    """GMPO, eq. 4, of one sequence: (prod_t |min(r A, clip(r) A)|)^(1/T) sgn(A), as a loss."""
    product = 1.0
    for a, b in zip(logp, old, strict=True):
        ratio = math.exp(a - b)
        held = clip(ratio, math.exp(-low), math.exp(high))
        product *= abs(min(ratio * advantage, held * advantage))
    return -(product ** (1 / len(logp))) * math.copysign(1.0, advantage)


def gspo_plain(
    logp: list[float], old: list[float], advantage: float, low: float, high: float
) -> float:
    """Plain GSPO, eq. 5-7, of one sequence without masked tokens."""
    ratio = math.exp(sum(a - b for a, b in zip(logp, old, strict=True)) / len(logp))
    return -min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)


def token_losses(
    name: str, logp: Rows, old: Rows, advantages: Rows, mask: Mask, *, frozen: Rows | None = None
) -> Rows:
    """Per-token losses with the settings of `algos_batches.LOSSES`; 0 where masked."""
    frozen = logp if frozen is None else frozen
    result = []
    for i, row in enumerate(mask):
        if name == "gspo":
            result.append(gspo_sequence(logp[i], frozen[i], old[i], advantages[i], row, 3e-4, 4e-4))
            continue
        if name == "gmpo":
            result.append(gmpo_sequence(logp[i], frozen[i], old[i], advantages[i], row, 0.4, 0.4))
            continue
        losses = [0.0] * len(row)
        for t, kept in enumerate(row):
            if kept and name == "grpo":
                losses[t] = grpo_token(logp[i][t], old[i][t], advantages[i][t], 0.2, 0.28, 3.0)
            elif kept and name == "sapo":
                losses[t] = sapo_token(logp[i][t], old[i][t], advantages[i][t], 1.0, 1.05)
            elif kept and name == "cispo":
                numbers = (logp[i][t], frozen[i][t], old[i][t], advantages[i][t])
                losses[t] = cispo_token(*numbers, 1.0, 1.0)
        result.append(losses)
    return result


def average(losses: Rows, mask: Mask, mode: str, norm_length: float) -> float:
    """The step-wide mean of a whole, uncut batch; fully masked sequences do not count."""
    sums, lengths = [], []
    for row, kept in zip(losses, mask, strict=True):
        values = [value for value, m in zip(row, kept, strict=True) if m]
        if values:
            sums.append(math.fsum(values))
            lengths.append(len(values))
    if mode == "token-mean":
        return math.fsum(sums) / sum(lengths)
    if mode == "seq-mean-token-mean":
        return math.fsum(s / n for s, n in zip(sums, lengths, strict=True)) / len(sums)
    if mode == "seq-mean-token-sum":
        return math.fsum(sums) / len(sums)
    assert mode == "seq-mean-token-sum-norm", mode
    return math.fsum(sums) / len(sums) / norm_length


def advantages(
    rewards: list[float], group: list[int], *, kind: str, std: str = "unbiased", eps: float = 1e-6
) -> list[float]:
    if kind == "bn":
        return _standardised(advantages(rewards, group, kind="grpo"), "population", 1e-9)
    if kind == "reinforce_pp":
        return _standardised(rewards, std, eps)
    result = []
    for reward, own in zip(rewards, group, strict=True):
        members = [r for r, g in zip(rewards, group, strict=True) if g == own]
        if len(members) == 1:
            result.append(0.0)
        elif kind == "grpo":
            deviation = (
                statistics.stdev(members) if std == "unbiased" else statistics.pstdev(members)
            )
            result.append((reward - statistics.fmean(members)) / (deviation + eps))
        elif kind == "leave_one_out":
            result.append(reward - (math.fsum(members) - reward) / (len(members) - 1))
        else:
            result.append(reward - statistics.fmean(members))
    if kind == "reinforce_pp_baseline":
        return _standardised(result, std, eps)
    return result


def _standardised(values: list[float], std: str, eps: float) -> list[float]:
    deviation = statistics.stdev(values) if std == "unbiased" else statistics.pstdev(values)
    mean = statistics.fmean(values)
    return [(value - mean) / (deviation + eps) for value in values]


def importance_weights(
    learner: Rows, sampler: Rows, mask: Mask, *, form: str, level: str, low: float, high: float
) -> Rows:
    """Weights of the trained tokens; 0 where masked."""
    result = []
    for i, row in enumerate(mask):
        kept = [t for t, m in enumerate(row) if m]
        total = math.fsum(learner[i][t] - sampler[i][t] for t in kept)
        weights = [0.0] * len(row)
        for t in kept:
            log_weight = total if level == "sequence" else learner[i][t] - sampler[i][t]
            weight = math.exp(clip(log_weight, -20.0, 20.0))
            if form == "truncate":
                weight = min(weight, high)
            elif not low <= weight <= high:
                weight = 0.0
            weights[t] = weight
        result.append(weights)
    return result


def geometric_weights(
    learner: Rows, sampler: Rows, mask: Mask, *, low: float, high: float, cap: float
) -> Rows:
    """Capped token weights of the trajectories whose geometric mean ratio lies within bounds."""
    result = []
    for i, row in enumerate(mask):
        kept = [t for t, m in enumerate(row) if m]
        mean = 1.0
        for t in kept:
            mean *= math.exp(learner[i][t] - sampler[i][t]) ** (1 / len(kept))
        inside = low <= mean <= high
        weights = [0.0] * len(row)
        for t in kept:
            ratio = math.exp(learner[i][t]) / math.exp(sampler[i][t])
            weights[t] = min(ratio, cap) if inside else 0.0
        result.append(weights)
    return result


def total_variation_weights(
    learner: Rows, sampler: Rows, current: Rows, advantages: Rows, mask: Mask, *, delta: float
) -> Rows:
    """DPPO's mask by cases: a token is left out where its update would lead further away."""
    result = []
    for i, row in enumerate(mask):
        weights = [0.0] * len(row)
        for t, kept in enumerate(row):
            if not kept:
                continue
            pi, mu, sign = math.exp(current[i][t]), math.exp(sampler[i][t]), advantages[i][t]
            too_far = abs(pi - mu) > delta
            leads_on = (sign > 0 and pi > mu) or (sign < 0 and pi < mu)
            ratio = math.exp(learner[i][t]) / mu
            weights[t] = 0.0 if too_far and leads_on else ratio
        result.append(weights)
    return result


def log_linear(current: list[float], sampler: list[float], ages: list[int]) -> list[float]:
    """log pi_old between the versions v_behave = -age, v_old = 0 and v_current = 1."""
    found = []
    for theta, behave, age in zip(current, sampler, ages, strict=True):
        v_behave, v_old, v_theta = -age, 0, 1
        found.append(
            (behave * (v_theta - v_old) + theta * (v_old - v_behave)) / (v_theta - v_behave)
        )
    return found


def slopes(name: str, logp: Rows, old: Rows, advantages: Rows, mask: Mask) -> Rows:
    """Derivative of each token's loss by its own log-probability, by central differences."""
    step = 1e-6
    up = [[value + step for value in row] for row in logp]
    down = [[value - step for value in row] for row in logp]
    above = token_losses(name, up, old, advantages, mask, frozen=logp)
    below = token_losses(name, down, old, advantages, mask, frozen=logp)
    return [
        [(a - b) / (2 * step) for a, b in zip(ups, downs, strict=True)]
        for ups, downs in zip(above, below, strict=True)
    ]
