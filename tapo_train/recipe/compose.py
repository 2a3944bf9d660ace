"""From a recipe file and overrides to a checked `Recipe`, and back. The only door to hydra.

A recipe is a YAML file. Its `defaults` list names the file it differs from and its choice of
each group (`algo/loss: gspo`); hydra composes them and applies the overrides of the command
line. The result is checked against `recipe/` before anything heavy starts, and every problem
is reported with its dotted path, the value found and the value wanted.

`to_yaml` writes a recipe with every field said, which is a recipe file too: loading it gives
the same run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf import resolvers as omegaconf_resolvers
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from tapo_train.errors import ConfigError
from tapo_train.recipe import Recipe
from tapo_train.recipe.problems import GROUPS, cross_field_problems, explain, nearest
from tapo_train.recipe.services import hide_services
from tapo_train.tools.addresses import HIDDEN, shown, shown_text

__all__ = [
    "GROUPS",
    "Recipe",
    "batch_arithmetic",
    "load_recipe",
    "recipe_from_dict",
    "recipe_to_dict",
    "recipe_to_show",
    "require_room_for_cosine",
    "to_yaml",
    "training_updates",
    "warm_start_updates",
]

SHIPPED_RECIPES = (Path(__file__).parent.parent / "shipped_recipes").resolve()
"""Searched for `base` and for groups after the recipe's own folder; in the repository this is
`recipes/`."""

_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)
_SECRET = re.compile(
    r"(?:^|_)(?:api)?(?:key|secret|token|pass|password|passwd|credential)s?(?:_|$)", re.IGNORECASE
)


def _environment(name: str, *default: str | None) -> str | None:
    """`${oc.env:NAME}`, but no secret: the resolved recipe is exported, logged and passed on."""
    if _SECRET.search(name):
        raise ConfigError(f"${{oc.env:{name}}} looks like a secret, which no recipe may hold")
    value: str | None = omegaconf_resolvers.oc.env(name, *default)
    return value


OmegaConf.register_new_resolver("oc.env", _environment, replace=True)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply hydra overrides, check everything.

    Args:
        path: A `.yaml` file. Paths inside it are relative to the working directory.
        overrides: `dotted.path=value` or `group=choice`, as `learner.lr=1e-5` or
            `algo/loss=gspo`.

    Raises:
        ConfigError: a file, key, value or choice is wrong; all problems in one message.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"recipe {path}: no such file; wanted a .yaml file{_shipped_hint()}")
    if path.suffix != ".yaml":
        raise ConfigError(f"recipe {path}: found the ending {path.suffix!r}, wanted .yaml")
    try:
        arguments = [_as_hydra(text, path) for text in overrides]
        arguments.append(f"hydra.searchpath=[file://{SHIPPED_RECIPES}]")
        with initialize_config_dir(str(path.resolve().parent), version_base=None):
            composed = compose(path.stem, overrides=arguments)
        content = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"recipe {path}: {_first_lines(error)}") from error
    except (YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(
            f"recipe {path}: {_first_lines(error)}; wanted YAML of plain values"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"recipe {path}: found a list, wanted sections such as run: and model:")
    return recipe_from_dict({str(key): value for key, value in content.items()}, source=str(path))


def recipe_from_dict(content: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """Check plain nested values and build the recipe.

    Raises:
        ConfigError: every problem on its own line, after `source`.
    """
    try:
        recipe = _ADAPTER.validate_json(json.dumps(content))
    except ValidationError as error:
        raise ConfigError(_join(source, explain(error, content))) from error
    problems = cross_field_problems(recipe)
    if problems:
        raise ConfigError(_join(source, problems))
    return recipe


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain nested values of every field, as JSON can hold them."""
    content: dict[str, Any] = _ADAPTER.dump_python(recipe, mode="json")
    return content


def recipe_to_show(recipe: Recipe) -> dict[str, Any]:
    """`recipe_to_dict` for other people's eyes: without what may be a secret.

    Endpoints lose the values of their query, variables of MCP servers their values.
    """
    content = recipe_to_dict(recipe)
    tools = content["tools"]
    for name in ("text_endpoint", "image_endpoint"):
        tools[name] = tools[name] and shown(tools[name])
    for parts in (content["reward"]["parts"], *content["reward"]["by_source"].values()):
        for part in filter(None, parts.values()):
            if "endpoint" in part:
                part["endpoint"] = shown(part["endpoint"])
    hide_services(tools)
    for server in tools["mcp"]:
        server["env"] = dict.fromkeys(server["env"], HIDDEN)
    return content


