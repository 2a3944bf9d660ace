"""Diagnostics of the credit stage: how much credit was misassigned, and is the remedy sound?

Two layers. `tally` counts: additive numbers, to be summed over ranks and batches. `finish`
divides: the metrics a person reads. Failing trajectories and their eligible tool steps are the
two populations; `_mixed` restricts both to groups with at least one success, `_theta` asks for
similarity only and not for support.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from tapo_train.credit.actions import Action, Role
from tapo_train.credit.audit import is_stale, observations_agree, turn_gap
from tapo_train.credit.result import StepRecord
from tapo_train.credit.steps import CreditRow
from tapo_train.credit.tapo import Corrected, Judged, Judgement

GAP_EDGES = (1, 2, 3, 5)
"""Upper edges of the turn-gap histogram's bins; the last bin is open."""

Sums = defaultdict[str, float]


def tally(
    rows: Sequence[CreditRow],
    judgement: Judgement,
    corrected: Mapping[int, Corrected],
    *,
    audit: bool,
) -> dict[str, float]:
    """Additive counts of one batch. `corrected` holds the failing rows by position."""
    sums: Sums = defaultdict(float)
    actions = judgement.actions
    for i, (row, part) in enumerate(zip(rows, actions.roles, strict=True)):
        if part is Role.FAILING and not row.discarded:
            mixed = row.group in actions.num_successes
            records = corrected[i].steps if i in corrected else ()
            _tally_row(sums, row, records, mixed=mixed)
    for calls in judgement.by_row.values():
        _tally_calls(sums, calls)
    sums["clusters"] = len(judgement.clusters)
    sums["cluster_calls"] = sum(len(cluster.members) for cluster in judgement.clusters)
    if audit:
        for calls in judgement.by_row.values():
            _tally_audit(sums, calls, rows)
    return dict(sums)


def _tally_row(sums: Sums, row: CreditRow, records: Iterable[StepRecord], *, mixed: bool) -> None:
    eligible = [record for record in records if record.eligible]
    matched = [record for record in eligible if record.matched]
    theta = sum(record.theta for record in eligible)
    for suffix in ("", "_mixed") if mixed else ("",):
        sums["fail_traj" + suffix] += 1
        sums["fail_steps" + suffix] += len(eligible)
        sums["fail_traj_corrected" + suffix] += bool(matched)
        sums["fail_steps_corrected" + suffix] += len(matched)
        sums["fail_traj_corrected_theta" + suffix] += bool(theta)
        sums["fail_steps_corrected_theta" + suffix] += theta
    for record in eligible:
        sums[f"by_turn/{record.turn}/total"] += 1
        sums[f"by_turn/{record.turn}/matched"] += record.theta
        sums[f"by_turn/{record.turn}/corrected"] += record.matched
    for record in matched:
        sums["sim"] += record.similarity or 0.0
        sums["sup"] += record.support or 0.0
        sums["F"] += record.transfer
        sums["clipped"] += record.clipped
        sums["delta_adv"] += record.advantage - row.advantage


def _tally_calls(sums: Sums, calls: Iterable[Judged]) -> None:
    for call in calls:
        matched = call.match is not None and call.match.theta
        for key in ("calls", f"by_tool/{call.tool}"):
            sums[key + "/total"] += 1
            sums[key + "/matched"] += matched
            sums[key + "/corrected"] += call.transfer > 0.0


def _tally_audit(sums: Sums, calls: Iterable[Judged], rows: Sequence[CreditRow]) -> None:
    for call in calls:
        if call.match is None or call.transfer <= 0.0:
            continue
        members: list[Action] = call.match.cluster.members
        agreeing, pairs = observations_agree(call.action, members, rows)
        gap = turn_gap(call.action, members, rows)
        sums["audit/agreeing"] += agreeing
        sums["audit/pairs"] += pairs
        sums["audit/calls"] += 1
        sums["audit/stale"] += is_stale(call.action, members, rows)
        sums["audit/turn_gap"] += gap
        sums[f"audit/turn_gap_hist/{_gap_bin(gap)}"] += 1


def _gap_bin(gap: float) -> str:
    """Name of the histogram bin: "0-1", "1-2", …, "5+"."""
    low = 0
    for high in GAP_EDGES:
        if gap < high:
            return f"{low}-{high}"
        low = high
    return f"{low}+"


def finish(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics from counts; a ratio whose denominator is 0 is left out."""
    get = {key: float(value) for key, value in sums.items()}
    metrics: dict[str, float] = {}

    def ratio(name: str, above: str, below: str) -> None:
        if get.get(below, 0.0) > 0.0:
            metrics[name] = get.get(above, 0.0) / get[below]

    for mixed in ("", "_mixed"):
        for kind in ("traj", "steps"):
            for gate in ("", "_theta"):
                part = f"fail_{kind}_corrected{gate}{mixed}"
                ratio(f"tapo/frac_{part}", part, f"fail_{kind}{mixed}")
            metrics[f"tapo/n_fail_{kind}{mixed}"] = get.get(f"fail_{kind}{mixed}", 0.0)
    metrics["tapo/n_fail_steps_corrected"] = get.get("fail_steps_corrected", 0.0)
    metrics["tapo/n_fail_traj_corrected"] = get.get("fail_traj_corrected", 0.0)
    for name in ("sim_mean", "sup_mean", "F_mean", "delta_adv_mean"):
        ratio(f"tapo/{name}", name.removesuffix("_mean"), "fail_steps_corrected")
    ratio("tapo/clip_frac", "clipped", "fail_steps_corrected")
    metrics["tapo/n_clusters"] = get.get("clusters", 0.0)
    ratio("tapo/cluster_size_mean", "cluster_calls", "clusters")
    for key, value in get.items():
        if key.startswith(("by_tool/", "by_turn/", "calls/")):
            metrics[f"tapo/{key}"] = value
        if key.startswith("audit/turn_gap_hist/"):
            metrics["credit/" + key.removeprefix("audit/")] = value
    ratio("credit/observation_agreement", "audit/agreeing", "audit/pairs")
    ratio("credit/turn_gap", "audit/turn_gap", "audit/calls")
    ratio("credit/novelty_gap", "audit/stale", "audit/calls")
    return metrics
