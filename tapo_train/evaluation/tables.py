"""What attempts come to, as numbers, as a table to read, and as one picture."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tapo_train.evaluation.attempt import Attempt
from tapo_train.evaluation.estimates import Estimate, average, by_question, pass_at
from tapo_train.report.statistics import accuracy_of
from tapo_train.report.trajectory_metrics import most_frequent_sources
from tapo_train.rewards.official import JUDGE, Scored, attempted_scores, infoseek_final

__all__ = ["accuracies", "draw", "markdown", "summary"]

Table = dict[str, Any]


def summary(attempts: Sequence[Attempt], *, repeats: int, judged_by: str) -> Table:
    """The table of every benchmark, by name; plain JSON.

    Args:
        judged_by: kind of the reward part that is the accuracy, which stands for an official score
            that no rule computes and is named beside it.
    """
    held: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        held[attempt.benchmark].append(attempt)
    return {name: _benchmark(own, repeats, judged_by) for name, own in sorted(held.items())}


def _benchmark(attempts: Sequence[Attempt], repeats: int, judged_by: str) -> Table:
    usable = [attempt for attempt in attempts if not attempt.failed]
    questions = by_question(usable)
    failed = Counter(attempt.failed for attempt in attempts if attempt.failed)
    table: Table = {
        "questions": len({attempt.task for attempt in attempts}),
        "answered_for": len(questions),
        "attempts": len(attempts),
        "failed": len(attempts) - len(usable),
        "failures": dict(failed.most_common(5)),
        "pass@1": _shown(average([_pass(own, 1) or 0.0 for own in questions.values()])),
    }
    if repeats > 1:
        several = [_pass(own, repeats) for own in questions.values()]
        table[f"pass@{repeats}"] = _shown(average([one for one in several if one is not None]))
        table[f"avg@{repeats}"] = _shown(average(_means(questions, _accuracy)))
    return table | {
        "official": _official(usable, questions, judged_by),
        "grounds": {
            "supported": _shown(average(_means(questions, lambda a: float(a.supported)))),
            "right and supported": _shown(average(_means(questions, _by_evidence))),
            "completeness": _shown(average(_means(questions, lambda a: a.completeness))),
            "faithfulness": _shown(average(_means(questions, lambda a: a.faithfulness))),
        },
        "reward parts": _parts(usable, questions),
        "searches": _searches(usable),
        "cost": {
            "turns": _mean(usable, lambda a: a.turns),
            "tokens": _mean(usable, lambda a: a.tokens),
            "calls": _mean(usable, lambda a: sum(a.calls.values())),
            "price": _mean(usable, lambda a: a.cost),
        },
        "by hops": _groups(usable, lambda a: a.hops),
        "by tools": _groups(usable, lambda a: " + ".join(sorted(a.calls)) or "none"),
        "by turns": _groups(usable, lambda a: str(a.turns)),
    }


def _accuracy(attempt: Attempt) -> float:
    return attempt.accuracy or 0.0


def _by_evidence(attempt: Attempt) -> float:
    return _accuracy(attempt) * attempt.supported


def _pass(attempts: Sequence[Attempt], k: int) -> float | None:
    """With verdicts between 0 and 1 only a whole one passes; pass@1 is then below their mean."""
    return pass_at(k, sum(_accuracy(attempt) == 1.0 for attempt in attempts), len(attempts))


def _means(
    questions: Mapping[str, Sequence[Attempt]], of: Callable[[Attempt], float]
) -> list[float]:
    return [math.fsum(map(of, own)) / len(own) for own in questions.values()]


def _mean(attempts: Sequence[Attempt], of: Callable[[Attempt], float]) -> float:
    return math.fsum(map(of, attempts)) / len(attempts) if attempts else 0.0


def _shown(estimate: Estimate | None) -> Table | None:
    return None if estimate is None else asdict(estimate)


def _parts(usable: Sequence[Attempt], questions: Mapping[str, Sequence[Attempt]]) -> Table:
    names = sorted({name for attempt in usable for name in attempt.parts})

    def of(name: str) -> list[float]:
        return _means(questions, lambda attempt: attempt.parts.get(name, 0.0))

    return {name: _shown(average(of(name))) for name in names}


def _official(
    usable: Sequence[Attempt], questions: Mapping[str, Sequence[Attempt]], judged_by: str
) -> Table:
    """By the rule of the benchmark's paper; what it leaves to a judge, by the recipe's accuracy."""
    metrics = sorted({attempt.metric for attempt in usable})
    by_rule = all(attempt.official is not None for attempt in usable)
    right = [a.official if a.official is not None else _accuracy(a) for a in usable]
    found: Table = {
        "metric": ", ".join(metrics),
        "by": "rule" if by_rule else judged_by,
        "score": _shown(
            average(_means(questions, lambda a: _accuracy(a) if a.official is None else a.official))
        ),
    }
    if metrics == ["infoseek"]:
        rows = (Scored(score=s, split=a.split) for s, a in zip(right, usable, strict=True))
        found |= infoseek_final(rows)
    if JUDGE in metrics:
        found |= attempted_scores(right, [attempt.attempted for attempt in usable])
    return found


def _searches(usable: Sequence[Attempt]) -> Table:
    asked = sum(attempt.searches for attempt in usable)
    answered = sum(attempt.answered for attempt in usable)
    empty = sum(attempt.empty for attempt in usable)
    return {
        "asked": asked,
        "answered": answered / asked if asked else None,
        "empty": empty / answered if answered else None,
    }


def _groups(usable: Sequence[Attempt], name_of: Callable[[Attempt], str]) -> Table:
    held: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in usable:
        if name := name_of(attempt):
            held[name].append(attempt)
    return {
        name: {"attempts": len(own), "accuracy": _mean(own, _accuracy)}
        for name, own in sorted(held.items())
    }


def accuracies(attempts: Sequence[Attempt]) -> str:
    """One attempt at each question in a few lines: what failed, accuracy, that of each data set."""
    failed = Counter(attempt.failed for attempt in attempts if attempt.failed)
    held: dict[str, list[bool]] = defaultdict(list)
    for attempt in attempts:
        if not attempt.failed:
            held[attempt.source].append(attempt.accuracy == 1.0)
    lines = []
    if failed:
        ((said, _),) = failed.most_common(1)
        lines.append(
            f"failed: {failed.total()} of {len(attempts)} questions failed outside the policy and "
            f"are not counted; most often: {said}"
        )
    right = [own for rows in held.values() for own in rows]
    lines.append(f"accuracy: {accuracy_of(sum(right), len(right))}")
    for source, name in most_frequent_sources({source: len(own) for source, own in held.items()}):
        lines.append(f"  {name}: {accuracy_of(sum(held[source]), len(held[source]))}")
    return "\n".join(lines)


def markdown(tables: Table, manifest: Mapping[str, Any]) -> str:
    """The tables and what they were made from."""
    names = [name for name in next(iter(tables.values()), {}) if "@" in name]
    lines = [
        "| benchmark | questions | failed | " + " | ".join(names) + " | official | supported |",
        "|---" * (len(names) + 5) + "|",
    ]
    for benchmark, table in tables.items():
        official = table["official"]
        by = official["metric"]
        by += "" if official["by"] == "rule" else f" in the paper, {official['by']} here"
        score = official.get("final", (official["score"] or {}).get("value"))
        cells = [
            _cell(benchmark),
            f"{table['answered_for']} of {table['questions']}",
            str(table["failed"]),
            *(_interval(table[name]) for name in names),
            f"{'–' if score is None else format(score, '.3f')} ({by})",
            _interval(table["grounds"]["right and supported"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for benchmark, table in tables.items():
        lines += ["", f"## {_cell(benchmark)}", ""]
        for title in ("by hops", "by tools", "by turns"):
            if table[title]:
                rows = (
                    f"{_cell(name)}: {own['accuracy']:.3f} (n={own['attempts']})"
                    for name, own in table[title].items()
                )
                lines.append(f"- {title}: " + ", ".join(rows))
        costs = ", ".join(f"{value:.2f} {name}" for name, value in table["cost"].items())
        lines.append(f"- per attempt: {costs}")
    lines += ["", "## What this was made from", ""]
    lines += [f"- {name}: {_cell(str(value))}" for name, value in manifest.items()]
    return "\n".join(lines) + "\n"


def _interval(shown: Mapping[str, float] | None) -> str:
    if shown is None:
        return "–"
    return f"{shown['value']:.3f} [{shown['low']:.3f}, {shown['high']:.3f}]"


def _cell(text: str) -> str:
    """A name of somebody else's as one cell of a table."""
    return " ".join(text.replace("|", "\\|").split())


def draw(tables: Table, out: Path) -> None:
    """One picture: pass@1 of every benchmark with its interval, and what of it was supported."""
    # Here, not above: matplotlib takes a second to import and few commands draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {name: table for name, table in tables.items() if table["pass@1"] is not None}
    figure = Figure(figsize=(8, 1.5 + 0.5 * max(1, len(shown))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="share of questions", xlim=(0, 1))
    for place, table in enumerate(shown.values()):
        one, grounded = table["pass@1"], table["grounds"]["right and supported"]
        around = [[one["value"] - one["low"]], [one["high"] - one["value"]]]
        axes.barh(place, one["value"], xerr=around, color="#7aa6c2", capsize=3)
        axes.barh(place, grounded["value"], height=0.3, color="#28536b")
    axes.set_yticks(range(len(shown)), list(shown))
    axes.set_title("pass@1 with 95 % interval; dark: right and supported")
    figure.savefig(out, dpi=120, format="png")
