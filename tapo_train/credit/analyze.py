"""`python -m tapo_train analyze`: the credit stage alone, on rollouts of any framework."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tapo_train.credit.assigners import Tapo
from tapo_train.credit.overrides import parse_options
from tapo_train.credit.place import Place, place
from tapo_train.credit.result import CreditResult
from tapo_train.credit.rollout_file import RolloutFile, read_files
from tapo_train.credit.rollout_lines import corrected_line
from tapo_train.credit.steps import CreditRow
from tapo_train.credit.sweep import parse_axes, require_legal, sweep, table
from tapo_train.errors import ConfigError, DataError

_DESCRIPTION = """\
Run the credit stage alone: no model, no GPU. Reads rollouts (one JSON object per line and
trajectory), says how much credit is misassigned in them, and can write the corrected rows.

A line: {"id": "t3", "group": "q17", "correct": false, "advantage": -0.77 (or "reward": 0.0),
 "steps": [{"turn": 0, "calls": [{"name": "text_search_tool", "arguments": {"query": "…"},
 "valid": true, "executed": true, "status": "ok", "observation": "…"}]}]}
Optional: "images": [{"root": "…", "box": [0,0,1,1]}] of the line, "new_images" of a call.
"""
_EPILOG = """\
examples:
  python -m tapo_train analyze rollouts.jsonl
  python -m tapo_train analyze runs/demo/rollouts/*.jsonl
  python -m tapo_train analyze rollouts.jsonl --out corrected.jsonl credit.beta=0.4
  python -m tapo_train analyze rollouts.jsonl credit.theta_by_tool.text_search_tool=0.6
  python -m tapo_train analyze rollouts.jsonl --sweep theta=0.3:0.9:0.1 alpha_min=0.1:0.5:0.1
"""
_SHOWN_PROBLEMS = 10


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tapo_train analyze",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="FILE | credit.x=y",
        help="JSONL files of rollouts, each with groups of its own; and options of the TAPO "
        "credit stage",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the corrected rows here")
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar="x=a:b:step",
        help="table, CSV and heat map over one or two options; theta then holds for every tool",
    )
    parser.add_argument(
        "--sweep-out", type=Path, metavar="DIR", help="folder of sweep.csv and sweep.png (sweep)"
    )
    bad = parser.add_mutually_exclusive_group()
    bad.add_argument(
        "--strict", action="store_true", help="stop at the first unreadable line (default)"
    )
    bad.add_argument(
        "--skip-bad", action="store_true", help="count unreadable lines and go on without them"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Analyse a file of rollouts; returns the exit code.

    Raises:
        ConfigError: an override or a sweep is wrong.
        DataError: the file is.
    """
    parser = _parser()
    arguments = parser.parse_intermixed_args(list(argv))
    swept = arguments.sweep or []
    overrides = [word for word in arguments.words if _is_override(word)]
    paths = [Path(word) for word in arguments.words if not _is_override(word)]
    if not paths:
        parser.error("a FILE of rollouts is required")
    options = parse_options(overrides + [s for s in swept if s.startswith("credit.")])
    if arguments.sweep_out and not swept:
        raise ConfigError("--sweep-out without --sweep; want a sweep to write")
    axes = parse_axes([s for s in swept if not s.startswith("credit.")]) if swept else []
    require_legal(options, axes)
    if arguments.out and arguments.out.resolve() in [path.resolve() for path in paths]:
        raise ConfigError(f"--out is {arguments.out}, the file that is read; want another one")
    file = read_files(paths, skip_bad=arguments.skip_bad)
    _warn(file)
    if not file.rows:
        raise DataError(f"{paths[0]}: no rollout in it; want at least one line")
    result = Tapo(options)(file.rows)
    print("\n".join(report(file.rows, result)))
    if arguments.out:
        _write(arguments.out, file.rows, result)
        print(f"\ncorrected rows: {arguments.out}")
    if axes:
        # Here, as matplotlib takes a second to import.
        from tapo_train.credit.sweep_files import write_sweep

        points = sweep(file.rows, options, axes)
        print("\nCorrectable share\n" + "\n".join(table(axes, points)))
        paths = write_sweep(arguments.sweep_out or Path("sweep"), axes, points)
        print("\nsweep: " + ", ".join(map(str, paths)))
    return 0


def _is_override(word: str) -> bool:
    return ("=" in word or word.startswith("credit.")) and not Path(word).is_file()


def _warn(file: RolloutFile) -> None:
    for message in file.bad[:_SHOWN_PROBLEMS]:
        print(f"skipped: {message}", file=sys.stderr)
    if file.bad:
        print(f"skipped {len(file.bad)} unreadable lines", file=sys.stderr)
    for key, count in file.ignored_keys.most_common(_SHOWN_PROBLEMS):
        print(f"ignored key {key!a} ({count} times)", file=sys.stderr)


def _write(path: Path, rows: Sequence[CreditRow], result: CreditResult) -> None:
    """Write the corrected rows; a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="ascii") as file:
            file.writelines(corrected_line(row, result, i) + "\n" for i, row in enumerate(rows))
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error


def report(rows: Sequence[CreditRow], result: CreditResult) -> list[str]:
    """The diagnostics as lines of text."""
    sums, metrics = result.sums, result.metrics
    sizes = Counter(row.group for row in rows)
    lines = [f"{len(rows)} trajectories of {len(sizes)} questions", ""]
    lines += ["Correctable                          similarity gate        both gates"]
    for label, key in _POPULATIONS.items():
        kind, mixed = key.removesuffix("_mixed"), "_mixed" if key.endswith("_mixed") else ""
        total = sums[key]
        parts = [sums[f"{kind}_corrected{gate}{mixed}"] for gate in ("_theta", "")]
        lines.append(f"  {label:<33}" + "  ".join(_share(part, total) for part in parts))
    lines += ["", "Calls of failing trajectories        total    similar  corrected"]
    lines += _counts(metrics, "tapo/by_tool/")
    lines += ["", "Steps of failing trajectories        total    similar  corrected"]
    lines += _counts(metrics, "tapo/by_turn/", "turn ")
    lines += ["", "Corrected steps and references"]
    lines += [
        _value(label, metrics.get(key), decimals=0 if key in _WHOLE else 3)
        for label, key in _TRANSFER.items()
    ]
    lines += ["", "Determinism audit of corrected calls"]
    lines += [_value(label, metrics.get(key), decimals=3) for label, key in _AUDIT.items()]
    bins = sorted(key for key in metrics if key.startswith("credit/turn_gap_hist/"))
    lines += [f"    turn gap {key.rsplit('/')[-1]:<22}{metrics[key]:>9.0f}" for key in bins]
    return [*lines, "", *_placed(place(rows, result))]


def _placed(found: Place | None) -> list[str]:
    """Where the rollouts lie in the idealised agent's diagram."""
    title = "Place in the idealised model (docs/evidence.md)"
    if found is None:
        return [title, "  no success that used a tool beside a failure"]
    setting = found.setting
    return [
        title,
        f"  chains of {setting.length} steps, each right in {setting.start:.0%}",
        f"  {setting.late_failure:.0%} of complete chains fail; groups of {setting.rollouts}",
        f"  {setting.updates} updates: right {found.plain:.2f}, with transfer {found.transfer:.2f}",
    ]


_POPULATIONS = {
    "failing trajectories": "fail_traj",
    "  of questions with a success": "fail_traj_mixed",
    "tool steps of failing ones": "fail_steps",
    "  of questions with a success ": "fail_steps_mixed",
}
_TRANSFER = {
    "similarity, mean": "tapo/sim_mean",
    "support, mean": "tapo/sup_mean",
    "transfer before beta, mean": "tapo/F_mean",
    "change of advantage, mean": "tapo/delta_adv_mean",
    "share cut at zero": "tapo/clip_frac",
    "clusters": "tapo/n_clusters",
    "calls per cluster": "tapo/cluster_size_mean",
    "seconds in the credit stage": "tapo/time_s",
}
_WHOLE = ("tapo/n_clusters",)
_AUDIT = {
    "observation agreement": "credit/observation_agreement",
    "turn gap, mean": "credit/turn_gap",
    "novelty gap": "credit/novelty_gap",
}


def _share(part: float, total: float) -> str:
    share = f"{100 * part / total:5.1f} %" if total else "    - %"
    return f"{part:>6.0f}/{total:<6.0f}{share}"


def _value(label: str, value: float | None, *, decimals: int) -> str:
    return f"  {label:<33}" + ("        -" if value is None else f"{value:>9.{decimals}f}")


def _counts(metrics: Mapping[str, float], prefix: str, label: str = "") -> list[str]:
    names = {
        key.removeprefix(prefix).rsplit("/", 1)[0] for key in metrics if key.startswith(prefix)
    }
    ordered = sorted(names, key=lambda name: (int(name) if name.isdecimal() else -1, name))
    return [
        f"  {ascii(label + name)[1:-1]:<33}"
        + "".join(
            f"{metrics[f'{prefix}{name}/{kind}']:>10.0f}"
            for kind in ("total", "matched", "corrected")
        )
        for name in ordered
    ]
