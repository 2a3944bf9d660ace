"""What is wrong with the parts of a reward, beyond the range of a single field."""

from __future__ import annotations

from collections.abc import Iterator

from tapo_train.errors import ConfigError
from tapo_train.recipe.reward import TEMPLATES, JudgePart, Overlong, RewardPart, RewardSettings
from tapo_train.tools.addresses import host_of_endpoint

__all__ = ["reward_problems"]


def reward_problems(settings: RewardSettings) -> Iterator[str]:
    """One line per problem, with its dotted path."""
    places = {"reward.parts": settings.parts}
    places |= {f"reward.by_source.{name}": parts for name, parts in settings.by_source.items()}
    for where, parts in places.items():
        if parts.get("accuracy") is None:
            yield (
                f"{where}: found {', '.join(parts) or 'nothing'}, wanted a part named accuracy, "
                "which says whether the outcome is right"
            )
        for name, part in parts.items():
            if part is not None:
                yield from _part_problems(f"{where}.{name}", part)


def _part_problems(where: str, part: RewardPart) -> Iterator[str]:
    if isinstance(part, Overlong) and part.buffer > part.longest:
        yield f"{where}.buffer: found {part.buffer}, wanted at most longest ({part.longest})"
    if not isinstance(part, JudgePart):
        return
    try:
        host_of_endpoint(part.endpoint, field=f"{where}.endpoint")
    except ConfigError as error:
        yield str(error)
    if part.template not in TEMPLATES and "{response}" not in part.template:
        yield (
            f"{where}.template: found {part.template[:60]!r}, wanted {', '.join(TEMPLATES)} or a "
            "text with {response}"
        )
