"""Rebuild every table and plot of the study from its records.

    python scripts/evidence/tables.py        docs/evidence/tables.md and *.png

A cell is a mean over seeds with its 95 % interval (Student's t). Arms are tested against their
baseline by a paired t test over the seeds both have, two-sided; within a table and a measure the
p values are Holm-adjusted. With fewer than five common seeds a comparison is left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
from arms import PAGES, RECORDS, SEEDS, TABLES, Table
from scipy import stats

LEAST_SEEDS = 5
TARGET = 0.8
WINDOW = 3
"""[steps] of the moving mean that has to reach the target."""
Record = dict[str, Any]


def load() -> dict[str, dict[int, Record]]:
    """Records by arm and seed."""
    found: dict[str, dict[int, Record]] = {}
    for path in sorted(RECORDS.glob("*/seed_*.json")):
        record = json.loads(path.read_text())
        found.setdefault(record["arm"], {})[record["seed"]] = record
    return found


def area(record: Record) -> float:
    """Mean accuracy of the sampled attempts over all steps."""
    return float(np.mean(record["steps"]["reward/accuracy"]))


def steps_to_target(record: Record) -> float:
    """Steps until the moving mean reaches the target; one more than there are if it never does."""
    curve = np.array(record["steps"]["reward/accuracy"])
    mean = np.convolve(curve, np.ones(WINDOW) / WINDOW, mode="valid")
    reached = np.flatnonzero(mean >= TARGET)
    return float(reached[0] + WINDOW if len(reached) else len(curve) + 1)


def final(record: Record) -> float:
    """Greedy accuracy on the test questions after the last step."""
    return float(record["steps"]["eval/accuracy"][-1])


@dataclass(frozen=True, slots=True)
class Measure:
    """One column."""

    title: str
    of: Callable[[Record], float]
    decimals: int = 3


MEASURES = (
    Measure("area under the curve", area),
    Measure(f"steps to {TARGET:.0%}", steps_to_target, 1),
    Measure("final, greedy", final),
)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the 95 % interval); infinite of a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("inf")
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * error


@dataclass(frozen=True, slots=True)
class Comparison:
    """An arm against its baseline, over their common seeds."""

    difference: float
    half: float
    p: float
    seeds: int


def compare(
    arm: dict[int, Record], baseline: dict[int, Record], measure: Measure
) -> Comparison | None:
    """None with too few common seeds."""
    common = sorted(arm.keys() & baseline.keys())
    if len(common) < LEAST_SEEDS:
        return None
    return judged([measure.of(arm[seed]) - measure.of(baseline[seed]) for seed in common])


def compare_together(
    pairs: Sequence[tuple[dict[int, Record], dict[int, Record]]], measure: Measure
) -> Comparison | None:
    """The mean gap over all pairs (arm, baseline), seed by seed: worlds of a seed are not
    independent, as they share the order of questions. None with too few common seeds."""
    common = set.intersection(*(arm.keys() & baseline.keys() for arm, baseline in pairs))
    if len(common) < LEAST_SEEDS:
        return None
    return judged(
        [
            float(np.mean([measure.of(arm[seed]) - measure.of(base[seed]) for arm, base in pairs]))
            for seed in sorted(common)
        ]
    )


def judged(gaps: Sequence[float]) -> Comparison:
    """One gap per seed, against none at all."""
    mean, half = interval(gaps)
    spread = float(np.std(gaps, ddof=1))
    p = 1.0 if spread == 0.0 and mean == 0.0 else float(stats.ttest_1samp(gaps, 0.0).pvalue)
    return Comparison(mean, half, p, len(gaps))


def holm(values: Sequence[float]) -> list[float]:
    """Adjusted p values, in the order given."""
    order = np.argsort(values, kind="stable")
    adjusted = np.empty(len(values))
    running = 0.0
    for rank, index in enumerate(order.tolist()):
        running = max(running, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = running
    return [float(p) for p in adjusted]


def cells(table: Table, records: dict[str, dict[int, Record]]) -> list[str]:
    """The markdown lines of a table of means."""
    lines = ["| arm | seeds | " + " | ".join(m.title for m in MEASURES) + " |"]
    lines.append("|---" * (2 + len(MEASURES)) + "|")
    for arm in table.arms:
        runs = records.get(arm.name, {})
        shown = []
        for measure in MEASURES:
            if not runs:
                shown.append("not run")
                continue
            mean, half = interval([measure.of(record) for record in runs.values()])
            spread = f" ± {half:.{measure.decimals}f}" if np.isfinite(half) else ""
            shown.append(f"{mean:.{measure.decimals}f}{spread}")
        lines.append(f"| {arm.name} | {len(runs)} | " + " | ".join(shown) + " |")
    return lines


def tests(table: Table, records: dict[str, dict[int, Record]]) -> list[str]:
    """The markdown lines of the paired comparisons; those that cannot be made are named."""
    lines = [
        "| arm − baseline | measure | difference (95 %) | p | p, Holm | seeds |",
        "|---|---|---|---|---|---|",
    ]
    missing = []
    for measure in MEASURES:
        made = []
        for name, other in table.compared:
            found = compare(records.get(name, {}), records.get(other, {}), measure)
            if found is None:
                missing.append(f"{name} − {other}")
            else:
                made.append((f"{name} − {other}", found))
        for label, pairs in table.together:
            both = [(records.get(name, {}), records.get(other, {})) for name, other in pairs]
            if (found := compare_together(both, measure)) is not None:
                made.append((label, found))
        adjusted = holm([found.p for _, found in made])
        for (label, found), p in zip(made, adjusted, strict=True):
            gap = f"{found.difference:+.{measure.decimals}f} ± {found.half:.{measure.decimals}f}"
            lines.append(
                f"| {label} | {measure.title} | {gap} | {found.p:.3f} | {p:.3f} | {found.seeds} |"
            )
    if missing:
        names = ", ".join(dict.fromkeys(missing))
        lines += ["", f"Fewer than {LEAST_SEEDS} common seeds, no comparison: {names}."]
    if mixed := [
        f"{name} − {other}" for name, other in table.compared if differ(name, other, records)
    ]:
        lines += ["", f"Runs of a seed made at different commits: {', '.join(mixed)}."]
    return lines


def differ(name: str, other: str, records: dict[str, dict[int, Record]]) -> bool:
    """Whether another code than their own may tell two arms apart."""
    ours, theirs = records.get(name, {}), records.get(other, {})
    return any(ours[seed]["commit"] != theirs[seed]["commit"] for seed in ours.keys() & theirs)


SHARES = {
    f"{kind}, {gate}{where}": f"tapo/frac_fail_{key}_corrected{suffix}{mixed}"
    for kind, key in (("trajectories", "traj"), ("steps", "steps"))
    for gate, suffix in (("similarity gate", "_theta"), ("both gates", ""))
    for where, mixed in ((", all", ""), (", groups with a success", "_mixed"))
}


def shares(records: dict[str, dict[int, Record]]) -> list[str]:
    """Correctable shares of the arm tapo along training: first, middle and last third."""
    runs = list(records.get("tapo", {}).values())
    if not runs:
        return ["not run"]
    lines = ["| share of failing | first third | middle | last third |", "|---|---|---|---|"]
    for label, key in SHARES.items():
        values = np.array([[np.nan if v is None else v for v in r["steps"][key]] for r in runs])
        thirds = [np.nanmean(part) for part in np.array_split(values, 3, axis=1)]
        lines.append(f"| {label} | " + " | ".join(f"{value:.2f}" for value in thirds) + " |")
    return lines


def plot_curves(name: str, table: Table, records: dict[str, dict[int, Record]], out: Path) -> bool:
    """Mean accuracy by step with the interval over seeds; whether there was anything to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [arm.name for arm in table.arms if len(records.get(arm.name, {})) >= 2]
    if not drawn:
        return False
    figure, axes = plt.subplots(figsize=(7, 4))
    for label in drawn:
        curves = np.array(
            [record["steps"]["reward/accuracy"] for record in records[label].values()]
        )
        mean = curves.mean(axis=0)
        half = stats.t.ppf(0.975, len(curves) - 1) * curves.std(axis=0, ddof=1) / len(curves) ** 0.5
        steps = np.arange(1, len(mean) + 1)
        (line,) = axes.plot(steps, mean, label=f"{label} ({len(curves)} seeds)")
        axes.fill_between(steps, mean - half, mean + half, alpha=0.12, color=line.get_color())
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy of sampled attempts")
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / f"{name}.png", dpi=90, metadata={"Software": None})
    plt.close(figure)
    return True


