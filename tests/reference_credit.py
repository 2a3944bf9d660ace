"""TAPO's default path once more, written for reading: plain Python, no caching, no numpy.

Independent of the product code: it shares only the row types. Tests compare it with the product
on random batches, and the benchmark uses it as the straightforward peer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from tapo_train.credit.steps import CreditCall, CreditRow, CreditStep

BETA, ALPHA_MIN = 0.8, 0.25
THETA = {"text_search_tool": 0.5}


def tokens(query: str) -> set[str]:
    """NFKC, casefold, punctuation to blanks, no articles (no CJK splitting)."""
    text = unicodedata.normalize("NFKC", query).casefold()
    return set(re.sub(r"[\W_]+", " ", text).split()) - {"a", "an", "the"}


def text_similarity(left: str, right: str) -> float:
    a, b = tokens(left), tokens(right)
    if not a and not b:
        return float(left.strip().casefold() == right.strip().casefold())
    return len(a & b) / len(a | b)


def region(call: CreditCall, row: CreditRow) -> tuple[str, list[float]]:
    ref = row.images[int(call.arguments.get("img_idx", 0))]
    x0, y0, x1, y1 = ref.box
    size = (x1 - x0, y1 - y0, x1 - x0, y1 - y0)
    base = (x0, y0, x0, y0)
    box = call.arguments["bbox_2d"]
    return ref.root, [base[i] + box[i] / 1000 * size[i] for i in range(4)]


def box_similarity(left: tuple[str, list[float]], right: tuple[str, list[float]]) -> float:
    (root, a), (other, b) = left, right
    if root != other:
        return 0.0
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / total


def similarity(a: CreditCall, row_a: CreditRow, b: CreditCall, row_b: CreditRow) -> float:
    if a.name != b.name:
        return 0.0
    if a.name == "text_search_tool":
        return text_similarity(a.arguments["query"], b.arguments["query"])
    if a.name == "image_zoom_in_tool":
        return box_similarity(region(a, row_a), region(b, row_b))
    return float(row_a.images[0] == row_b.images[0])


def eligible(call: CreditCall, row: CreditRow, step: CreditStep) -> bool:
    if not (call.valid and call.executed) or call.status == "model_error":
        return False
    arguments: dict[str, Any] = call.arguments
    if call.name == "text_search_tool":
        return bool(arguments["query"].strip())
    if call.name == "image_zoom_in_tool":
        x0, y0, x1, y1 = arguments["bbox_2d"]
        inside = 0 <= x0 < x1 <= 1000 and 0 <= y0 < y1 <= 1000
        return inside and 0 <= arguments.get("img_idx", 0) < step.num_images
    return True


Member = tuple[CreditCall, CreditRow]


def clusters_of(members: list[Member]) -> list[list[Member]]:
    """Connected components of the graph of similarities of at least theta."""
    left, found = list(members), []
    while left:
        component, frontier = [], [left.pop(0)]
        while frontier:
            member = frontier.pop()
            component.append(member)
            theta = THETA.get(member[0].name, 0.7)
            near = [m for m in left if similarity(*member, *m) >= theta]
            left = [m for m in left if m not in near]
            frontier += near
        found.append(component)
    return found


def correct_group(rows: Sequence[CreditRow]) -> list[list[float]]:
    successes = [row for row in rows if row.correct >= 0.5 and row.advantage > 0]
    library = [
        (call, row)
        for row in successes
        for step in row.steps
        for call in step.calls
        if eligible(call, row, step) and call.status == "ok"
    ]
    clusters = clusters_of(library)
    result = []
    for row in rows:
        turns = [row.advantage] * row.num_turns
        if row.correct < 0.5 and row.advantage < 0:
            for step in row.steps:
                given = [
                    transfer(call, row, clusters, len(successes))
                    for call in step.calls
                    if eligible(call, row, step)
                ]
                if any(given):
                    mean = sum(given) / len(given)
                    turns[step.turn] = min(0.0, row.advantage + BETA * mean)
        result.append(turns)
    return result


def transfer(call: CreditCall, row: CreditRow, clusters: list[list[Member]], count: int) -> float:
    best = (0.0, 0.0, 0.0)
    for cluster in clusters:
        if cluster[0][0].name != call.name:
            continue
        sim = max(similarity(call, row, *member) for member in cluster)
        owners = {owner.id: owner.advantage for _, owner in cluster}
        best = max(best, (sim, len(owners) / count, sum(owners.values()) / len(owners)))
    sim, support, advantage = best
    is_open = sim >= THETA.get(call.name, 0.7) and sim * support >= ALPHA_MIN
    return sim * support * max(advantage, 0.0) if is_open else 0.0


def reference_advantages(rows: Sequence[CreditRow]) -> list[list[float]]:
    """Per row, the advantage of every turn."""
    groups: dict[str, list[CreditRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    by_id = {
        (row.group, row.id): turns
        for group in groups.values()
        for row, turns in zip(group, correct_group(group), strict=True)
    }
    return [by_id[row.group, row.id] for row in rows]
