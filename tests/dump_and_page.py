"""Whether the pages of a run show the numbers of its dump: read from the DOM of a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chromium import visit

SHOWN = 5.1e-5
"""Half a unit in the fourth decimal, and a little for halves."""
SHOWN_ADVANTAGE = 5.1e-4


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def compare(page: Any, pages: Path, run: Path, step: int, number: int) -> dict[str, int]:
    """Compare all attempts at the 0-based `step`'s question `number`; how much was compared."""
    name = f"step_{step:06d}"
    views = rows(run / "tokens" / f"{name}.jsonl")
    scores = {row["id"]: row for row in rows(run / "scores" / f"{name}.jsonl")}
    groups = list(dict.fromkeys(view["group"] for view in views))
    attempts = [view for view in views if view["group"] == groups[number]]
    counts = {"attempts": len(attempts), "tokens": 0, "corrected": 0}
    for place, view in enumerate(attempts):
        visit(page, pages, f"{name}/q_{number:04d}/{place}", ".turn")
        page.wait_for_selector(f"h2:has-text('attempt {place + 1}')")
        after = [_number(text) for text in page.locator(".turn .after").all_inner_texts()]
        dumped = [turn["advantage"] for turn in view["turns"]]
        assert after == pytest.approx(dumped, abs=SHOWN_ADVANTAGE)
        counts["corrected"] += page.locator(".turn.is-corrected").count()
        versions = [f"weights {turn['policy_version']}" for turn in view["turns"]]
        assert page.locator(".versions").all_inner_texts() == versions
        scored = scores.get(view["id"])
        if scored is None:
            continue
        pairs = zip(scored["logprobs"], view["logprobs"], strict=True)
        for measure, values in {
            "entropy": scored["entropy"],
            "ratio": [ratio - 1 for ratio in scored["ratio"]],
            "mismatch": [learner - sampler for learner, sampler in pairs],
            "surprise": [-sampler for sampler in view["logprobs"]],
        }.items():
            page.select_option("#colour", measure)
            page.wait_for_selector(".written span[title]")
            titles = page.eval_on_selector_all(
                ".written span[title]", "spans => spans.map(span => span.title)"
            )
            assert [_number(title) for title in titles] == pytest.approx(values, abs=SHOWN)
            counts["tokens"] += len(titles)
    return counts


def _number(text: str) -> float:
    """The last word, as the pages write numbers."""
    word = text.split()[-1]
    return float(word.replace("−", "-").replace("±", ""))