def phase_lines(phase: Record) -> list[str]:
    """The idealised agent along each dial, and what the gain is worth in learning rate."""
    lines = []
    for dial, rows in phase["lines"].items():
        stages = [key for key in rows[0] if key != dial]
        lines += ["", f"| {dial} | " + " | ".join(stages) + " |", "|---" * (1 + len(stages)) + "|"]
        for row in rows:
            lines.append(f"| {row[dial]:g} | " + " | ".join(f"{row[s]:.3f}" for s in stages) + " |")
    lines += ["", "| stage | learning rate, times | mean success |", "|---|---|---|"]
    for row in phase["rates"]:
        lines.append(f"| {row['stage']} | {row['rate']:g} | {row['mean']:.3f} |")
    return lines


def plot_phase(phase: Record, out: Path) -> None:
    """Gain of TAPO over two pairs of dials; "?": the interval of a cell holds 0."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, places = plt.subplots(1, len(phase["diagrams"]), figsize=(10, 4))
    for axes, diagram in zip(places, phase["diagrams"], strict=True):
        across, down = (list(dict.fromkeys(c[diagram[k]] for c in diagram["cells"]))
                        for k in ("across", "down"))  # fmt: skip
        gains = np.array([c["gain"] for c in diagram["cells"]]).reshape(len(down), len(across))
        limit = max(0.01, float(np.abs(gains).max()))
        image = axes.imshow(gains, cmap="RdBu", vmin=-limit, vmax=limit, origin="lower")
        for number, cell in enumerate(diagram["cells"]):
            y, x = divmod(number, len(across))
            mark = "" if abs(cell["gain"]) > cell["half"] else " ?"
            axes.text(x, y, f"{cell['gain']:+.3f}{mark}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(across)), [f"{v:g}" for v in across])
        axes.set_yticks(range(len(down)), [f"{v:g}" for v in down])
        axes.set_xlabel(diagram["across"])
        axes.set_ylabel(diagram["down"])
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.tight_layout()
    figure.savefig(out / "phase.png", dpi=90, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    records = load()
    runs = [record for seeds in records.values() for record in seeds.values()]
    cpu, wall = (sum(record[key] for record in runs) / 3600 for key in ("cpu_s", "wall_s"))
    lines = [
        "# Tables of the study",
        "",
        "Made by `scripts/evidence/tables.py` from those in `records/`; do not edit. Mean and",
        "half of its 95 % interval over seeds; paired t tests, Holm-adjusted by table and measure.",
        "",
        f"{len(runs)} runs, {cpu:.1f} hours of CPU time ({wall:.1f} h of wall time).",
    ]
    for name, table in TABLES.items():
        lines += ["", f"## {table.title}", "", *cells(table, records), "", *tests(table, records)]
        if plot_curves(name, table, records, PAGES):
            lines += ["", f"![learning curves]({name}.png)"]
        missing = [a.name for a in table.arms if len(records.get(a.name, {})) < len(SEEDS)]
        if missing:
            lines += ["", f"Incomplete: {', '.join(missing)} (`run.py {name}` goes on)."]
    lines += ["", "## Correctable shares along training (arm tapo)", "", *shares(records)]
    phase = json.loads((RECORDS.parent / "phase.json").read_text())
    plot_phase(phase, PAGES)
    lines += ["", "## The idealised agent", "", "Mean success over 80 updates. ![gain](phase.png)"]
    lines += phase_lines(phase)
    (PAGES / "tables.md").write_text("\n".join(lines) + "\n")
    print(f"wrote {PAGES / 'tables.md'} from {len(runs)} runs")


if __name__ == "__main__":
    main()
