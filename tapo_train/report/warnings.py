"""Early signs of collapse, from metrics that a run has anyway.

Each sign looks at one quantity and compares its median over the last steps with the median over
the run's own first steps. Medians, because one strange batch is no collapse. A quantity that the
run does not measure gives no sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from tapo_train.errors import CollapseError, ConfigError

__all__ = ["SIGNS", "Sign", "Watch", "explain"]

_PREFIX = "warning/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """One way in which training goes wrong."""

    metric: str
    """The quantity it looks at; `a / b` is a quotient of two metrics."""
    is_bad: Callable[[float, float], bool]
    """(median of the first steps, median of the last ones) -> whether to warn."""
    text: str
    """What it means and what usually is behind it."""

    def value(self, metrics: Mapping[str, float]) -> float | None:
        """The quantity in a row of metrics; None where it is missing or not finite."""
        above, _, below = self.metric.partition(" / ")
        value, share = metrics.get(above, math.nan), metrics.get(below, math.nan) if below else 1.0
        ratio = value / share if share else math.nan
        return ratio if math.isfinite(ratio) else None


def _fell(share: float, *, from_at_least: float = 0.0) -> Callable[[float, float], bool]:
    """Below this share of its first value, which was worth losing."""
    return lambda early, late: early >= from_at_least and late < share * early


def _rose(times: float, *, by: float = 0.0) -> Callable[[float, float], bool]:
    """Beyond this multiple of its first value, and by this much."""
    return lambda early, late: late > times * early and late > early + by


SIGNS: Mapping[str, Sign] = {
    "tool_use_dying": Sign(
        metric="rollout/call_rate",
        is_bad=_fell(0.5, from_at_least=0.1),
        text="tool use is dying out: fewer than half as many trajectories call a tool as at the "
        "start. Guessing pays as well as searching, or failed calls are what is punished: "
        "compare reward/accuracy, rollout/outcome/* and the reward's weights",
    ),
    "calls_exploding": Sign(
        metric="rollout/calls",
        is_bad=_rose(2.0, by=1.0),
        text="tool calls explode: more than twice as many per trajectory as at the start. "
        "A reward for calling tools, or a credit stage without its cut at zero, does that: "
        "look at credit.use_clip and at rollout/repeated_calls",
    ),
    "repeating_calls": Sign(
        metric="rollout/repeated_calls",
        is_bad=_rose(1.0, by=0.2),
        text="the policy asks the same again: a fifth more of its calls than at the start repeat "
        "an earlier call of their trajectory. It loops; credit.correct_repeats=first keeps "
        "the pressure on copies",
    ),
    "entropy_collapsing": Sign(
        metric="rollout/entropy",
        is_bad=_fell(0.3),
        text="entropy collapses: less than a third of the start's. Rollouts of a question become "
        "copies and nothing is left to compare; lower learner.lr, or use a wider upper clip "
        "or an entropy bonus",
    ),
    "entropy_exploding": Sign(
        metric="rollout/entropy",
        is_bad=_rose(2.0, by=0.3),
        text="entropy explodes: more than twice the start's. The policy dissolves into noise; "
        "lower learner.lr or algo.entropy_coef",
    ),
    "turns_shrinking": Sign(
        metric="rollout/trained_tokens / rollout/turns",
        is_bad=_fell(0.5),
        text="turns become short: less than half the tokens per turn of the start. Averages over "
        "sequences reward short turns of good trajectories (algo.aggregation), or thinking "
        "does not pay",
    ),
    "turns_growing": Sign(
        metric="rollout/trained_tokens / rollout/turns",
        is_bad=_rose(2.0),
        text="turns become long: more than twice the tokens per turn of the start. Often the "
        "policy rambles until rollout.max_turn_tokens cuts it: see rollout/stop/max_tokens",
    ),
    "groups_uniform": Sign(
        metric="advantage/uniform_groups",
        is_bad=lambda early, late: late > 0.8,
        text="groups teach nothing: in four of five all rollouts earn the same. The questions are "
        "too easy or too hard by now; change the data or sample more per question",
    ),
    "kl_growing": Sign(
        metric="policy/ref_kl",
        is_bad=_rose(3.0, by=0.1),
        text="the policy runs away from its reference: three times the start's divergence; raise "
        "algo.kl.coef or lower learner.lr",
    ),
    "engine_drifting": Sign(
        metric="mismatch/abs_logprob_diff",
        is_bad=_rose(3.0, by=0.01),
        text="engine and learner drift apart: their log-probabilities differ three times as much "
        "as at the start, so samples are not what the loss believes. Look at "
        "probe/max_abs_diff, the engine's precision and the importance correction",
    ),
    "gradient_growing": Sign(
        metric="update/grad_norm",
        is_bad=_rose(5.0),
        text="gradients grow: five times the start's norm before clipping. The next step is likely "
        "to break something; lower learner.lr or learner.max_grad_norm",
    ),
}
"""By name; `warning/<name>` is the metric."""


def explain(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """(name, text with the quantity's present value) of every sign that a row warns of."""
    found = []
    for name, sign in SIGNS.items():
        if metrics.get(_PREFIX + name) == 1.0:
            now = sign.value(metrics)
            shown = sign.metric if now is None else f"{sign.metric} is {now:.3g}"
            found.append((name, f"{sign.text} ({shown})"))
    return found


class Watch:
    """Follows a run. Its state is part of a checkpoint, so that a resumed run warns alike.

    Every rank has one and sees the same rows, so that all ranks stop together.

    Args:
        early_steps: the first so many measured values of a quantity are what it is held against.
        recent_steps: the last so many values after them; none is judged before there are as many.
        stop_on: names of signs that end the run,
        stop_after: where they have held for so many steps in a row.
    """

    def __init__(
        self,
        *,
        early_steps: int = 10,
        recent_steps: int = 5,
        stop_on: Sequence[str] = (),
        stop_after: int = 3,
    ) -> None:
        unknown = sorted(set(stop_on) - SIGNS.keys())
        if unknown:
            raise ConfigError(f"watch.stop_on: found {unknown}; wanted some of {sorted(SIGNS)}")
        self._early_steps = early_steps
        self._recent_steps = recent_steps
        self._stop_on = tuple(stop_on)
        self._stop_after = stop_after
        self._early: dict[str, list[float]] = {name: [] for name in SIGNS}
        self._recent: dict[str, list[float]] = {name: [] for name in SIGNS}
        self._in_a_row: dict[str, int] = dict.fromkeys(SIGNS, 0)

    def observe(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Take in the row of a step; `warning/<name>` 0 or 1 of every sign that can be judged."""
        warnings = {}
        for name, sign in SIGNS.items():
            self._add(name, sign.value(metrics))
            early, recent = self._early[name], self._recent[name]
            if len(recent) == self._recent_steps:
                is_bad = sign.is_bad(median(early), median(recent))
                self._in_a_row[name] = self._in_a_row[name] + 1 if is_bad else 0
                warnings[_PREFIX + name] = float(is_bad)
        return warnings

    def collapse(self) -> CollapseError | None:
        """What to end the run with, if a sign of `stop_on` has held long enough."""
        for name in self._stop_on:
            if self._in_a_row[name] >= self._stop_after:
                return CollapseError(
                    f"watch.stop_on: {name} has held for {self._in_a_row[name]} steps in a row "
                    f"(watch.stop_after is {self._stop_after}): {SIGNS[name].text}. To go on all "
                    f"the same, take {name} from watch.stop_on and resume"
                )
        return None

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes; plain JSON."""
        return {
            "early": {name: list(values) for name, values in self._early.items()},
            "recent": {name: list(values) for name, values in self._recent.items()},
            "in_a_row": dict(self._in_a_row),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Signs it does not know start anew."""
        for name in SIGNS:
            self._early[name] = list(state["early"].get(name, []))[: self._early_steps]
            self._recent[name] = list(state["recent"].get(name, []))[-self._recent_steps :]
            self._in_a_row[name] = int(state["in_a_row"].get(name, 0))

    def _add(self, name: str, value: float | None) -> None:
        if value is None:
            return
        early, recent = self._early[name], self._recent[name]
        if len(early) < self._early_steps:
            early.append(value)
        else:
            recent.append(value)
            del recent[: -self._recent_steps]
