"""Simulate the idealised agent over its phase diagram and record what came out.

    python scripts/evidence/phase.py        docs/evidence/phase.json; tables.py draws it

Each cell: mean success over the updates of each credit stage, and the gain of TAPO with its 95 %
interval over agents. The agents of two stages are different draws, so the interval is unpaired.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
from arms import PAGES
from scipy import stats

from tapo_train.credit.idealised import (
    Credit,
    Placebo,
    Setting,
    mean_success,
    no_transfer,
    shrink,
    tapo,
)

BASE = Setting(choices=2, start=0.5)
AGENTS = 20
AXES: dict[str, tuple[int | float, ...]] = {
    "length": (1, 2, 3, 4, 5, 6),
    "late_failure": (0.0, 0.2, 0.4, 0.6, 0.8),
    "luck": (0.0, 0.05, 0.15, 0.3, 0.5),
    "rollouts": (2, 4, 8, 16),
}
DIAGRAMS = (("length", "late_failure"), ("luck", "rollouts"))
LINES = ("length", "late_failure", "luck", "rollouts")
"""Dials that all four stages are compared along, the rest as in BASE."""
BATCH = 128
"""Attempts of a batch, whatever the group's size."""


def at(**dials: int | float) -> Setting:
    """BASE with these dials, of equal compute."""
    setting = replace(BASE, **dials)  # type: ignore[arg-type]
    return replace(setting, groups=BATCH // setting.rollouts)


def gain(setting: Setting) -> dict[str, float]:
    """Of TAPO over the baseline, with half of its 95 % interval."""
    plain = mean_success(setting, no_transfer, agents=AGENTS, seed=1)
    moved = mean_success(setting, tapo, agents=AGENTS, seed=2)
    error = float(np.sqrt((plain.var(ddof=1) + moved.var(ddof=1)) / AGENTS))
    half = float(stats.t.ppf(0.975, 2 * AGENTS - 2)) * error
    return {
        "plain": round(float(plain.mean()), 4),
        "gain": round(float(moved.mean() - plain.mean()), 4),
        "half": round(half, 4),
    }


def stages() -> dict[str, Credit]:
    """The stages by name."""
    return {"none": no_transfer, "tapo": tapo, "placebo": Placebo(), "shrink": shrink}


def main() -> None:
    found: dict[str, Any] = {"base": asdict(BASE), "agents": AGENTS, "diagrams": [], "lines": {}}
    for across, down in DIAGRAMS:
        cells = [
            {across: a, down: d, **gain(at(**{across: a, down: d}))}
            for d in AXES[down]
            for a in AXES[across]
        ]
        found["diagrams"].append({"across": across, "down": down, "cells": cells})
    for dial in LINES:
        found["lines"][dial] = [
            {
                dial: value,
                **{
                    name: round(
                        float(mean_success(at(**{dial: value}), c, agents=AGENTS).mean()), 4
                    )
                    for name, c in stages().items()
                },
            }
            for value in AXES[dial]
        ]
    rates = [(1.0, "none", no_transfer), (1.0, "tapo", tapo)]
    rates += [(rate, "none", no_transfer) for rate in (1.2, 1.4, 1.6, 2.0)]
    found["rates"] = [
        {
            "stage": name,
            "rate": rate,
            "mean": round(float(mean_success(at(learning_rate=rate), c, agents=AGENTS).mean()), 4),
        }
        for rate, name, c in rates
    ]
    PAGES.mkdir(parents=True, exist_ok=True)
    (PAGES / "phase.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {PAGES / 'phase.json'}")


if __name__ == "__main__":
    main()
