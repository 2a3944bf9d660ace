"""Early signs of collapse, on written series."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence

import pytest

from tapo_train.errors import CollapseError, ConfigError
from tapo_train.report.catalogue import METRICS, meaning_of, require_known
from tapo_train.report.sinks import Console
from tapo_train.report.warnings import SIGNS, Watch, explain

EARLY, RECENT = 4, 3


def rows(metric: str, values: Sequence[float]) -> list[dict[str, float]]:
    return [{metric: value} for value in values]


def follow(watch: Watch, series: Sequence[Mapping[str, float]], name: str) -> list[float | None]:
    """The warning after each step; None where it was not judged."""
    return [watch.observe(row).get(f"warning/{name}") for row in series]


def watch(**options: object) -> Watch:
    return Watch(early_steps=EARLY, recent_steps=RECENT, **options)  # type: ignore[arg-type]


FIRST = (0.8, 0.6, 0.7, 0.7)
"""Median 0.7."""


@pytest.mark.parametrize(
    ("name", "metric", "first", "healthy", "ill"),
    [
        ("tool_use_dying", "rollout/call_rate", 0.7, 0.36, 0.34),
        ("tool_use_dying", "rollout/call_rate", 0.1, 0.06, 0.04),
        ("calls_exploding", "rollout/calls", 2.0, 3.9, 4.1),
        ("calls_exploding", "rollout/calls", 0.5, 1.4, 1.6),
        ("repeating_calls", "rollout/repeated_calls", 0.1, 0.29, 0.31),
        ("entropy_collapsing", "rollout/entropy", 1.0, 0.31, 0.29),
        ("entropy_exploding", "rollout/entropy", 1.0, 1.9, 2.1),
        ("entropy_exploding", "rollout/entropy", 0.1, 0.35, 0.41),
        ("groups_uniform", "advantage/uniform_groups", 0.9, 0.8, 0.81),
        ("kl_growing", "policy/ref_kl", 0.0, 0.09, 0.11),
        ("kl_growing", "policy/ref_kl", 0.1, 0.29, 0.31),
        ("engine_drifting", "mismatch/abs_logprob_diff", 0.01, 0.029, 0.031),
        ("engine_drifting", "mismatch/abs_logprob_diff", 0.001, 0.01, 0.012),
        ("gradient_growing", "update/grad_norm", 1.0, 4.9, 5.1),
    ],
)
def test_a_sign_appears_beyond_its_bound_and_not_before(
    name: str, metric: str, first: float, healthy: float, ill: float
) -> None:
    for late, wanted in ((healthy, 0.0), (ill, 1.0)):
        found = follow(watch(), rows(metric, [first] * EARLY + [late] * RECENT), name)
        assert found == [None] * (EARLY + RECENT - 1) + [wanted]


@pytest.mark.parametrize(
    ("name", "late", "wanted"),
    [
        ("turns_shrinking", (49.0, 1.0), 1.0),
        ("turns_shrinking", (51.0, 1.0), 0.0),
        ("turns_growing", (201.0, 1.0), 1.0),
        ("turns_growing", (199.0, 1.0), 0.0),
        # Twice the tokens in twice the turns are turns as long as before.
        ("turns_growing", (400.0, 4.0), 0.0),
    ],
)
def test_the_length_of_turns_is_tokens_by_turns(
    name: str, late: tuple[float, float], wanted: float
) -> None:
    lengths = [(100.0, 1.0)] * EARLY + [late] * RECENT
    series = [{"rollout/trained_tokens": t, "rollout/turns": n} for t, n in lengths]
    assert follow(watch(), series, name)[-1] == wanted


def test_tool_use_that_never_was_cannot_die_out() -> None:
    series = rows("rollout/call_rate", [0.09] * EARLY + [0.0] * RECENT)
    assert follow(watch(), series, "tool_use_dying")[-1] == 0.0


def test_one_strange_batch_is_no_collapse_and_medians_are_over_windows() -> None:
    calm = rows("rollout/call_rate", [*FIRST, 0.7, 0.0, 0.7, 0.7, 0.0])
    assert follow(watch(), calm, "tool_use_dying")[-3:] == [0.0, 0.0, 0.0]
    dying = rows("rollout/call_rate", [*FIRST, 0.7, 0.7, 0.7, 0.3, 0.3, 0.3, 0.7, 0.7])
    assert follow(watch(), dying, "tool_use_dying") == [None] * 6 + [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]


def test_a_quantity_that_is_missing_or_not_finite_is_passed_over() -> None:
    values = [1.0, math.nan, 1.0, 1.0, math.inf, 1.0, 0.1, math.nan, 0.1, 0.1]
    found = follow(watch(), rows("rollout/entropy", values), "entropy_collapsing")
    assert found == [None] * 9 + [1.0]
    assert watch().observe({}) == {}
    without_turns = {"rollout/trained_tokens": 1.0, "rollout/turns": 0.0}
    assert SIGNS["turns_growing"].value(without_turns) is None


def test_every_sign_looks_at_metrics_a_run_has_and_says_what_it_means() -> None:
    for name, sign in SIGNS.items():
        assert all(metric in METRICS for metric in sign.metric.split(" / ")), name
        assert meaning_of(f"warning/{name}") is not None
        assert ":" in sign.text and len(sign.text) > 80
    require_known(watch().observe({}))


def test_the_run_stops_when_a_chosen_sign_has_held_long_enough() -> None:
    series = rows("rollout/entropy", [1.0] * EARLY + [0.1] * RECENT + [0.1] * 2)
    chosen = watch(stop_on=("entropy_collapsing",), stop_after=3)
    for row in series[:-1]:
        chosen.observe(row)
        assert chosen.collapse() is None
    chosen.observe(series[-1])
    found = chosen.collapse()
    assert isinstance(found, CollapseError)
    assert "entropy_collapsing has held for 3 steps" in str(found)
    other = watch(stop_on=("tool_use_dying",), stop_after=1)
    for row in series:
        other.observe(row)
        assert other.collapse() is None


def test_the_steps_must_be_in_a_row() -> None:
    ill, well = [0.1] * 3, [1.0] * 3
    chosen = watch(stop_on=("entropy_collapsing",), stop_after=4)
    for row in rows("rollout/entropy", [1.0] * EARLY + ill + well + ill + well):
        chosen.observe(row)
        assert chosen.collapse() is None


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"watch\.stop_on: found \['tools'\]"):
        Watch(stop_on=("tools",))


@pytest.mark.parametrize("cut", range(0, 15, 3))
def test_a_resumed_watch_goes_on_as_if_it_had_never_stopped(cut: int) -> None:
    values = [*FIRST, 0.7, 0.7, 0.3, 0.3, 0.2, 0.2, 0.7, 0.3, 0.1, 0.1, 0.1]
    series = rows("rollout/call_rate", values)
    whole, first, second = (watch(stop_on=("tool_use_dying",)) for _ in range(3))
    expected = follow(whole, series, "tool_use_dying")
    found = follow(first, series[:cut], "tool_use_dying")
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert found + follow(second, series[cut:], "tool_use_dying") == expected
    assert second.state_dict() == whole.state_dict()
    assert 1.0 in expected and 0.0 in expected


def test_a_shorter_window_keeps_the_latest_values_of_a_longer_ones_state() -> None:
    longer = Watch(early_steps=4, recent_steps=3)
    follow(longer, rows("rollout/entropy", [1.0, 1.0, 1.0, 1.0, 1.0, 0.9, 0.1]), "")
    shorter = Watch(early_steps=2, recent_steps=1)
    shorter.load_state_dict(longer.state_dict())
    state = shorter.state_dict()
    assert state["early"]["entropy_collapsing"] == [1.0, 1.0]
    assert state["recent"]["entropy_collapsing"] == [0.1]


def test_the_console_says_a_warning_in_words_when_it_appears() -> None:
    stream = io.StringIO()
    console = Console(total_steps=9, stream=stream, clock=lambda: 0.0)
    for step, flag in enumerate((0.0, 1.0, 1.0, 0.0, 1.0)):
        console.write(step, {"rollout/call_rate": 0.12, "warning/tool_use_dying": flag})
    lines = stream.getvalue().splitlines()
    warned = [i for i, line in enumerate(lines) if line.startswith("  warning: tool use is dying")]
    assert warned == [2, 6] and len(lines) == 7
    assert lines[2].endswith("(rollout/call_rate is 0.12)")


def test_a_row_without_the_quantity_still_names_it() -> None:
    ((name, text),) = explain({"warning/kl_growing": 1.0, "warning/groups_uniform": 0.0})
    assert name == "kl_growing" and text.endswith("(policy/ref_kl)")
