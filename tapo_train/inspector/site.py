"""Steps to a folder of pages: data files that the page loads one by one, pictures beside them.

    OUT/
      index.html  style.css  app.js  preact.js     the same for every run
      data/run.js                                  the recipe, the steps, their metrics
      data/step_000012.js                          the questions of a step and their attempts
      data/step_000012/q_0003.js                   one question, token by token
      images/<sha256>.png

Data are scripts because a page opened from a file may load nothing else. Each calls `tapo.put`
with one JSON value in ASCII without `<`, so no text of a policy, a tool or a file name can end
the script or become markup; the page builds text nodes only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tapo_train.credit.reasons import StepReason
from tapo_train.inspector.pieces import Pieces
from tapo_train.inspector.records import Attempt, Question, Step
from tapo_train.report.files import write_atomically
from tapo_train.report.plain import plain

__all__ = ["Site"]

_ASSETS = ("index.html", "style.css", "app.js", "preact.js")
_PICTURE = re.compile(r"[0-9a-f]{64}\.(png|jpg|gif|webp|bmp)")
"""Names under which the dumps store pictures; no other file is taken over."""


@dataclass(frozen=True, slots=True)
class Site:
    """The folder that is written.

    Args:
        out: made if it is not there.
        pictures: where the dumped pictures lie; None: there are none.
        pieces: tokens to pieces of text; None: turns are shown whole.
    """

    out: Path
    pictures: Path | None = None
    pieces: Pieces | None = None

    def write_assets(self) -> None:
        """The page itself."""
        for name in _ASSETS:
            asset = files("tapo_train.inspector").joinpath("assets", name)
            write_atomically(self.out / name, asset.read_bytes())

    def write_run(self, about: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> None:
        """What the first page shows; `steps` are those that `write_step` gave."""
        self._put("run", {**about, "steps": list(steps)})

    def write_step(self, step: Step) -> dict[str, Any]:
        """The pages of a step; its line on the first page."""
        name = f"step_{step.number - 1:06d}"
        questions = []
        for index, question in enumerate(step.questions):
            key = f"q_{index:04d}"
            self._put(f"{name}/{key}", self._question(question))
            questions.append(_question_line(key, question))
        self._put(name, {"number": step.number, "questions": questions})
        attempts = [line for question in questions for line in question["attempts"]]
        return {"number": step.number, "file": name, **_step_line(questions, attempts)}

    def _question(self, question: Question) -> dict[str, Any]:
        judged = [n for n, attempt in enumerate(question.attempts) if attempt.row is not None]
        first = question.attempts[0].view
        return {
            "group": question.group,
            "question": first["question"],
            "accepted": first.get("accepted", []),
            "prompt": self._prompt(first),
            "attempts": [self._attempt(held, judged) for held in question.attempts],
        }

    def _prompt(self, view: Mapping[str, Any]) -> str | None:
        if self.pieces is None:
            return None
        return "".join(self.pieces(view["tokens"], 0, int(view.get("prompt_length", 0))))

    def _attempt(self, attempt: Attempt, judged: Sequence[int]) -> dict[str, Any]:
        view = attempt.view
        for image in view["images"]:
            self._take_picture(image.get("file"))
        reasons = {reason.turn: reason for reason in attempt.reasons}
        at, turns = 0, []
        for turn in view["turns"]:
            start, end = turn["span"]
            turns.append(
                {
                    "index": turn["index"],
                    "start": start,
                    "versions": _versions(turn, view),
                    "text": turn["text"],
                    "pieces": self.pieces(view["tokens"], start, end) if self.pieces else None,
                    "logprobs": view["logprobs"][at : at + end - start],
                    "scores": _part(attempt.scores, at, at + end - start),
                    "advantage": turn.get("advantage"),
                    "credit": turn.get("credit"),
                    "calls": turn["calls"],
                    "num_images_before": turn.get("num_images_before", 0),
                    "reason": _reason(reasons.get(turn["index"]), judged),
                }
            )
            at += end - start
        kept = ("id", "answer", "stop", "reward", "advantage", "images", "num_question_images")
        return {**{key: view.get(key) for key in kept}, "turns": turns, **_flags(attempt)}

    def _take_picture(self, name: object) -> None:
        if self.pictures is None or not isinstance(name, str) or not _PICTURE.fullmatch(name):
            return
        source, target = self.pictures / name, self.out / "images" / name
        if target.exists() or not source.is_file() or source.is_symlink():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copyfile(source, target)

    def _put(self, key: str, value: Mapping[str, Any]) -> None:
        text = json.dumps(plain(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
        script = f'tapo.put("{key}",{text.replace("<", chr(92) + "u003c")});\n'
        write_atomically(self.out / "data" / f"{key}.js", script)


def _versions(turn: Mapping[str, Any], view: Mapping[str, Any]) -> list[list[int]]:
    """[start, end, version] among the turn's sampled tokens; none where it is not known."""
    version = turn.get("policy_version", view.get("policy_version"))
    whole = [] if version is None else [[0, turn["span"][1] - turn["span"][0], version]]
    return turn.get("versions") or whole


