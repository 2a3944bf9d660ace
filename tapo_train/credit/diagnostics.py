"""Diagnostics of the credit stage: how much credit was misassigned, and is the remedy sound?

Two layers. `tally` counts: additive numbers, to be summed over ranks and batches. `finish`
divides: the metrics a person reads. Failing trajectories and their eligible tool steps are the
two populations; `_mixed` restricts both to groups with at least one success, `_theta` asks for
similarity only and not for support. A step is corrected if it received a transfer (also where
beta is 0: the ratios say what is correctable).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from tapo_train.credit.actions import Role
from tapo_train.credit.audit import Audit
from tapo_train.credit.matching import Flags, Indices
from tapo_train.credit.steps import CreditRow
from tapo_train.credit.tapo import Judgement

GAP_EDGES = (1, 2, 3, 5)
GAP_BINS = ("0-1", "1-2", "2-3", "3-5", "5+")
"""Bins of the turn-gap histogram; the upper edge is not in the bin."""

Sums = defaultdict[str, float]


def tally(rows: Sequence[CreditRow], judgement: Judgement, *, audit: bool) -> dict[str, float]:
    """Additive counts of one batch."""
    sums: Sums = defaultdict(float)
    _tally_population(sums, rows, judgement)
    _tally_transfer(sums, rows, judgement)
    _tally_parts(sums, rows, judgement)
    clusters = judgement.matches.clusters
    sums["clusters"] = len(clusters)
    sums["cluster_calls"] = sum(len(cluster.members) for cluster in clusters)
    if audit:
        _tally_audit(sums, rows, judgement)
    return dict(sums)


def _tally_population(sums: Sums, rows: Sequence[CreditRow], judgement: Judgement) -> None:
    """Failing trajectories and steps, and the correctable ones among them."""
    roles, successes = judgement.actions.roles, judgement.actions.num_successes
    failing = np.array(
        [r is Role.FAILING and not row.discarded for r, row in zip(roles, rows, strict=True)],
        dtype=np.bool_,
    )
    mixed = np.array([row.group in successes for row in rows], dtype=np.bool_)
    corrected = judgement.transfer > 0.0
    for suffix, rows_in in (("", failing), ("_mixed", failing & mixed)):
        steps_in = rows_in[judgement.row]
        sums["fail_traj" + suffix] = int(rows_in.sum())
        sums["fail_steps" + suffix] = int(steps_in.sum())
        for gate, flags in (("", corrected), ("_theta", judgement.theta)):
            chosen = flags & steps_in
            sums[f"fail_steps_corrected{gate}{suffix}"] = int(chosen.sum())
            num_rows = len(np.unique(judgement.row[chosen]))
            sums[f"fail_traj_corrected{gate}{suffix}"] = num_rows


def _tally_transfer(sums: Sums, rows: Sequence[CreditRow], judgement: Judgement) -> None:
    """Means over the corrected steps."""
    chosen = judgement.transfer > 0.0
    best = judgement.best[chosen]
    base = np.array([rows[i].advantage for i in judgement.row[chosen].tolist()])
    sums["sim"] = float(judgement.matches.similarity[best].sum())
    sums["sup"] = float(judgement.matches.support[best].sum())
    sums["F"] = float(judgement.transfer[chosen].sum())
    sums["clipped"] = int(judgement.clipped.sum())
    sums["delta_adv"] = float((judgement.advantage[chosen] - base).sum())


def _tally_parts(sums: Sums, rows: Sequence[CreditRow], judgement: Judgement) -> None:
    """Calls by tool, and steps by turn."""
    given = judgement.given > 0.0
    by_tool: dict[str, list[int]] = {}
    for block in judgement.actions.blocks:
        by_tool.setdefault(block.tool, []).extend(block.queries)
    for tool, queries in by_tool.items():
        if queries:
            where = np.array(queries)
            for key in ("calls", f"by_tool/{tool}"):
                _count(sums, key, judgement.matches.theta, given, where)
    places = zip(judgement.row.tolist(), judgement.position.tolist(), strict=True)
    turns = np.array([rows[i].steps[s].turn for i, s in places], dtype=np.int64)
    for turn in np.unique(turns).tolist():
        where = np.flatnonzero(turns == turn)
        _count(sums, f"by_turn/{turn}", judgement.theta, judgement.transfer > 0.0, where)


def _count(sums: Sums, key: str, matched: Flags, corrected: Flags, where: Indices) -> None:
    sums[key + "/total"] += len(where)
    sums[key + "/matched"] += int(matched[where].sum())
    sums[key + "/corrected"] += int(corrected[where].sum())


def _tally_audit(sums: Sums, rows: Sequence[CreditRow], judgement: Judgement) -> None:
    """Observation agreement, turn gap and novelty gap of every corrected call."""
    audit = Audit(rows, judgement.actions, judgement.matches)
    corrected = np.flatnonzero(judgement.given > 0.0).tolist()
    gaps = audit.turn_gaps(corrected)
    sums["audit/calls"] = len(corrected)
    sums["audit/turn_gap"] = float(gaps.sum())
    counts = np.bincount(np.digitize(gaps, GAP_EDGES), minlength=len(GAP_BINS))
    for name, count in zip(GAP_BINS, counts.tolist(), strict=True):
        sums[f"audit/turn_gap_hist/{name}"] = count
    for query in audit.recorded(corrected):
        agreeing, pairs = audit.agreement(query)
        sums["audit/agreeing"] += agreeing
        sums["audit/pairs"] += pairs
        sums["audit/stale"] += audit.is_stale(query)


def finish(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics from counts; a ratio whose denominator is 0 is left out."""
    metrics: dict[str, float] = {}

    def ratio(name: str, above: str, below: str) -> None:
        if sums.get(below, 0.0) > 0.0:
            metrics[name] = sums.get(above, 0.0) / sums[below]

    for mixed in ("", "_mixed"):
        for kind in ("traj", "steps"):
            for gate in ("", "_theta"):
                part = f"fail_{kind}_corrected{gate}{mixed}"
                ratio(f"tapo/frac_{part}", part, f"fail_{kind}{mixed}")
            metrics[f"tapo/n_fail_{kind}{mixed}"] = float(sums.get(f"fail_{kind}{mixed}", 0.0))
    for name in ("fail_steps_corrected", "fail_traj_corrected", "clusters"):
        metrics[f"tapo/n_{name}"] = float(sums.get(name, 0.0))
    for name in ("sim", "sup", "F", "delta_adv"):
        ratio(f"tapo/{name}_mean", name, "fail_steps_corrected")
    ratio("tapo/clip_frac", "clipped", "fail_steps_corrected")
    ratio("tapo/cluster_size_mean", "cluster_calls", "clusters")
    for key, value in sums.items():
        if key.startswith(("by_tool/", "by_turn/", "calls/")):
            metrics[f"tapo/{key}"] = float(value)
        if key.startswith("audit/turn_gap_hist/"):
            metrics["credit/" + key.removeprefix("audit/")] = float(value)
    ratio("credit/observation_agreement", "audit/agreeing", "audit/pairs")
    ratio("credit/turn_gap", "audit/turn_gap", "audit/calls")
    ratio("credit/novelty_gap", "audit/stale", "audit/calls")
    return metrics
