"""What is wrong with a recipe, in words: dotted path, value found, value wanted, nearest key."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import ValidationError

from tapo_train.errors import ConfigError
from tapo_train.recipe import Recipe
from tapo_train.recipe.reward_problems import reward_problems
from tapo_train.recipe.staleness import staleness_problems
from tapo_train.report.warnings import SIGNS
from tapo_train.tools.addresses import AllowedHosts, host_of_endpoint

GROUPS = ("algo/advantage", "algo/importance", "algo/loss", "credit", "rollout/engine")
"""Parts of a recipe that are chosen whole, by the name of a file in a folder."""

MOST_NAMES = 30
"""A longer list of known names would hide the problem it explains."""


def explain(error: ValidationError, content: Mapping[str, Any]) -> list[str]:
    """One line per problem of `content`, in the order of the recipe's sections."""
    return [_line(problem, content) for problem in error.errors(include_url=False)]


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, or the known names when none is near."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return _listed(known)


def _listed(known: Sequence[str]) -> str:
    return f"; known: {', '.join(known)}" if len(known) <= MOST_NAMES else ""


def known_paths(content: Mapping[str, Any]) -> list[str]:
    """Dotted paths of every field, with the group choices that `content` makes."""
    return list(_paths(Recipe, content, prefix=""))


def _line(problem: Any, content: Mapping[str, Any]) -> str:
    path = ".".join(_location(problem["loc"], content))
    found, kind = problem["input"], problem["type"]
    if kind == "unexpected_keyword_argument":
        while isinstance(found, Mapping) and found:
            key, found = next(iter(found.items()))
            path = f"{path}.{key}"
        return f"{path}: unknown key{_nearest_path(path, content)}"
    if kind == "missing":
        return f"{path}: found nothing, wanted a value"
    if kind == "union_tag_invalid":
        tag, wanted = problem["ctx"]["tag"], problem["ctx"]["expected_tags"]
        return f"{path}.name: found {tag!r}, wanted one of {wanted}"
    if kind in ("dict_type", "dataclass_type", "union_tag_not_found"):
        group = path.replace(".", "/")
        hint = f"; its choices are made by {group}=NAME" if group in GROUPS else ""
        return f"{path}: found {found!r}, wanted a section{hint}"
    if kind in ("tuple_type", "too_short"):
        return f"{path}: found {found!r}, wanted a list of at least one value, as [a, b]"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    return f"{path}: found {found!r}, wanted {_wanted(problem['msg'])}"


def _wanted(message: str) -> str:
    """pydantic's message as the end of the sentence "found …, wanted …"."""
    wanted = message.removeprefix("Input should be ")
    if wanted.startswith(("greater", "less")):
        return f"a number {wanted}"
    return wanted.replace("a valid integer", "an integer").replace("a valid ", "a ")


def _location(loc: Sequence[str | int], content: Mapping[str, Any]) -> list[str]:
    """The path of a problem without the choice names that the checker puts into it."""
    path: list[str] = []
    here: Any = content
    for index, part in enumerate(loc):
        is_last = index == len(loc) - 1
        if isinstance(here, Mapping) and part not in here and not is_last:
            continue
        path.append(str(part))
        if isinstance(here, Mapping):
            here = here.get(part)
    return path


def _nearest_path(path: str, content: Mapping[str, Any]) -> str:
    """The same name elsewhere in the recipe, else the closest name of the section."""
    known = known_paths(content)
    section, _, name = path.rpartition(".")
    namesakes = [item for item in known if item.rpartition(".")[2] == name]
    if namesakes:
        return f"; did you mean {namesakes[0]}?"
    neighbours = [item for item in known if item.rpartition(".")[0] == section]
    close = difflib.get_close_matches(name, [item.rpartition(".")[2] for item in neighbours], n=1)
    if close:
        return f"; did you mean {section}.{close[0]}?"
    # Of a section's few other names none is meant: "credit.name" is near "credit.beta" only by
    # what both begin with.
    return _listed(neighbours) if neighbours else nearest(path, known)


