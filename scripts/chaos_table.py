"""What the fault run did: checks it from its dumps, prints the table, writes it into a page.

    python scripts/chaos_table.py OUT [--write docs/reliability.md]

Exits with 1 if a trajectory that met an infrastructure failure took part in loss or baseline, if
a connection tried to leave the machine, or if memory grew beyond MAX_MEMORY of the clean run.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_MEMORY = 1.3
FROM_OUTSIDE = ("infra_error", "timeout")
EPS = 1e-6
"""`group_advantages` adds it to the standard deviation."""
TOLERANCE = 1e-9
BEGIN, END = "<!-- chaos: written by make chaos -->", "<!-- /chaos -->"
REASONS = {
    "refused": (
        ("private", "a private address"),
        ("link-local", "a link-local address"),
        ("disguised", "an IPv4 address inside IPv6"),
        ("bomb", "a decompression bomb"),
        ("too large", "more bytes than allowed"),
        ("opening it", "took too long to open"),
    ),
    "infra_error": (
        ("private", "an endpoint that leads to a private address"),
        ("link-local", "an endpoint that leads to a link-local address"),
        ("disguised", "an endpoint that leads to an IPv4 address inside IPv6"),
        ("bomb", "a decompression bomb"),
        ("too large", "more bytes than allowed"),
        ("HTTP 5", "HTTP 5xx"),
        ("another form", "an answer of another form"),
        ("connection failed", "a connection that failed or broke off"),
    ),
    "timeout": (("", "no answer in time"),),
}

Row = dict[str, Any]


def rows_of(folder: Path) -> list[Row]:
    """Every trajectory of a dump folder, with the step of its file."""
    return [
        json.loads(line) | {"step": path.name.split(".")[0]}
        for path in sorted(folder.glob("step_*.jsonl"))
        for line in path.open()
    ]


def calls_of(row: Row) -> list[Row]:
    return [call for turn in row["turns"] for call in turn["calls"] if call["executed"]]


def met_failure(row: Row) -> bool:
    return any(call["outcome"] in FROM_OUTSIDE for call in calls_of(row))


def touched(trajectories: list[Row], analysed: list[Row]) -> list[str]:
    """Trajectories whose failure reached loss or baseline; what is wrong with each.

    The advantages of all others are computed again from their rewards alone: were a failed one's
    reward in the baseline, they would differ.
    """
    wrong = []
    known = {row["id"] for row in analysed}
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in trajectories:
        if met_failure(row):
            if row["stop"] != "infra" or row["advantage"] != 0 or row["id"] in known:
                wrong.append(f"{row['id']}: failed, yet has an advantage or a credit row")
            if any(turn["advantage"] != 0 for turn in row["turns"]):
                wrong.append(f"{row['id']}: failed, yet a turn has an advantage")
        else:
            groups[row["step"], row["id"].rpartition(".")[0]].append(row)
    for held in groups.values():
        rewards = [row["reward"]["total"] for row in held]
        mean = statistics.fmean(rewards)
        std = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
        for row, reward in zip(held, rewards, strict=True):
            expected = (reward - mean) / (std + EPS) if std > TOLERANCE else 0.0
            if abs(row["advantage"] - expected) > 1e-6:
                wrong.append(f"{row['id']}: advantage {row['advantage']}, by hand {expected}")
    return wrong


def reason_of(call: Row) -> str:
    """The outcome of a call, with what was wrong."""
    outcome, text = call["outcome"], call["observation"] or ""
    if outcome == "ok":
        return "ok, a picture left out" if "(no picture)" in text else "ok"
    if outcome == "model_error":
        return "model_error"
    for mark, words in REASONS.get(outcome, ()):
        if mark in text:
            return f"{outcome}: {words}"
    return f"{outcome}: {text[:60]}"


def peaks_gib(folder: Path) -> list[float]:
    return [int(path.read_text()) / 2**20 for path in sorted(folder.glob("rss.*"))]


def left(folder: Path) -> list[str]:
    return [line for path in folder.glob("left.*") for line in path.read_text().splitlines()]


def table(head: str, rows: Iterable[tuple[str, int]]) -> list[str]:
    return [f"| {head} | number |", "|---|---|", *(f"| {name} | {num} |" for name, num in rows), ""]


def report(out: Path) -> tuple[str, list[str]]:
    """The page's part about the run, and the problems."""
    steps = [json.loads(line) for line in (out / "faults/run/metrics.jsonl").open()]
    trajectories = rows_of(out / "faults/run/tokens")
    wrong = touched(trajectories, rows_of(out / "faults/run/rollouts"))
    problems = wrong + [f"a connection would have left: {line}" for line in left(out / "faults")]
    faulty = max(peaks_gib(out / "faults"))
    clean = max(peaks_gib(out / "clean"), default=faulty)
    if faulty > MAX_MEMORY * clean:
        problems.append(f"memory {faulty:.2f} GiB, more than {MAX_MEMORY} x {clean:.2f} GiB")
    served = Counter(json.loads(line)["fault"] for line in (out / "faults/events.jsonl").open())
    recorded = Counter(reason_of(call) for row in trajectories for call in calls_of(row))
    failed = sum(met_failure(row) for row in trajectories)
    compared = out / "clean/run/metrics.jsonl"
    clean_steps = [json.loads(line) for line in compared.open()] if compared.exists() else []
    grown, calls = faulty / clean, sum(recorded.values())
    ended = f"""\
{len(steps)} steps, {len(peaks_gib(out / "faults"))} ranks, {len(trajectories)} trajectories,
{calls} tool calls. The run ended by itself. The same run with a server that only answers took
{total_s(clean_steps):.0f} s, this one {total_s(steps):.0f} s.

- {failed} trajectories met a failure outside the policy; {len(wrong)} of them touched loss,
  baseline or credit (all advantages were computed again from the dumps).
- Peak resident memory of a rank: {faulty:.2f} GiB, {grown:.2f} x the clean run's {clean:.2f} GiB
  (bound: {MAX_MEMORY}).
- Connections that tried to leave the machine: {len(left(out / "faults"))}. Every connect of the
  ranks went through an audit hook that refuses all but the loopback's.
"""
    lines = [
        ended,
        *table("what the servers did", sorted(served.items())),
        *table("what the calls ended as", sorted(recorded.items())),
    ]
    return "\n".join(lines), problems


def total_s(steps: list[Row]) -> float:
    return float(sum(step["time/step_s"] for step in steps))


def main() -> int:
    text, problems = report(Path(sys.argv[1]))
    print(text)
    if "--write" in sys.argv and not problems:
        page = Path(sys.argv[sys.argv.index("--write") + 1])
        before, _, rest = page.read_text().partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{text}{END}{rest.partition(END)[2]}")
    for problem in problems:
        print(f"PROBLEM {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
