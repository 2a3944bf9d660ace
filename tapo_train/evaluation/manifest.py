"""What a table's numbers depend on beside the policy: searches, their state, and judges."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from tapo_train.evaluation.attempt import Attempt
from tapo_train.recipe import JudgePart
from tapo_train.recipe.compose import Recipe, recipe_to_show
from tapo_train.rewards.judge import template_text
from tapo_train.tools.addresses import shown
from tapo_train.tools.toolbox import Toolbox

__all__ = ["describe_judges", "describe_searches"]


def describe_searches(
    recipe: Recipe, toolbox: Toolbox, attempts: Sequence[Attempt]
) -> dict[str, Any]:
    """Engines, how often they answered, and how often they found nothing.

    The date of the answers is that of the manifest, unless a recording gave them.
    """
    tools = recipe_to_show(recipe)["tools"]
    texts = ("text_endpoint", "text_service", "text_store", "corpus")
    pictures = ("image_endpoint", "image_service", "image_index")
    asked = sum(attempt.searches for attempt in attempts)
    answered = sum(attempt.answered for attempt in attempts)
    empty = sum(attempt.empty for attempt in attempts)
    return {
        "search": {
            "text": next((tools[name] for name in texts if tools[name]), None),
            "pictures": next((tools[name] for name in pictures if tools[name]), None),
            "versions": dict(toolbox.versions),
        },
        "replay": recipe.tools.replay,
        "searches": asked,
        "fetch success": answered / asked if asked else None,
        "empty results": empty / answered if answered else None,
    }


def describe_judges(recipe: Recipe) -> list[dict[str, Any]]:
    """Model and prompt of every judge of the reward, by the part it is."""
    sources = {"": recipe.reward.parts, **recipe.reward.by_source}
    return [
        {
            "part": f"{source}/{name}" if source else name,
            "model": part.model,
            "endpoint": shown(part.endpoint),
            "prompt_sha256": hashlib.sha256(template_text(part.template).encode()).hexdigest(),
            "options": dict(part.options),
        }
        for source, parts in sources.items()
        for name, part in parts.items()
        if isinstance(part, JudgePart)
    ]
