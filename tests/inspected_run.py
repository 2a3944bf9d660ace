"""A small run folder with every kind of thing the pages show, written by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

PICTURE = "ab" * 32
CROP = "cd" * 32
HOSTILE = '</script><img src=x onerror="document.title=`owned`">\u2028'
RED_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc0"
    "000003010100c9fe92ef0000000049454e44ae426082"
)
"""1 × 1 pixel."""


def call(query: str, **other: Any) -> dict[str, Any]:
    """A text search."""
    made = {
        "name": "text_search_tool",
        "arguments": {"query": query},
        "valid": True,
        "executed": True,
        "outcome": "ok",
        "span": None,
        "observation": f"1. about {query}",
        "observation_images": [],
        "latency_s": 0.25,
    }
    return made | other


ZOOM = call("") | {
    "name": "image_zoom_in_tool",
    "arguments": {"bbox_2d": [500, 0, 1000, 500], "img_idx": 0},
    "observation_images": [CROP],
}


def view(
    name: str,
    *,
    advantage: float,
    accuracy: float,
    calls: Sequence[dict[str, Any]],
    group: str = "q1",
    question: str = "Who?",
    after: Sequence[float] = (),
) -> dict[str, Any]:
    """A line of `tokens/`: a turn per call, then an answer turn."""
    turns = []
    for index in range(len(calls) + 1):
        turns.append(
            {
                "index": index,
                "span": [2 * index, 2 * index + 2],
                "text": f"<think>step {index}</think>",
                "calls": [calls[index]] if index < len(calls) else [],
                "num_images_before": 1,
                "advantage": after[index] if index < len(after) else advantage,
                "credit": None,
            }
        )
        turns[-1]["versions"] = [[0, 1, 2], [1, 2, 3]] if index == 0 else []
    root = f"sha256:{PICTURE}"
    whole = {"file": f"{PICTURE}.png", "sha256": PICTURE, "width": 200, "height": 100}
    crop = {"file": f"{CROP}.png", "sha256": CROP, "width": 100, "height": 50}
    pictures = [whole | {"root": root, "box": [0.0, 0.0, 1.0, 1.0]}]
    if any(made.get("observation_images") for made in calls):
        pictures.append(crop | {"root": root, "box": [0.5, 0.0, 1.0, 0.5]})
    return {
        "id": name,
        "group": group,
        "policy_version": 3,
        "question": question,
        "accepted": ["Anna"],
        "answer": "Anna" if accuracy else HOSTILE,
        "stop": "answer",
        "reward": {"total": accuracy + 0.5, "accuracy": accuracy, "parts": {"format": 1.0}},
        "advantage": advantage,
        "prompt_length": 0,
        "num_question_images": 1,
        "images": pictures,
        "turns": turns,
        "tokens": [0] * (2 * len(turns)),
        "logprobs": [-0.5] * (2 * len(turns)),
    }


def row_of(held: dict[str, Any]) -> dict[str, Any]:
    """The line of `rollouts/` that goes with a view."""
    steps = []
    for turn in held["turns"]:
        calls = [
            {
                "name": made["name"],
                "arguments": made["arguments"],
                "valid": made["valid"],
                "executed": made["executed"],
                "status": "ok" if made["outcome"] == "ok" else "model_error",
            }
            for made in turn["calls"]
        ]
        if calls:
            steps.append({"turn": turn["index"], "calls": calls})
    picture = held["images"][0]
    return {
        "id": held["id"],
        "group": held["group"],
        "correct": held["reward"]["accuracy"],
        "advantage": held["advantage"],
        "images": [{"root": picture["root"], "box": picture["box"]}],
        "steps": steps,
    }


def scores_of(held: dict[str, Any]) -> dict[str, Any]:
    """The line of `scores/` that goes with a view: numbers that tell the tokens apart."""
    tokens = range(len(held["logprobs"]))
    return {
        "id": held["id"],
        "logprobs": [-0.5 - 0.01 * k for k in tokens],
        "ratio": [1.0 + 0.002 * k for k in tokens],
        "entropy": [0.25 + 0.125 * k for k in tokens],
    }


def write_run(run: Path, steps: Sequence[Sequence[dict[str, Any]]], **credit: Any) -> Path:
    """A run folder with one dump per step."""
    for number, views in enumerate(steps):
        lines_of = {
            "tokens": views,
            "rollouts": [row_of(held) for held in views],
            "scores": [scores_of(held) for held in views],
        }
        for folder, lines in lines_of.items():
            path = run / folder / f"step_{number:06d}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in (PICTURE, CROP):
        (run / "images").mkdir(exist_ok=True)
        (run / "images" / f"{name}.png").write_bytes(RED_PNG)
    recipe = {"credit": {"name": "tapo", **credit}, "model": {"path": "nowhere"}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows = [{"step": step, "time": 1.0, "reward/mean": 0.1 * step} for step in range(len(steps))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def four_attempts() -> list[dict[str, Any]]:
    """Two that succeed; one that asks the same and is corrected, one that strays."""
    good = [ZOOM, call("anna house")]
    return [
        view("right-1", advantage=1.0, accuracy=1.0, calls=good),
        view("right-2", advantage=1.0, accuracy=1.0, calls=good),
        view("same", advantage=-0.5, accuracy=0.0, calls=good, after=(0.0, 0.0)),
        view("astray", advantage=-1.5, accuracy=0.0, calls=[call("weather tomorrow")]),
    ]