def _part(scores: Mapping[str, Any] | None, start: int, end: int) -> dict[str, Any] | None:
    if scores is None:
        return None
    return {name: scores[name][start:end] for name in ("logprobs", "ratio", "entropy")}


def _reason(reason: StepReason | None, judged: Sequence[int]) -> dict[str, Any] | None:
    """With references by their attempt's place among all of the question."""
    if reason is None:
        return None
    held = asdict(reason)
    for call in held["calls"]:
        for reference in call["cluster"]:
            reference["attempt"] = judged[reference.pop("row")]
    return held


def _flags(attempt: Attempt) -> dict[str, Any]:
    """What the filters ask for."""
    view = attempt.view
    calls = [call for turn in view["turns"] for call in turn["calls"]]
    credits = [turn.get("credit") or {} for turn in view["turns"]]
    corrected = [reason for reason in attempt.reasons if reason.after != reason.before]
    moved = sum(bool(held.get("transfer")) for held in credits) or len(corrected)
    return {
        "left_out": attempt.row is None,
        "tools": dict(Counter(str(call.get("name")) for call in calls)),
        "failed": sum(call.get("outcome") != "ok" for call in calls),
        "corrected": moved,
        "cut": sum(bool(held.get("clipped")) for held in credits)
        or sum(reason.clipped for reason in attempt.reasons),
    }


def _question_line(key: str, question: Question) -> dict[str, Any]:
    first = question.attempts[0].view
    return {
        "key": key,
        "group": question.group,
        "question": first["question"],
        "accepted": first.get("accepted", []),
        "source": first.get("source", ""),
        "attempts": [
            {
                **{name: attempt.view.get(name) for name in ("id", "answer", "stop", "reward")},
                "advantage": attempt.view.get("advantage"),
                "turns": len(attempt.view["turns"]),
                **_flags(attempt),
            }
            for attempt in question.attempts
        ],
    }


def _step_line(
    questions: Sequence[Mapping[str, Any]], attempts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    used = [line for line in attempts if not line["left_out"]]
    rewards = [line["reward"]["total"] for line in used if line["reward"]]
    rewards = [value for value in rewards if isinstance(value, int | float)]
    mean = sum(rewards) / len(rewards) if rewards else None
    right = sum(bool(line["reward"]) and line["reward"]["accuracy"] >= 0.5 for line in used)
    return {
        "questions": len(questions),
        "attempts": len(attempts),
        "left_out": len(attempts) - len(used),
        "reward": mean,
        "spread": None
        if mean is None
        else (sum((value - mean) ** 2 for value in rewards) / len(rewards)) ** 0.5,
        "right": right,
        "failing": sum((line["advantage"] or 0) < 0 for line in used),
        "corrected_attempts": sum(line["corrected"] > 0 for line in used),
        "corrected": sum(line["corrected"] for line in used),
        "cut": sum(line["cut"] for line in used),
    }
