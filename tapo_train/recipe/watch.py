"""Early signs of collapse."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from tapo_train.recipe.values import STRICT, Count


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class WatchSettings:
    """Early signs of collapse: `warning/<name>` in the metrics, words on the console. A sign holds
    the median of a quantity over the last steps against the median over the run's first ones."""

    early_steps: Count = 10
    """[steps] at the start of the run that the later ones are held against."""
    recent_steps: Count = 5
    """[steps] that are judged together."""
    stop_on: tuple[str, ...] = ()
    """Signs that end the run: tool_use_dying, calls_exploding, repeating_calls,
    entropy_collapsing, entropy_exploding, turns_shrinking, turns_growing, groups_uniform,
    kl_growing, engine_drifting, gradient_growing; empty: only warn. kl_growing
    wants a reference (algo.kl.coef > 0), engine_drifting log-probabilities of the learner's own."""
    stop_after: Count = 3
    """[steps] in a row for which one of them must have held."""