def to_yaml(recipe: Recipe) -> str:
    """Every field of `recipe` as YAML; loading the text gives an equal recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(_without_interpolation(recipe_to_dict(recipe))))


def batch_arithmetic(recipe: Recipe, world_size: int = 1) -> str:
    """Say in one sentence how a step's questions become optimizer updates.

    Raises:
        ConfigError: the questions or trajectories cannot be dealt out evenly.
    """
    questions = recipe.data.questions_per_step
    group = recipe.rollout.rollouts_per_question
    if questions % world_size:
        raise ConfigError(
            f"data.questions_per_step: found {questions} on {world_size} ranks, wanted a multiple "
            f"of {world_size}: a question's whole group stays on one rank"
        )
    _require_whole_engines(recipe, world_size)
    together = recipe.learner.sequence_parallel
    if world_size % together:
        raise ConfigError(
            f"learner.sequence_parallel: found {together} on {world_size} ranks, wanted a divisor "
            f"of {world_size}: neighbouring ranks share a micro-batch"
        )
    learners = world_size // together
    unit, units = ("rank", "ranks") if together == 1 else ("group", f"groups of {together} ranks")
    trajectories = questions * group
    updates = recipe.learner.updates_per_batch * recipe.learner.epochs
    share = -(-trajectories // (learners * recipe.learner.updates_per_batch))
    longest = recipe.rollout.max_tokens
    per_micro_batch = max(1, recipe.learner.micro_batch_tokens // longest)
    most = -(-share // per_micro_batch)
    return (
        f"{questions} questions × {group} rollouts = {trajectories} trajectories "
        f"→ at most {most} micro-batches × {learners} {units} × {updates} updates "
        f"({share} trajectories per {unit} and update, {recipe.learner.micro_batch_tokens} tokens "
        f"per micro-batch, at most {longest} tokens per trajectory)"
    )


def training_updates(recipe: Recipe) -> int:
    """Optimizer updates of a training run."""
    return recipe.run.steps * recipe.learner.updates_per_batch * recipe.learner.epochs


def warm_start_updates(recipe: Recipe) -> int:
    """Optimizer updates of the supervised warm start, over all its phases."""
    sft = recipe.sft
    if sft.demonstrations:
        return sft.able_updates
    return sum(updates for _, updates in sft.drills) + sft.able_updates + sft.habit_updates


def require_room_for_cosine(recipe: Recipe, updates: int) -> None:
    """Stop unless a cosine has some of so many updates left after the warm-up.

    Raises:
        ConfigError: it has none.
    """
    warmup = recipe.learner.warmup_updates
    if recipe.learner.schedule == "cosine" and warmup >= updates:
        raise ConfigError(
            f"learner.warmup_updates: found {warmup}, wanted fewer than the {updates} updates "
            "there are, because learner.schedule=cosine falls in those that are left"
        )


def _require_whole_engines(recipe: Recipe, world_size: int) -> None:
    engine = recipe.rollout.engine
    if engine.name == "vllm" and world_size % engine.tensor_parallel:
        raise ConfigError(
            f"rollout.engine.tensor_parallel: found {engine.tensor_parallel} on {world_size} "
            f"ranks, wanted a divisor of {world_size}: neighbouring ranks share an engine"
        )


def _as_hydra(text: str, path: Path) -> str:
    """One override in the form hydra accepts for a recipe whose schema is checked later.

    A value becomes `++key=value`, so that a misspelt key reaches our own check, which knows
    the nearest right one; a group choice stays as it is.
    """
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(
            f"override {shown_text(repr(text))}: {_first_lines(error)}; wanted dotted.path=value"
            f"{_in_quotes(text)}"
        ) from error
    if override.is_sweep_override():
        raise ConfigError(f"override {text!r}: found several values, wanted one or a [list]")
    key = override.key_or_group
    if "/" not in key and key not in GROUPS:
        return text if text.startswith(("+", "~")) else f"++{text}"
    if key not in GROUPS:
        raise ConfigError(f"override {text!r}: unknown group {key}{nearest(key, GROUPS)}")
    choices = _choices(key, path.resolve().parent)
    if override.value() not in choices:
        raise ConfigError(f"{key}: found {override.value()!r}, wanted one of {', '.join(choices)}")
    if "defaults" not in OmegaConf.load(path):
        raise ConfigError(
            f"override {text!r}: recipe {path} has no defaults list (resolved recipes have none), "
            f"so no group to choose; wanted the recipe it was made from"
        )
    return text


def _in_quotes(text: str) -> str:
    """How to write a value that hydra reads as more than a text; "" if that would not help."""
    key, is_assignment, value = text.partition("=")
    if not is_assignment or not value or value[0] in "'\"":
        return ""
    quoted = value.replace("'", "\\'")
    escaped = f"{key}='{quoted}'".replace("$", "\\$").replace("`", "\\`").replace('"', '\\"')
    try:
        OverridesParser.create().parse_override(f"{key}='{quoted}'")
    except HydraException:
        return ""
    return f'; a value with such characters stands in quotes, in a shell as "{shown_text(escaped)}"'


def _choices(group: str, folder: Path) -> list[str]:
    folders = (folder / group, SHIPPED_RECIPES / group)
    return sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})


def _join(source: str, problems: Sequence[str]) -> str:
    separator = " " if len(problems) == 1 else "\n  "
    return f"{source}:" + "".join(separator + shown_text(problem) for problem in problems)


def _first_lines(error: Exception) -> str:
    return shown_text(" ".join(str(error).split("\nConfig search path")[0].split()))


def _shipped_hint() -> str:
    folder, here = SHIPPED_RECIPES, Path.cwd()
    if folder.is_relative_to(here):
        folder = folder.relative_to(here)
    names = sorted(str(folder / file.name) for file in SHIPPED_RECIPES.glob("*.yaml"))
    return f", for instance {', '.join(names)}" if names else ""


def _without_interpolation(value: Any) -> Any:
    """`value` with `${` escaped, which OmegaConf would otherwise expand when reading it back."""
    match value:
        case str():
            return value.replace("${", "\\${")
        case dict():
            return {key: _without_interpolation(item) for key, item in value.items()}
        case list():
            return [_without_interpolation(item) for item in value]
        case _:
            return value
