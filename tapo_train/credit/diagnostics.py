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
    _tally_parts(sums, judgement)
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
    places = zip(judgement.row[chosen].tolist(), judgement.turn[chosen].tolist(), strict=True)
    base = np.array([rows[i].advantage_at(turn) for i, turn in places])
    sums["sim"] = float(judgement.matches.similarity[best].sum())
    sums["sup"] = float(judgement.matches.support[best].sum())
    sums["F"] = float(judgement.transfer[chosen].sum())
    sums["clipped"] = int(judgement.clipped.sum())
    sums["delta_adv"] = float((judgement.advantage[chosen] - base).sum())


def _tally_parts(sums: Sums, judgement: Judgement) -> None:
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
    for turn in np.unique(judgement.turn).tolist():
        where = np.flatnonzero(judgement.turn == turn)
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
    recorded = audit.recorded(corrected)
    sums["audit/recorded"] = len(recorded)
    for query in recorded:
        agreeing, pairs = audit.agreement(query)
        sums["audit/agreeing"] += agreeing
        sums["audit/pairs"] += pairs
        sums["audit/stale"] += audit.is_stale(query)


class _Metrics(dict[str, float]):
    """Metrics in the making, from additive counts."""

    def __init__(self, sums: Mapping[str, float]) -> None:
        super().__init__()
        self._sums = sums

    def ratio(self, name: str, above: str, below: str) -> None:
        """Add a quotient; left out where the denominator is 0 or was not counted."""
        if self._sums.get(below, 0.0) > 0.0:
            self[name] = self._sums.get(above, 0.0) / self._sums[below]

    def count(self, name: str, key: str) -> None:
        """Add a count, where there is one."""
        if key in self._sums:
            self[name] = float(self._sums[key])


def finish(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics from the counts of any assigner; ratios without a denominator are left out."""
    metrics = _Metrics(sums)
    for mixed in ("", "_mixed"):
        for kind in ("traj", "steps"):
            for gate in ("", "_theta"):
                part = f"fail_{kind}_corrected{gate}{mixed}"
                metrics.ratio(f"tapo/frac_{part}", part, f"fail_{kind}{mixed}")
            metrics.count(f"tapo/n_fail_{kind}{mixed}", f"fail_{kind}{mixed}")
    for name in ("fail_steps_corrected", "fail_traj_corrected", "clusters"):
        metrics.count(f"tapo/n_{name}", name)
    for name in ("sim", "sup", "F", "delta_adv"):
        metrics.ratio(f"tapo/{name}_mean", name, "fail_steps_corrected")
    metrics.ratio("tapo/clip_frac", "clipped", "fail_steps_corrected")
    metrics.ratio("tapo/cluster_size_mean", "cluster_calls", "clusters")
    for key in sums:
        if key.startswith(("by_tool/", "by_turn/", "calls/")):
            metrics.count(f"tapo/{key}", key)
        if key.startswith("audit/turn_gap_hist/"):
            metrics.count("credit/" + key.removeprefix("audit/"), key)
    aged = [key for key in sums if key.startswith("by_age/")]
    if not all(key.startswith("by_age/0/") for key in aged):  # else it says nothing new
        for key in aged:
            metrics.count(f"credit/{key}", key)
    metrics.ratio("credit/observation_agreement", "audit/agreeing", "audit/pairs")
    metrics.ratio("credit/turn_gap", "audit/turn_gap", "audit/calls")
    metrics.ratio("credit/novelty_gap", "audit/stale", "audit/recorded")
    metrics.count("placebo/n_steps", "placebo/steps")
    metrics.ratio("placebo/hit_frac", "placebo/hits", "placebo/steps")
    metrics.ratio("shrink/factor", "shrink/after", "shrink/before")
    metrics.count("gigpo/n_step_groups", "gigpo/step_groups")
    metrics.ratio("gigpo/frac_steps_grouped", "gigpo/grouped", "gigpo/steps")
    metrics.ratio("gigpo/step_adv_abs_mean", "gigpo/step_adv_abs", "gigpo/steps")
    return dict(metrics)
