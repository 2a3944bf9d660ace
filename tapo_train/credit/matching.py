"""Clusters with support and reference advantage, and the best cluster of each failing call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tapo_train.credit.actions import Actions, Block, Reader
from tapo_train.credit.library import cluster, row_chunks
from tapo_train.credit.options import TapoOptions
from tapo_train.credit.setsim import Rows
from tapo_train.credit.steps import CreditRow

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]


class Cluster(NamedTuple):
    """One reference action: equivalent calls of successful trajectories."""

    members: list[int]
    """Positions in `Actions.library`."""
    support: float
    """Share of the successful trajectories that contain it, in (0, 1]."""
    advantage: float
    """Aggregated advantage of those trajectories."""


@dataclass(slots=True)
class Matches:
    """The best cluster of each query and what the gates say, as columns [Q]."""

    clusters: list[Cluster]
    cluster: Indices
    """Position in `clusters`; -1 where no success used the tool."""
    similarity: Floats
    """NaN where there is no cluster; so are support and advantage."""
    support: Floats
    advantage: Floats
    theta: Flags
    alpha: Flags
    transfer: Floats
    """similarity x support x reference advantage; 0 behind a closed gate."""


def match(
    actions: Actions, rows: Sequence[CreditRow], options: TapoOptions, reader: Reader
) -> Matches:
    """Build the libraries and match every query with them."""
    count = len(actions.queries.row)
    clusters: list[Cluster] = []
    # Of the queries of one block after the other.
    place, theta_of = [], []
    best_of, similarity_of = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    for block in actions.blocks:
        if not block.library:
            continue
        found, labels, values = _match_block(block, actions, rows, options, reader)
        place += block.queries
        theta_of += [options.theta_of(block.tool)] * len(block.queries)
        best_of.append(labels + len(clusters))
        similarity_of.append(values)
        clusters += found
    best = np.full(count, -1, dtype=np.int64)
    similarity, theta = np.full((2, count), np.nan)
    best[place] = np.concatenate(best_of)
    similarity[place] = np.concatenate(similarity_of)
    theta[place] = theta_of
    # The last entry is what index -1 finds.
    support = np.array([c.support for c in clusters] + [np.nan])[best]
    advantage = np.array([c.advantage for c in clusters] + [np.nan])[best]
    gates = apply_gates(similarity, support, advantage, theta, options)
    return Matches(clusters, best, similarity, support, advantage, *gates)


def apply_gates(
    similarity: Floats, support: Floats, advantage: Floats, theta: Floats, options: TapoOptions
) -> tuple[Flags, Flags, Floats]:
    """(theta gate, alpha gate, transfer F), elementwise; both gates are inclusive.

    F is 0 behind a closed gate, and never negative: a cluster whose members were no better than
    average has nothing to give. NaN stands for no cluster and closes both gates.
    """
    confidence = similarity * support if options.use_support else similarity
    if options.use_sim_weight:
        weight = confidence
    else:
        weight = support if options.use_support else np.ones_like(support)
    close_enough = similarity >= theta
    confident = confidence >= options.alpha_min
    with np.errstate(invalid="ignore"):
        given = weight * np.maximum(advantage, 0.0)
    return close_enough, confident, np.where(close_enough & confident, given, 0.0)


def _match_block(
    block: Block,
    actions: Actions,
    rows: Sequence[CreditRow],
    options: TapoOptions,
    reader: Reader,
) -> tuple[list[Cluster], Indices, Floats]:
    """Clusters of a block; per query the index of its best cluster and the similarity."""
    position: dict[object, int] = {}
    library_keys, query_keys = actions.library.key, actions.queries.key
    library = [position.setdefault(library_keys[i], len(position)) for i in block.library]
    references = len(position)
    where = [position.setdefault(query_keys[i], len(position)) for i in block.queries]
    if len(position) == 1:
        # Everyone asked for the same, as with tools that take no arguments.
        clusters = _build(block, [0] * len(library), actions, rows, options)
        return clusters, np.zeros(len(where), dtype=np.int64), np.ones(len(where))
    space = reader.similarity(block.tool).space(list(position), references)
    compare = _remember(space, len(position), references)
    threshold = options.cluster_theta_of(block.tool)
    labels = cluster(compare, references, threshold=threshold, linkage=options.cluster)
    clusters = _build(block, [labels[i] for i in library], actions, rows, options)
    best, values = _nearest(compare, len(position), labels, clusters, options)
    queries = np.array(where, dtype=np.int64)
    return clusters, best[queries], values[queries]


def _remember(compare: Rows, count: int, references: int) -> Rows:
    """Compute a matrix that fits one chunk only once."""
    if len(row_chunks(count, references)) > 1:
        return compare
    values = compare(0, count)
    return lambda low, high: values[low:high]


def _build(
    block: Block,
    labels: Sequence[int],
    actions: Actions,
    rows: Sequence[CreditRow],
    options: TapoOptions,
) -> list[Cluster]:
    """Clusters in order of their labels; `labels` has one entry per library call."""
    members: list[list[int]] = [[] for _ in range(max(labels) + 1)]
    for i, label in zip(block.library, labels, strict=True):
        members[label].append(i)
    return [_cluster(calls, actions, rows, options) for calls in members]


def _cluster(
    members: list[int], actions: Actions, rows: Sequence[CreditRow], options: TapoOptions
) -> Cluster:
    num_successes = actions.num_successes
    if len(members) == 1:
        row = rows[actions.library.row[members[0]]]
        return Cluster(members, 1 / num_successes[row.group], row.advantage)
    owners = [actions.library.row[i] for i in members]
    distinct = set(owners)
    # In a library of the whole batch a cluster may span groups; each counts with its own |S|.
    total = sum([num_successes[group] for group in {rows[i].group for i in distinct}])
    values = [rows[i].advantage for i in (owners if options.adv_agg == "mean_step" else distinct)]
    return Cluster(members, len(distinct) / total, _aggregate(values, options.adv_agg))


def _aggregate(values: list[float], kind: str) -> float:
    if kind == "max":
        return max(values)
    if kind == "min":
        return min(values)
    # fsum is exactly rounded, hence independent of the order of the trajectories.
    return math.fsum(values) / len(values)


def _nearest(
    compare: Rows,
    count: int,
    labels: Sequence[int],
    clusters: Sequence[Cluster],
    options: TapoOptions,
) -> tuple[Indices, Floats]:
    """Per key, the index of its best cluster and sim(c, C) = max over the members of C.

    The cluster of the most similar reference is the most similar cluster. Ties go to higher
    support, then higher reference advantage, then the first cluster: references are put in that
    order, and argmax takes the first maximum.
    """
    label = np.array(labels)
    support = np.array([c.support for c in clusters])[label]
    if not options.use_support:
        support = np.ones_like(support)
    advantage = np.array([c.advantage for c in clusters])[label]
    order = np.lexsort((label, -advantage, -support))
    best = np.empty(count, dtype=np.int64)
    similarity = np.empty(count)
    for low, high in row_chunks(count, len(labels)):
        values = compare(low, high)
        score = values * support if options.match_by == "sim_sup" else values
        reference = order[score[:, order].argmax(axis=1)]
        best[low:high] = label[reference]
        similarity[low:high] = values[np.arange(high - low), reference]
    return best, similarity
