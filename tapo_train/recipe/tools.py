"""What the policy may call."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from tapo_train.recipe.values import STRICT, Count, Positive


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Tools:
    """What the policy may call, and the indexes behind it."""

    names: tuple[Literal["image_zoom_in_tool", "text_search_tool", "image_search_tool"], ...] = (
        "image_zoom_in_tool",
        "text_search_tool",
        "image_search_tool",
    )
    """Empty: a policy without tools."""
    deadline_s: Positive = 30.0
    """[s] for one call; afterwards its outcome is `timeout`."""
    corpus: str | None = None
    """Documents of the text search (jsonl); needed by text_search_tool."""
    image_index: str | None = None
    """Titled pictures of the image search (jsonl); needed by image_search_tool."""
    text_top_k: Count = 3
    """Documents shown for a query."""
    image_top_k: Count = 3
    """Pictures shown for a picture."""
    max_observation_chars: Count = 8192
    """[characters] of text one observation may hold; the rest is cut and the cut is said."""
    min_crop_side: Count = 28
    """[px] a zoom into a region with a shorter side is refused, and the policy reads why."""
