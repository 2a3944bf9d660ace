"""One page about one or several runs: curves, time, memory, tools, credit, warnings, samples.

Runs that differ in their seed alone are drawn as one curve with the range of its seeds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from tapo_train.inspector.figures import curve, memory, stages
from tapo_train.inspector.records import dumped_steps, read_step
from tapo_train.inspector.runs import Run, age, differences, variants
from tapo_train.report.files import write_atomically

__all__ = ["write_report"]

CURVES = (
    "reward/accuracy",
    "eval/accuracy",
    "reward/mean",
    "tapo/frac_fail_traj_corrected",
    "tapo/frac_fail_traj_corrected_mixed",
    "rollout/calls",
    "rollout/tokens",
    "policy/entropy",
    "policy/kl",
    "update/grad_norm",
    "rollout/failed_outside_policy",
    "rollout/staleness",
    "throughput/tokens_per_s",
    "time/step_s",
)
"""Drawn where they were logged."""

SAMPLES = 4
_TOOL = re.compile(r"tool/([^/]+)/(calls|cached|cost|outcome/[a-z_]+)")
_CREDIT = re.compile(r"tapo/by_(tool|turn)/([^/]+)/(total|matched|corrected)")


def write_report(runs: Sequence[Run], out: Path) -> list[Path]:
    """Write the page `out` and its pictures into a folder beside it; all paths written."""
    groups = variants(runs)
    pictures = [drawn for name in CURVES if (drawn := curve(name, groups)) is not None]
    others = [r for r in (stages(runs), memory(runs)) if r is not None]
    folder = out.with_suffix("")
    written = []
    for picture in [*pictures, *others]:
        path = folder / f"{picture.name.replace('/', '_')}.png"
        write_atomically(path, picture.png)
        written.append(path)
    loader = jinja2.DictLoader({"report.html": _template()})
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html").render(
        title=", ".join(run.name for run in runs),
        groups=groups,
        runs=[_summary(run) for run in runs],
        differences=_fields(runs),
        pictures=pictures,
        others=others,
        tools={run.name: tools(run) for run in runs},
        credit={run.name: credit(run) for run in runs},
        warnings={run.name: warnings(run) for run in runs},
        samples={run.name: samples(run) for run in runs},
    )
    write_atomically(out, page)
    return [out, *written]


def tools(run: Run) -> list[dict[str, Any]]:
    """Per tool: calls of all steps, how they ended, what they cost and how long they took."""
    found: dict[str, dict[str, float]] = {}
    for row in run.rows:
        for name, value in row.items():
            if (match := _TOOL.fullmatch(name)) and value == value:
                weight = (
                    1.0 if match[2] in ("calls", "cost") else row.get(f"tool/{match[1]}/calls", 0.0)
                )
                held = found.setdefault(match[1], {})
                held[match[2]] = held.get(match[2], 0.0) + value * weight
    return [
        {
            "tool": tool,
            "calls": round(held.get("calls", 0.0)),
            "outcomes": {
                name.removeprefix("outcome/"): value / held["calls"]
                for name, value in sorted(held.items())
                if name.startswith("outcome/") and held.get("calls")
            },
            "cached": held.get("cached", 0.0) / held["calls"] if held.get("calls") else 0.0,
            "cost": held.get("cost", 0.0),
            "p50_s": _median(run, f"time/tool/{tool}/latency_p50_s"),
            "p95_s": _median(run, f"time/tool/{tool}/latency_p95_s"),
        }
        for tool, held in sorted(found.items())
    ]


def _median(run: Run, name: str) -> float | None:
    values = [value for _, value in run.series(name)]
    return float(np.median(values)) if values else None


def credit(run: Run) -> list[dict[str, Any]]:
    """Eligible, matched and corrected calls by tool and steps by turn, over all steps."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in run.rows:
        for name, value in row.items():
            if match := _CREDIT.fullmatch(name):
                held = found.setdefault(
                    (match[1], match[2]), dict.fromkeys(("total", "matched", "corrected"), 0.0)
                )
                held[match[3]] += value
    return [{"kind": kind, "name": name, **held} for (kind, name), held in sorted(found.items())]


def warnings(run: Run) -> list[dict[str, Any]]:
    """The signs that held, with the first and last step and how many."""
    names = sorted({name for row in run.rows for name in row if name.startswith("warning/")})
    held = {name: [step for step, value in run.series(name) if value] for name in names}
    return [
        {"name": name.removeprefix("warning/"), "first": on[0], "last": on[-1], "steps": len(on)}
        for name, on in held.items()
        if on
    ]


def samples(run: Run) -> list[dict[str, Any]]:
    """Attempts of the last dumped step: the best and the worst of the first questions."""
    steps = dumped_steps(run.path)
    if not steps:
        return []
    number = max(steps)
    step = read_step(number, steps[number], None)
    found: list[dict[str, Any]] = []
    for question in step.questions[: SAMPLES // 2]:
        order = sorted(question.attempts, key=lambda held: held.view.get("advantage") or 0.0)
        for attempt in (order[-1], order[0]):
            view = attempt.view
            turns = [turn["text"] for turn in view["turns"]]
            found.append(
                {
                    "step": number,
                    "question": view["question"],
                    "answer": view.get("answer"),
                    "advantage": view.get("advantage"),
                    "text": "\n\n".join(turns),
                }
            )
    return found


def _summary(run: Run) -> dict[str, Any]:
    times = [value for _, value in run.series("time/step_s")]
    return {
        "name": run.name,
        "steps": f"{run.done} of {run.recipe.get('run.steps', '?')}",
        "accuracy": run.last("reward/accuracy"),
        "validation": run.last("eval/accuracy"),
        "low": run.last("eval/accuracy_low"),
        "high": run.last("eval/accuracy_high"),
        "questions": run.last("eval/questions"),
        "step_s": float(np.median(times)) if times else None,
        "spent": run.last("tool/spent"),
        "time": age(sum(times)),
        "versions": run.manifest.get("versions", {}),
    }


def _fields(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """What the recipes differ in; of a single run, all it sets."""
    if len(runs) == 1:
        return {name: [value] for name, value in runs[0].recipe.items()}
    found = differences([run.recipe for run in runs])
    return {name: values for name, values in found.items() if name != "run.dir"}


_COUNTS = ("total", "matched", "corrected")


def _template() -> str:
    return files("tapo_train.inspector").joinpath("assets", "report.html").read_text()
