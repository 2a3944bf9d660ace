"""Whether a recipe fits the devices it is to run on; if not, which field to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tapo_train.learner.shape import PUBLISHED, ModelShape
from tapo_train.recipe import Recipe
from tapo_train.recipe.memory_plan import GB, Device, Phase, cached_tokens, plan_phases, table

CHOICES_OF_SHARING = (2, 4, 8, 16)
CHOICES_OF_CHUNK = (1024, 512, 256)
CHOICES_OF_SHARE = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


def shape_of(recipe: Recipe) -> tuple[ModelShape, str]:
    """The numbers of the recipe's model, and a remark if they are not from its folder.

    Raises:
        ConfigError: its `config.json` cannot be read, and its folder's name is not a known one.
    """
    folder = Path(recipe.model.path)
    if folder.exists() or folder.name not in PUBLISHED:
        return ModelShape.read(folder), ""
    return PUBLISHED[folder.name], f"{folder} is not here: the published numbers of {folder.name}\n"


def describe(recipe: Recipe, shape: ModelShape, device: Device) -> str:
    """The plan in words and numbers."""
    kind = "devices" if device.is_gpu else "ranks without a GPU"
    lines = [f"memory, planned for {device.count} {kind} of {device.memory_bytes / GB:.0f} GB:"]
    lines.append(table(plan_phases(recipe, shape, device), device))
    if recipe.rollout.engine.name == "vllm":
        held = cached_tokens(recipe, shape, device)
        whole = held / recipe.rollout.max_tokens
        lines.append(
            f"keys and values of {held} tokens: {whole:.1f} trajectories of rollout.max_tokens"
        )
    return "\n".join(lines)


def misfits(recipe: Recipe, shape: ModelShape, device: Device) -> list[str]:
    """What does not fit, each with the field to change; empty if all does."""
    problems = []
    if recipe.rollout.engine.name == "vllm":
        held, wanted = cached_tokens(recipe, shape, device), recipe.rollout.max_tokens
        if held < wanted:
            problems.append(_too_few(recipe, device, held=held, wanted=wanted))
    worst = _worst(recipe, shape, device)
    if worst.total <= device.usable_bytes:
        return problems
    what = (
        f"the phase {worst.name!r} takes {worst.total / GB:.1f} GB of the "
        f"{device.usable_bytes / GB:.1f} GB that a device of {device.memory_bytes / GB:.0f} GB has"
    )
    changed, changes = recipe, dict[str, Any]()
    for field, value in _changes(recipe, device):
        if _fits(_changed(recipe, field, value), shape, device):
            return [
                *problems,
                f"{field}: found {_shown(_found(recipe, field))}, wanted {_shown(value)}: {what}",
            ]
    for field, value in _changes(recipe, device):
        less = _changed(changed, field, value)
        if _worst(less, shape, device).total < _worst(changed, shape, device).total:
            changed, changes = less, {**changes, field: value}
        if _fits(changed, shape, device):
            together = ", ".join(f"{field} = {_shown(value)}" for field, value in changes.items())
            return [*problems, f"{next(iter(changes))}: {what}; wanted {together}"]
    return [*problems, f"model.path: {what}; wanted more devices, larger ones, or a smaller model"]


def _worst(recipe: Recipe, shape: ModelShape, device: Device) -> Phase:
    return max(plan_phases(recipe, shape, device), key=lambda phase: phase.total)


def _fits(recipe: Recipe, shape: ModelShape, device: Device) -> bool:
    holds_one = recipe.rollout.engine.name != "vllm" or (
        cached_tokens(recipe, shape, device) >= recipe.rollout.max_tokens
    )
    return holds_one and _worst(recipe, shape, device).total <= device.usable_bytes


def _too_few(recipe: Recipe, device: Device, *, held: int, wanted: int) -> str:
    engine: Any = recipe.rollout.engine
    field = "gpu_memory_utilization" if device.is_gpu else "kv_cache_gib"
    return (
        f"rollout.engine.{field}: found {getattr(engine, field)}, wanted more: its keys and "
        f"values of {held} tokens are fewer than a trajectory's rollout.max_tokens ({wanted})"
    )


def _changes(recipe: Recipe, device: Device) -> Iterator[tuple[str, Any]]:
    """Changes that take less memory, those that cost least first."""
    learner, engine = recipe.learner, recipe.rollout.engine
    if engine.name == "vllm" and device.is_gpu and engine.tensor_parallel == 1:
        yield "rollout.engine.sleep_in_update", True
    yield "learner.gradient_checkpointing", True
    if device.count > 1:
        yield "learner.zero_stage", 3
    yield from (("learner.head_chunk_tokens", n) for n in CHOICES_OF_CHUNK)
    if engine.name == "vllm" and device.is_gpu:
        shares = (s for s in CHOICES_OF_SHARE if s < engine.gpu_memory_utilization)
        yield from (("rollout.engine.gpu_memory_utilization", share) for share in shares)
    if learner.zero_stage:
        yield "learner.offload_optimizer", True
    fitting = (n for n in CHOICES_OF_SHARING if n <= device.count and device.count % n == 0)
    yield from (("learner.sequence_parallel", n) for n in fitting)
    yield "learner.micro_batch_tokens", recipe.rollout.max_tokens


def _shown(value: Any) -> str:
    """As a recipe says it."""
    return str(value).lower()


def _found(recipe: Recipe, field: str) -> Any:
    here: Any = recipe
    for name in field.split("."):
        here = getattr(here, name)
    return here


def _changed(here: Any, field: str, value: Any) -> Any:
    """A copy with the field at a dotted path set."""
    name, _, rest = field.partition(".")
    return replace(here, **{name: _changed(getattr(here, name), rest, value) if rest else value})
