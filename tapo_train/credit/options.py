"""Every switch of the TAPO credit stage, with range and meaning of the extremes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

from tapo_train.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TapoOptions:
    """Options of `Tapo`. Paper: arXiv 2606.05784; "ours" marks what it leaves open."""

    beta: float = 0.8
    """Scale of the transfer (paper: 0.8); 0 is the base algorithm bit for bit."""
    theta: float = 0.7
    """Least similarity for a match, in [0, 1]; 0 opens the gate (value ours)."""
    theta_by_tool: Mapping[str, float] = field(default_factory=lambda: {"text_search_tool": 0.5})
    """theta of single tools; token Jaccard 0.5 is Dice 0.667 (ours)."""
    alpha_min: float = 0.25
    """Least similarity x support, in [0, 1]; 0 opens the gate (value ours)."""
    cluster_theta: float | None = None
    """Least similarity of two calls of one cluster; None: theta of the tool (ours)."""
    success_rule: Literal["both", "outcome", "advantage"] = "both"
    """What makes a reference and what a failing run: correctness, sign of the advantage, both."""
    success_threshold: float = 0.5
    """Correct from this share of full correctness on, in (0, 1]."""
    use_support: bool = True
    """False: support is 1 in gate and transfer (the paper's "w/o sup.")."""
    use_clip: bool = True
    """False: the corrected advantage may become positive (the paper's "w/o clip.")."""
    use_sim_weight: bool = True
    """False: similarity is 1 in the transfer, not in the gates."""
    span: Literal["turn", "call"] = "turn"
    """Tokens that receive the correction: the whole turn, or only `<tool_call>…</tool_call>`."""
    turn_reduce: Literal["mean", "max", "min", "span"] = "mean"
    """Transfer of a turn with several calls; span: each call its own, thought tokens the mean."""
    adv_agg: Literal["mean_traj", "mean_step", "max", "min"] = "mean_traj"
    """Reference advantage of a cluster, over its trajectories or its calls."""
    match_by: Literal["sim", "sim_sup"] = "sim"
    """What the best cluster maximises (paper: similarity alone)."""
    cluster: Literal["single", "leader", "complete", "exact"] = "single"
    """Linkage: connected components, first fit, no chaining, equal arguments only."""
    scope: Literal["group", "batch"] = "group"
    """One library per question, or one for the whole batch (ablation)."""
    correct_repeats: Literal["all", "first"] = "all"
    """first: later copies of a call in one failing trajectory keep their advantage."""
    correct_infra_error: bool = True
    """Whether a failing step may be corrected though the world, not the policy, failed it."""
    correct_unexecuted: bool = False
    """Whether a failing step may be corrected though it was never executed."""
    tools: tuple[str, ...] = ()
    """Allow-list; empty: all. Leave out tools whose answer the arguments do not determine."""
    similarity: Mapping[str, str] = field(default_factory=dict)
    """Tool name to a registered similarity or an import path `package.module:attribute`."""
    tool_aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of a tool, to the name the other options use."""
    box_unit: Literal["thousandths", "pixels"] = "thousandths"
    """Unit of zoom boxes: 0 to 1000 of the indexed picture, or its absolute pixels."""
    audit: bool = True
    """Log the determinism audit (observation agreement, turn gap, novelty gap)."""
    require_observation_agreement: bool = False
    """Third gate: at least half of the matched calls must have had an equivalent answer."""

    def __post_init__(self) -> None:
        check_range("credit.beta", self.beta, low=0.0, high=float("inf"))
        for name in ("theta", "alpha_min", "success_threshold"):
            check_range(f"credit.{name}", getattr(self, name), low=0.0, high=1.0)
        for tool, theta in self.theta_by_tool.items():
            check_range(f"credit.theta_by_tool.{tool}", theta, low=0.0, high=1.0)
        if self.cluster_theta is not None:
            check_range("credit.cluster_theta", self.cluster_theta, low=0.0, high=1.0)
        if self.success_threshold == 0.0:
            raise ConfigError("credit.success_threshold is 0.0; want more than 0")
        check_choices("credit", self)

    def theta_of(self, tool: str) -> float:
        """theta of one tool."""
        return self.theta_by_tool.get(tool, self.theta)

    def cluster_theta_of(self, tool: str) -> float:
        """Linkage threshold of one tool."""
        return self.theta_of(tool) if self.cluster_theta is None else self.cluster_theta


def check_range(path: str, value: object, *, low: float, high: float) -> None:
    """Raise `ConfigError` unless value is a finite number in [low, high]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or value == float("inf"):  # type: ignore[operator]
        raise ConfigError(f"{path} is {value!r}; want a number in [{low:g}, {high:g}]")


def check_choices(path: str, options: Any) -> None:
    """Raise `ConfigError` if a Literal or bool field of a dataclass holds anything else."""
    hints = get_type_hints(type(options))
    for item in fields(options):
        value, hint = getattr(options, item.name), hints[item.name]
        choices = (True, False) if hint is bool else get_args(hint)
        is_choice = hint is bool or str(hint).startswith("typing.Literal")
        if is_choice and not any(value is c or (c == value and hint is not bool) for c in choices):
            raise ConfigError(f"{path}.{item.name} is {value!r}; want one of {list(choices)}")