def _paths(section: Any, content: Any, *, prefix: str) -> Iterable[str]:
    hints = get_type_hints(section)
    for item in fields(section):
        path = f"{prefix}{item.name}"
        inside = content.get(item.name) if isinstance(content, Mapping) else None
        chosen = _section_of(hints[item.name], inside)
        if chosen is None:
            yield path
        else:
            yield from _paths(chosen, inside, prefix=f"{path}.")


def _section_of(hint: Any, content: Any) -> Any:
    """The dataclass behind a field: itself, or the member of the union that `name` chooses."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if not isinstance(hint, types.UnionType):
        return hint if is_dataclass(hint) else None
    members = [member for member in get_args(hint) if is_dataclass(member)]
    if len(members) == 1:  # a section that may be left out
        return members[0] if content is not None else None
    name = content.get("name") if isinstance(content, Mapping) else None
    named = [m for m in members if name in get_args(get_type_hints(m)["name"])]
    return next(iter([*named, *members]), None)


def cross_field_problems(recipe: Recipe) -> list[str]:
    """Combinations that no single field's range can forbid."""
    checks = (
        _rollout_problems,
        _data_problems,
        _algo_problems,
        _tool_problems,
        _environment_problems,
        _watch_problems,
    )
    own = [line for check in checks for line in check(recipe)]
    return [*own, *reward_problems(recipe.reward)]


def _rollout_problems(recipe: Recipe) -> Iterable[str]:
    rollout = recipe.rollout
    if rollout.max_turn_tokens > rollout.max_tokens:
        yield (
            f"rollout.max_turn_tokens: found {rollout.max_turn_tokens}, wanted at most "
            f"rollout.max_tokens ({rollout.max_tokens})"
        )
    yield from staleness_problems(recipe)


def _environment_problems(recipe: Recipe) -> Iterable[str]:
    if recipe.tools.environment is not None and recipe.tools.replay != "off":
        yield (
            f"tools.replay: found {recipe.tools.replay!r}, wanted off beside tools.environment: "
            "what a stateful tool answers depends on what was called before"
        )


def _data_problems(recipe: Recipe) -> Iterable[str]:
    run = recipe.run
    if run.keep_best and (not run.eval_every or run.save_every % run.eval_every):
        yield (
            f"run.keep_best: found {run.keep_best} with run.save_every {run.save_every} and "
            f"run.eval_every {run.eval_every}, wanted save_every to be a multiple of eval_every: "
            "a checkpoint is judged by the validation after its step"
        )
    if recipe.run.eval_every and not recipe.data.validation:
        yield (
            f"data.validation: found no file, wanted one because run.eval_every is "
            f"{recipe.run.eval_every} (0 switches validation off)"
        )


def _algo_problems(recipe: Recipe) -> Iterable[str]:
    algo, group = recipe.algo, recipe.rollout.rollouts_per_question
    if group < 2 and algo.advantage.kind != "reinforce_pp":
        yield (
            f"rollout.rollouts_per_question: found {group}, wanted at least 2 because "
            f"algo.advantage.kind={algo.advantage.kind} compares the rollouts of a question"
        )
    masks = ("none", "total_variation")
    if recipe.learner.old_logprobs == "engine" and algo.importance.name not in masks:
        yield (
            f"algo.importance: found {algo.importance.name}, wanted none or total_variation "
            "because learner.old_logprobs=engine leaves no ratio to correct"
        )
    yield from _proximal_problems(recipe)
    if recipe.learner.offload_optimizer and recipe.learner.zero_stage == 0:
        yield "learner.zero_stage: found 0, wanted 1 to 3 because learner.offload_optimizer=true"
    if recipe.learner.offload_parameters and recipe.learner.zero_stage != 3:
        yield (
            f"learner.zero_stage: found {recipe.learner.zero_stage}, wanted 3 because "
            f"learner.offload_parameters=true"
        )
    if recipe.learner.offload_in_rollout:
        stage = recipe.learner.zero_stage
        if stage != 2:
            yield (
                f"learner.zero_stage: found {stage}, wanted 2 because "
                f"learner.offload_in_rollout=true (DeepSpeed cannot move the states of others)"
            )
        if recipe.learner.offload_optimizer:
            yield (
                "learner.offload_in_rollout: found true, wanted false because "
                "learner.offload_optimizer=true keeps the states outside all the time"
            )
    updates = recipe.learner.updates_per_batch
    questions = recipe.data.questions_per_step
    if questions % updates:
        yield (
            f"learner.updates_per_batch: found {updates}, wanted a divisor of "
            f"data.questions_per_step ({questions}): a question's group is not divided"
        )


