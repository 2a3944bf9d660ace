"""Clusters of a block with support and reference advantage, and each failing call's match."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tapo_train.credit.actions import Action, Block
from tapo_train.credit.library import cluster, row_chunks
from tapo_train.credit.options import TapoOptions
from tapo_train.credit.setsim import Rows
from tapo_train.credit.similarity import Similarity
from tapo_train.credit.steps import CreditRow

Floats = npt.NDArray[np.float64]


class Cluster(NamedTuple):
    """One reference action: equivalent calls of successful trajectories."""

    members: list[Action]
    support: float
    """Share of the successful trajectories that contain it, in (0, 1]."""
    advantage: float
    """Aggregated advantage of those trajectories."""


class Match(NamedTuple):
    """A failing call's best cluster and what the gates say."""

    cluster: Cluster
    similarity: float
    theta: bool
    alpha: bool
    transfer: float
    """similarity x support x reference advantage; 0 behind a closed gate."""


def build_clusters(
    block: Block,
    labels: Sequence[int],
    rows: Sequence[CreditRow],
    num_successes: dict[str, int],
    options: TapoOptions,
) -> list[Cluster]:
    """Clusters in order of their labels; `labels` has one entry per library call."""
    members: list[list[Action]] = [[] for _ in range(max(labels) + 1)]
    for action, label in zip(block.library, labels, strict=True):
        members[label].append(action)
    clusters = []
    for actions in members:
        distinct = {action.row for action in actions}
        groups = {rows[i].group for i in distinct}
        support = len(distinct) / sum(num_successes[group] for group in groups)
        values = [rows[i].advantage for i in distinct]
        if options.adv_agg == "mean_step":
            values = [rows[action.row].advantage for action in actions]
        clusters.append(Cluster(actions, support, _aggregate(values, options.adv_agg)))
    return clusters


def _aggregate(values: list[float], kind: str) -> float:
    if kind == "max":
        return max(values)
    if kind == "min":
        return min(values)
    # fsum is exactly rounded, hence independent of the order of the trajectories.
    return math.fsum(values) / len(values)


def match_block(
    block: Block,
    similarity: Similarity,
    rows: Sequence[CreditRow],
    num_successes: dict[str, int],
    options: TapoOptions,
) -> tuple[list[Cluster], list[Match]]:
    """All clusters of a block, and the match of each of its queries in order."""
    position: dict[object, int] = {}
    library = [position.setdefault(a.key, len(position)) for a in block.library]
    references = len(position)
    queries = [position.setdefault(a.key, len(position)) for a in block.queries]
    compare = _remember(similarity.space(list(position), references), len(position), references)
    threshold = options.cluster_theta_of(block.tool)
    by_key = cluster(compare, references, threshold=threshold, linkage=options.cluster)
    labels = [by_key[i] for i in library]
    clusters = build_clusters(block, labels, rows, num_successes, options)
    if not queries:
        return clusters, []
    matches = _best(compare, len(position), by_key, clusters, options, block.tool)
    return clusters, [matches[i] for i in queries]


def _remember(compare: Rows, count: int, references: int) -> Rows:
    """Compute a matrix that fits one chunk only once."""
    if len(row_chunks(count, references)) > 1:
        return compare
    values = compare(0, count)
    return lambda low, high: values[low:high]


def _best(
    compare: Rows,
    count: int,
    by_key: Sequence[int],
    clusters: Sequence[Cluster],
    options: TapoOptions,
    tool: str,
) -> list[Match]:
    """The match of every key.

    sim(c, C) is the maximum over the members of C. Ties go to higher support, then higher
    reference advantage, then the first cluster: columns are put in that order and argmax takes
    the first maximum.
    """
    support = [c.support if options.use_support else 1.0 for c in clusters]
    ranked = sorted(range(len(clusters)), key=lambda c: (-support[c], -clusters[c].advantage, c))
    rank = {c: r for r, c in enumerate(ranked)}
    ranks = [rank[label] for label in by_key]
    columns = np.array(sorted(range(len(by_key)), key=ranks.__getitem__))
    starts = np.searchsorted(np.array(sorted(ranks)), np.arange(len(clusters)))
    sup = np.array([support[c] for c in ranked])
    adv = np.array([clusters[c].advantage for c in ranked])
    matches: list[Match] = []
    for low, high in row_chunks(count, len(by_key)):
        values = compare(low, high)
        nearest = np.maximum.reduceat(values[:, columns], starts, axis=1)
        best = (nearest * sup if options.match_by == "sim_sup" else nearest).argmax(axis=1)
        sim = nearest[np.arange(high - low), best]
        theta, alpha, transfer = gates(sim, sup[best], adv[best], options, tool)
        found = [clusters[ranked[b]] for b in best.tolist()]
        columns_of_match = (sim.tolist(), theta.tolist(), alpha.tolist(), transfer.tolist())
        matches += map(Match, found, *columns_of_match)
    return matches


def gates(
    sim: Floats, sup: Floats, adv: Floats, options: TapoOptions, tool: str
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], Floats]:
    """Both gates (inclusive) and the transfer F, elementwise.

    F is 0 behind a closed gate, and never negative: a cluster whose members were no better than
    average has nothing to give.
    """
    confidence = sim * sup
    theta = sim >= options.theta_of(tool)
    alpha = confidence >= options.alpha_min
    weight = confidence if options.use_sim_weight else sup
    transfer = np.where(theta & alpha, weight * np.maximum(adv, 0.0), 0.0)
    return theta, alpha, transfer
