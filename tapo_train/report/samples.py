"""A few attempts of a dumped step for a dashboard: what was seen, written, credited."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapo_train.credit.rollout_file import numbered_lines
from tapo_train.types import Box

__all__ = ["Sample", "read_samples"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One attempt, for people."""

    id: str
    question: str
    accepted: str
    answer: str
    accuracy: float | None
    reward: float | None
    advantage: float
    corrected: int
    """Turns that the credit stage took blame from."""
    turns: str
    """What the policy wrote, call by call, with the advantage of each turn before and after."""
    picture: Path | None
    """The first picture of the question."""
    cuts: tuple[Box, ...]
    """Regions of that picture which the attempt looked at, in [0, 1]."""


def read_samples(run: Path, step: int, count: int) -> list[Sample]:
    """Attempts of 0-based `step` as rank 0 dumped them: corrected ones first, half of `count` at
    most, then others in order. None where the step has no dump."""
    path = run / "tokens" / f"step_{step:06d}.jsonl"
    if count == 0 or not path.is_file():
        return []
    samples = [_sample(json.loads(line), run / "images") for _, line in numbered_lines(path)]
    corrected = [sample for sample in samples if sample.corrected][: (count + 1) // 2]
    chosen = {sample.id for sample in corrected}
    others = [sample for sample in samples if sample.id not in chosen]
    return [*corrected, *others[: count - len(corrected)]]


def _sample(view: Mapping[str, Any], pictures: Path) -> Sample:
    before = view["advantage"]
    reward = view["reward"] or {}
    picture, cuts = _picture(view["images"], view["num_question_images"], pictures)
    return Sample(
        id=view["id"],
        question=view["question"],
        accepted=" | ".join(view["accepted"]),
        answer=view["answer"] or "",
        accuracy=reward.get("accuracy"),
        reward=reward.get("total"),
        advantage=before,
        corrected=sum(bool((turn["credit"] or {}).get("transfer")) for turn in view["turns"]),
        turns="\n\n".join(_turn(turn, before) for turn in view["turns"]),
        picture=picture,
        cuts=cuts,
    )


def _turn(turn: Mapping[str, Any], before: float) -> str:
    after = turn["advantage"]
    change = f"{before:+.3f} → {after:+.3f}" if after != before else f"{after:+.3f}"
    calls = [
        f"→ {call['name']}({json.dumps(call['arguments'], ensure_ascii=False)}): {call['outcome']}"
        for call in turn["calls"]
    ]
    return "\n".join([f"turn {turn['index'] + 1}, advantage {change}", turn["text"], *calls])


def _picture(
    images: Sequence[Mapping[str, Any]], num_question_images: int, pictures: Path
) -> tuple[Path | None, tuple[Box, ...]]:
    if not num_question_images or images[0]["file"] is None:
        return None, ()
    first, root = images[0]["file"], images[0]["root"]
    cut = [tuple(image["box"]) for image in images[num_question_images:] if image["root"] == root]
    return pictures / first, tuple(cut)