def _proximal_problems(recipe: Recipe) -> Iterable[str]:
    learner = recipe.learner
    if learner.old_logprobs == "log_linear" and learner.updates_per_batch * learner.epochs == 1:
        yield (
            "learner.old_logprobs: found log_linear, wanted recompute because a step makes one "
            "update: the update's own forward pass has the exact numbers"
        )


def _tool_problems(recipe: Recipe) -> Iterable[str]:
    tools = recipe.tools
    texts = tools.corpus or tools.text_endpoint or tools.text_service or tools.text_store
    pictures = tools.image_index or tools.image_endpoint or tools.image_service
    needs = {"text_search_tool": ("corpus", texts), "image_search_tool": ("image_index", pictures)}
    for tool, (name, value) in needs.items():
        if tool in tools.names and value is None:
            yield f"tools.{name}: found nothing, wanted a file because tools.names has {tool}"
    if tools.text_endpoint_form != "results" and tools.text_endpoint is None:
        yield (
            f"tools.text_endpoint_form: found {tools.text_endpoint_form} without "
            "tools.text_endpoint, wanted the address of a server that speaks it"
        )
    for kind in ("text", "image"):
        if getattr(tools, f"{kind}_endpoint") and getattr(tools, f"{kind}_service"):
            yield f"tools.{kind}_service: found it beside tools.{kind}_endpoint, wanted one of them"
    if tools.text_store and (tools.text_endpoint or tools.text_service):
        yield "tools.text_store: found it beside text_endpoint or text_service, wanted one of them"
    if tools.text_store and tools.replay == "replay" and not tools.text_store.digest:
        yield "tools.text_store.digest: found nothing, wanted by tools.replay=replay"
    if tools.dense and (tools.dense.folder is None) == (tools.dense.endpoint is None):
        yield "tools.dense: found both or neither of folder and endpoint, wanted one of them"
    if tools.look_alikes and (not tools.image_index or tools.image_endpoint or tools.image_service):
        yield "tools.look_alikes: found it without tools.image_index or beside a search of others"
    if tools.pages and not (tools.text_endpoint or tools.text_service):
        yield "tools.pages: found it without tools.text_endpoint and tools.text_service, wanted one"
    try:
        AllowedHosts.parse(tools.allowed_hosts)
        for name in ("text_endpoint", "image_endpoint"):
            if endpoint := getattr(tools, name):
                host_of_endpoint(endpoint, field=f"tools.{name}")
        if tools.text_store:
            host_of_endpoint(tools.text_store.url, field="tools.text_store.url")
    except ConfigError as error:
        yield str(error)


def _watch_problems(recipe: Recipe) -> Iterable[str]:
    for name in recipe.watch.stop_on:
        if name not in SIGNS:
            yield f"watch.stop_on: found {name!r}, wanted names of signs{nearest(name, SIGNS)}"
    # A sign that is asked for but cannot hold would be a guard that never wakes.
    if "kl_growing" in recipe.watch.stop_on and recipe.algo.kl.coef == 0:
        yield (
            "watch.stop_on: found 'kl_growing' with algo.kl.coef=0, wanted a reference to measure "
            "from (algo.kl.coef > 0)"
        )
    if "engine_drifting" in recipe.watch.stop_on and recipe.learner.old_logprobs == "engine":
        yield (
            "watch.stop_on: found 'engine_drifting' with learner.old_logprobs=engine, wanted "
            "log-probabilities of the learner's own to compare with (recompute)"
        )
