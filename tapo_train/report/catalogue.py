"""Every metric a run may log, and what it means in one line.

A name is `group/quantity`, with the unit as its ending where it has one. `<…>` stands
for any word (a tool, an outcome). "Share" means a fraction in [0, 1]; means are over
the step's trajectories on all ranks unless something else is said. A name that is not
here is a mistake: `require_known` finds it, and the tests of the trainer call it. Dashboards are
made from this file alone: their sections, panels, units and summaries.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from tapo_train.errors import TapoError

__all__ = [
    "METRICS",
    "SECTIONS",
    "SUMMARIES",
    "meaning_of",
    "panels_of",
    "pattern_of",
    "require_known",
    "unit_of",
]

METRICS: dict[str, str] = {
    # reward
    "reward/mean": "total reward",
    "reward/std": "population standard deviation of the total reward over the batch",
    "reward/accuracy": "outcome correctness, without format or tool bonuses",
    "reward/accuracy/<source>": "that of the questions of one data set, where there are several",
    "reward/format": "share of trajectories that keep to the agreed form",
    "reward/part/<part>": "any other named part of the reward, unweighted",
    # rollout
    "rollout/trajectories": "number of trajectories sampled",
    "rollout/failed_outside_policy": "share that left loss and baseline",
    "rollout/unscored": "those of them whose reward failed or was late",
    "rollout/surplus": "attempts started and dropped (oversample), per trajectory kept",
    "rollout/lost": "those of them that had failed outside the policy, per trajectory kept",
    "rollout/rounds": "rounds of the step's rollout (refill_rounds)",
    "rollout/groups_played": "groups played in all rounds; the metrics of rollout, reward and "
    "advantage/uniform_groups speak about all of them",
    "rollout/groups_under_way": "groups that go on when the update begins (max_staleness)",
    "rollout/staleness": "[updates] age of the weights that sampled a trained token",
    "rollout/staleness_max": "[updates] that of the oldest",
    "rollout/versions": "versions of the policy that sampled a trajectory",
    "rollout/groups_informative": "groups of the step's batch whose rewards differ",
    "rollout/turns": "assistant turns per trajectory",
    "rollout/calls": "tool calls per trajectory",
    "rollout/call_rate": "share of trajectories with at least one executed tool call",
    "rollout/repeated_calls": "share of tool calls that repeat an earlier one of their trajectory",
    "rollout/calls/<tool>": "calls of this tool per trajectory",
    "rollout/outcome/<outcome>": "share of tool calls that ended so; calls left out do not count",
    "rollout/stop/<reason>": "share of trajectories that ended for this reason",
    "rollout/tokens": "tokens per trajectory, observations and image tokens included",
    "rollout/trained_tokens": "sampled tokens per trajectory",
    "rollout/entropy": "[nat] entropy per sampled token, estimated without bias: mean of -log p of "
    "what was sampled",
    "rollout/tool_latency_s": "[s] per tool call",
    # tools
    "tool/<tool>/calls": "calls of this tool that were run, on all ranks",
    "tool/<tool>/cached": "share of them that a store of earlier answers answered",
    "tool/<tool>/retries": "attempts beyond the first",
    "tool/<tool>/outcome/<outcome>": "share of them that ended so",
    "tool/<tool>/cost": "their price, all attempts, in the unit of tools.limits",
    "tool/cost": "price of all calls of the step's rollout",
    "tool/cost_per_correct": "that per right answer; not logged without cost or right answer",
    "tool/guard/<event>": "search results seen, kept back by a guard, thumbnails dropped",
    "tool/spent": "price of all calls of the run so far, validation and resumptions included",
    "tool/hung_threads": "threads held by calls that were given up and have not returned",
    "time/tool/<tool>/latency_p50_s": "[s] median time of a call, its queue not counted",
    "time/tool/<tool>/latency_p95_s": "[s] 95 % of the calls took no longer",
    "time/tool/<tool>/latency_max_s": "[s] the longest call",
    "time/tool/<tool>/queue_s": "[s] mean wait for a seat or the rate limit",
    # advantage
    "advantage/abs": "mean of |advantage| over trajectories",
    "advantage/uniform_groups": "share of groups whose trajectories all earned the same",
    "process/left_out": "share that a stage of reward.process left out of loss and baseline",
    "process/left_out/<reason>": "the same by the word that says why",
    "process/earned": "reward that stages of reward.process added, per trajectory",
    "process/steps": "turns per trajectory after them: a stage may cut turns into steps",
    # policy and update
    "policy/entropy": "[nat] exact entropy per trained token (algo.entropy_coef > 0)",
    "policy/ref_kl": "[nat] KL estimate to the reference policy per trained token",
    "kl/<estimator>": "[nat] that estimate of the same: k1 is unbiased, k2 and k3 are >= 0",
    "policy/kl": "[nat] k3 estimate between old and new policy per trained token",
    "policy/ratio_minus_one": "mean of the probability ratio, minus one",
    "policy/regression": "mean squared distance to the advantage (Reg-GRPO)",
    "policy/clip_high": "share of trained tokens held by the upper clip",
    "policy/clip_low": "share of trained tokens held by the lower clip",
    "policy/clip_dual": "share of trained tokens held by the dual clip",
    "policy/gate_weight": "mean gradient weight of SAPO's soft gate",
    "policy/clip/by_turn/<turn>": "share of this turn's trained tokens held by any clip",
    "policy/gate_weight/by_turn/<turn>": "mean gradient weight of this turn's tokens",
    "update/loss": "the aggregated surrogate with its penalties, mean over updates",
    "update/grad_norm": "gradient norm before clipping, mean over updates",
    "update/learning_rate": "learning rate, mean over updates",
    "update/skipped": "share of the updates left out as not finite (learner.on_nonfinite=skip)",
    "balance/sampled": "most work of a rank over the mean [FLOP], had each kept what it sampled",
    "balance/trained": "the same of what ranks wait for, micro-batch by micro-batch: 1 is even",
    "supervised/nll": "[nat] negative log-likelihood per trained token of demonstrations",
    "supervised/entropy": "[nat] entropy per trained token of demonstrations",
    # sampler against learner
    "mismatch/k1": "[nat] k1 estimate of KL(sampler, learner) per trained token",
    "mismatch/k3": "[nat] k3 estimate of the same",
    "mismatch/abs_logprob_diff": "[nat] mean |log-probability difference|",
    "mismatch/abs_logprob_diff/by_age/<age>": "the same of tokens sampled so many updates before",
    "importance/weight": "mean importance weight after the correction",
    "importance/weight_squared": "mean of its square; 1/this is the relative sample size",
    "importance/changed": "share of weights that were truncated or masked",
    "probe/mean_abs_diff": "[nat] mean |engine - learner| log-probability of the probe's tokens",
    "probe/p90_abs_diff": "[nat] a tenth of them differ by more",
    "probe/max_abs_diff": "[nat] the largest",
    "probe/lag": "share of the learner's change that the engine lacks, once there is any",
    # credit
    "tapo/frac_fail_traj_corrected": "failing trajectories with a corrected step, of all failing",
    "tapo/frac_fail_traj_corrected_mixed": "the same in groups with a success",
    "tapo/frac_fail_traj_corrected_theta": "the same by the similarity gate alone",
    "tapo/frac_fail_traj_corrected_theta_mixed": "that in groups with a success",
    "tapo/frac_fail_steps_corrected": "corrected steps, of failing trajectories' tool steps",
    "tapo/frac_fail_steps_corrected_mixed": "the same in groups with a success",
    "tapo/frac_fail_steps_corrected_theta": "the same by the similarity gate alone",
    "tapo/frac_fail_steps_corrected_theta_mixed": "that in groups with a success",
    "tapo/n_fail_traj": "failing trajectories",
    "tapo/n_fail_traj_mixed": "failing trajectories in groups with a success",
    "tapo/n_fail_traj_corrected": "failing trajectories with a corrected step",
    "tapo/n_fail_steps": "eligible tool steps of failing trajectories",
    "tapo/n_fail_steps_mixed": "the same in groups with a success",
    "tapo/n_fail_steps_corrected": "corrected steps",
    "tapo/n_clusters": "clusters of reference calls in the batch",
    "tapo/cluster_size_mean": "calls per cluster",
    "tapo/sim_mean": "similarity to the matched cluster, over corrected steps",
    "tapo/sup_mean": "support of the matched cluster, over corrected steps",
    "tapo/F_mean": "transfer before beta, over corrected steps",
    "tapo/delta_adv_mean": "change of the advantage, over corrected steps",
    "tapo/clip_frac": "share of corrected steps cut at zero",
    "tapo/calls/<count>": "eligible failing calls: total, matched (theta gate), corrected",
    "tapo/by_tool/<tool>/<count>": "the same for calls of this tool",
    "tapo/by_turn/<turn>/<count>": "the same for steps in this turn",
    "credit/by_age/<age>/<count>": "turns that were asked for so many updates before: total, and "
    "corrected, whose advantage the credit stage changed (max_staleness)",
    "credit/observation_agreement": "share of matched pairs whose observations are equivalent",
    "credit/turn_gap": "mean |turn of the failing call - mean turn of its cluster|",
    "credit/turn_gap_hist/<bin>": "corrected calls by turn gap",
    "credit/novelty_gap": "share of corrected calls, of those with an answer, that repeat one",
    "placebo/n_steps": "steps that a change was dealt to (credit=placebo)",
    "placebo/hit_frac": "share of them that TAPO would have corrected",
    "shrink/factor": "all negative advantages are times this (credit=shrink)",
    "gigpo/n_step_groups": "groups of steps with an equal state (credit=gigpo)",
    "gigpo/frac_steps_grouped": "share of steps with another one in their group",
    "gigpo/step_adv_abs_mean": "mean |step-level advantage|",
    "tapo/time_s": "[s] in the credit stage",
    "tapo/time_frac": "share of the step's time spent in the credit stage",
    # early signs of collapse
    "warning/<name>": "1 while this sign holds, else 0; absent until there is enough to judge",
    # evaluation
    "eval/accuracy": "share answered correctly, greedy, of the questions that did not fail",
    "eval/accuracy_low": "lower end of its 95 % Wilson interval",
    "eval/accuracy_high": "upper end of its 95 % Wilson interval",
    "eval/accuracy/<source>": "that of the questions of one data set, where there are several",
    "eval/questions": "validation questions asked",
    "eval/failed": "share of them that failed outside the policy; no other eval metric has them",
    "eval/format": "share of validation trajectories that keep to the agreed form",
    "eval/calls": "tool calls per validation trajectory",
    "eval/turns": "assistant turns per validation trajectory",
    # cost
    "time/step_s": "[s] wall time of the step",
    "time/<stage>_s": "[s] wall time of this stage of the step",
    "wait/rollouts": "share of the step's time in which the learner waited for rollouts",
    "wait/weights": "share in which it handed its weights over",
    "throughput/tokens_per_s": "tokens of all trajectories per second of the step, all ranks",
    "throughput/sampled_tokens_per_s": "sampled tokens per second of the rollout, all ranks",
    "memory/<stage>_<kind>_gib": "[GiB] after this stage (cuda_allocated, _reserved: its peak), "
    "largest of the ranks",
    "memory/rss_gib": "[GiB] peak resident memory of rank 0",
}


SECTIONS: dict[str, tuple[str, ...]] = {
    "Does it learn": ("reward", "eval"),
    "Rollout and tools": ("rollout", "process", "tool"),
    "Credit": ("advantage", "tapo", "credit", "placebo", "shrink", "gigpo"),
    "Update": ("policy", "kl", "update", "supervised", "balance"),
    "Sampler against learner": ("mismatch", "importance", "probe"),
    "Warnings": ("warning",),
    "Cost": ("time", "wait", "throughput", "memory"),
}
"""Sections of a dashboard, in order: the groups whose metrics each of them shows."""

SUMMARIES: dict[str, str] = {
    "reward/mean": "max",
    "reward/accuracy": "max",
    "eval/accuracy": "max",
    "tool/spent": "max",
    "probe/mean_abs_diff": "max",
    "time/step_s": "mean",
    "throughput/tokens_per_s": "mean",
}
"""What a table of runs shows of a metric; of all others the last value."""


def panels_of(section: str) -> list[str]:
    """Names and patterns of the metrics that a section shows, in the catalogue's order."""
    groups = SECTIONS[section]
    return [name for name in METRICS if name.split("/")[0] in groups]


def unit_of(name: str) -> str:
    """`s`, `nat`, `GiB`, `share`; "" for counts and mere numbers. `name` is of `METRICS`."""
    meaning = METRICS[name]
    if match := re.match(r"\[(\w+)\]", meaning):
        return match[1]
    return "share" if meaning.startswith("share ") else ""


def pattern_of(name: str) -> str:
    """A regular expression for the metrics that a name with `<…>` stands for."""
    return re.sub("<[a-z]+>", "[A-Za-z0-9_.+-]+", name)


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern_of(name)), name) for name in METRICS if "<" in name)


def meaning_of(name: str) -> str | None:
    """The line about `name`; None if no run may log it. Exact names go before patterns."""
    if "<" not in name and name in METRICS:
        return METRICS[name]
    for pattern, key in _patterns():
        if pattern.fullmatch(name):
            return METRICS[key]
    return None


def require_known(names: Iterable[str]) -> None:
    """Raise TapoError if the catalogue lacks one of `names`."""
    unknown = sorted(name for name in names if meaning_of(name) is None)
    if unknown:
        raise TapoError(
            f"metrics {unknown} are not in the catalogue; "
            "add them to tapo_train/report/catalogue.py with their meaning"
        )
