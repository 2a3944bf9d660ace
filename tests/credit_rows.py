"""Short ways to write the rows of credit tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tapo_train.credit import CreditCall, CreditRow, CreditStep
from tapo_train.types import ImageRef

IMAGE = "image_search_tool"
TEXT = "text_search_tool"
ZOOM = "image_zoom_in_tool"


def search(**kwargs: Any) -> CreditCall:
    """An image search without arguments."""
    return CreditCall(name=IMAGE, arguments={}, **kwargs)


def text(query: Any, **kwargs: Any) -> CreditCall:
    """A text search."""
    return CreditCall(name=TEXT, arguments={"query": query}, **kwargs)


def zoom(*box: float, img_idx: float = 0, **kwargs: Any) -> CreditCall:
    """A zoom into a picture of the registry."""
    return CreditCall(name=ZOOM, arguments={"bbox_2d": list(box), "img_idx": img_idx}, **kwargs)


def row(
    name: str,
    advantage: float,
    *turns: CreditCall | Sequence[CreditCall],
    correct: float | None = None,
    group: str = "q",
    images: Sequence[ImageRef] = (ImageRef(root="photo"),),
    num_images: int | None = None,
    discarded: bool = False,
) -> CreditRow:
    """One call (or a list of parallel calls) per turn, then an answer turn.

    Correct if the advantage is positive, unless `correct` is given.
    """
    visible = len(images) if num_images is None else num_images
    steps = tuple(
        CreditStep(
            turn=i,
            calls=(turn,) if isinstance(turn, CreditCall) else tuple(turn),
            num_images=visible,
        )
        for i, turn in enumerate(turns)
    )
    return CreditRow(
        id=name,
        group=group,
        correct=float(advantage > 0) if correct is None else correct,
        advantage=advantage,
        num_turns=len(turns) + 1,
        steps=steps,
        images=tuple(images),
        num_input_images=1,
        discarded=discarded,
    )


def population(rewards: Sequence[float]) -> list[float]:
    """Group-relative advantages with the population standard deviation and no epsilon."""
    values = np.array(rewards, dtype=np.float64)
    return list((values - values.mean()) / values.std())


def unbiased(rewards: Sequence[float], eps: float = 1e-6) -> list[float]:
    """Group-relative advantages with the unbiased standard deviation."""
    values = np.array(rewards, dtype=np.float64)
    return list((values - values.mean()) / (values.std(ddof=1) + eps))


def golden_rows() -> list[CreditRow]:
    """Eight attempts at one question, three of them right."""
    a = population([1, 1, 1, 0, 0, 0, 0, 0])
    weather = text("Paris weather today")
    return [
        row("0", a[0], search(), text("Eiffel Tower height"), text("Eiffel Tower height")),
        row("1", a[1], search(), zoom(100, 100, 500, 500)),
        row("2", a[2], zoom(110, 100, 510, 500), text("the height of Eiffel Tower")),
        row("3", a[3], search(), text("eiffel tower height?"), zoom(600, 600, 900, 900)),
        row("4", a[4], zoom(100, 100, 500, 500), weather),
        row("5", a[5], text(""), search(), search()),
        row("6", a[6]),
        row("7", a[7], [search(), weather]),
    ]
