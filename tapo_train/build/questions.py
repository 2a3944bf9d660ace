"""From a recipe to its questions: read, checked against the model, the bad ones counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tapo_train.build.custom import custom_loader
from tapo_train.data.intake import Intake
from tapo_train.data.mixture import needs_search, pass_rates
from tapo_train.data.sampler import TaskSampler, shard
from tapo_train.data.sealed import require_open
from tapo_train.data.stored import Share
from tapo_train.data.tasks import load_task_files
from tapo_train.errors import ConfigError
from tapo_train.learner import distributed
from tapo_train.recipe import Mixture
from tapo_train.recipe.compose import Recipe
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.playable import Playable
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Task


def read_tasks(paths: Sequence[str], recipe: Recipe) -> list[Task]:
    """The tasks of several files, one after the other; every rank opens its share of the pictures.

    Raises:
        DataError: rows cannot be used, unless `data.bad_rows` leaves them out.
    """
    intake, data = _intake(recipe), recipe.data
    tasks = load_task_files(
        paths,
        format=data.format,
        image_roots=data.image_roots,
        intake=intake,
        load=custom_loader(data.loader) if data.loader else None,
        share=Share(distributed.rank(), distributed.world_size(), distributed.all_gather_objects),
    )
    _say(intake)
    return tasks


def validation_tasks(recipe: Recipe) -> list[Task]:
    """The questions a validation asks; none if the recipe has no validation files."""
    if not recipe.data.validation:
        return []
    return read_tasks(recipe.data.validation, recipe)[: recipe.run.eval_questions or None]


def chosen_tasks(recipe: Recipe, tasks: Sequence[Task]) -> list[Task]:
    """Those that `data.mixture` keeps; says on rank 0 how many it leaves out.

    Raises:
        ConfigError: none is left.
    """
    rates = _pass_rates(recipe)
    kept = [task for task in tasks if _is_kept(task, recipe.data.mixture, rates)]
    if not kept:
        raise ConfigError(f"data.mixture: none of {len(tasks)} questions is left, wanted some")
    if len(kept) < len(tasks) and distributed.rank() == 0:
        print(f"{len(tasks) - len(kept)} of {len(tasks)} questions left out (data.mixture)")
    return kept


def _is_kept(task: Task, mixture: Mixture, rates: Mapping[str, float]) -> bool:
    said = needs_search(task)
    if None not in (said, mixture.needs_search) and said != mixture.needs_search:
        return False
    rate, (least, most) = rates.get(task.id), mixture.pass_rate
    return rate is None or least <= rate <= most


def build_order(recipe: Recipe, tasks: Sequence[Task]) -> TaskSampler:
    """The order in which training asks `tasks`.

    Raises:
        ConfigError: a weight is of a source that no task has.
    """
    mixture, rates = recipe.data.mixture, _pass_rates(recipe)
    unknown = set(mixture.weights) - {task.source for task in tasks}
    if unknown:
        raise ConfigError(
            f"data.mixture.weights: found {sorted(unknown)}; wanted some of "
            f"{sorted({task.source for task in tasks})}"
        )
    return TaskSampler(
        [task.id for task in tasks],
        seed=recipe.run.seed,
        weights=[mixture.weights.get(task.source, 1.0) for task in tasks],
        # What was never tried stands in the middle.
        ease=[rates.get(task.id, 0.5) for task in tasks] if mixture.easy_first else None,
    )


def _pass_rates(recipe: Recipe) -> Mapping[str, float]:
    path = recipe.data.mixture.pass_rates
    return pass_rates(Path(path)) if path is not None else {}


def playable_tasks(
    recipe: Recipe, tasks: Sequence[Task], chat: ChatFormat, toolbox: Toolbox
) -> list[Task]:
    """Those of `tasks` that the model can be asked; every rank looks at its share of them.

    Raises:
        DataError: a picture the processor does not take, or a prompt without room for an
            answer, unless `data.bad_rows` leaves such tasks out.
    """
    playable = Playable(
        chat,
        system_prompt=recipe.data.system_prompt,
        tool_schemas=toolbox.schemas(),
        max_tokens=recipe.rollout.max_tokens,
    )
    ranks = distributed.world_size()
    shares = distributed.all_gather_objects(
        playable.problems(shard(tasks, distributed.rank(), ranks))
    )
    problems = [shares[index % ranks][index // ranks] for index in range(len(tasks))]
    intake = _intake(recipe)
    for problem in problems:
        if problem is not None:
            intake.leave_out(problem)
    intake.settle()
    _say(intake)
    return [task for task, problem in zip(tasks, problems, strict=True) if problem is None]


def playable_splits(
    recipe: Recipe,
    train: Sequence[Task],
    validation: Sequence[Task],
    chat: ChatFormat,
    toolbox: Toolbox,
) -> tuple[list[Task], list[Task]]:
    """`playable_tasks` of both splits; enough of the first are left for a step."""
    require_open(train, doing="training on it")
    usable = playable_tasks(recipe, train, chat, toolbox)
    require_enough(recipe, usable)
    return usable, playable_tasks(recipe, validation, chat, toolbox)


def require_enough(recipe: Recipe, tasks: Sequence[Task]) -> None:
    """Raises `ConfigError` if more different questions are under way than there are."""
    asked, staleness = recipe.data.questions_per_step, recipe.rollout.max_staleness
    if asked > len(tasks):
        raise ConfigError(
            f"data.questions_per_step: found {asked}, wanted at most the {len(tasks)} tasks that "
            "data.train holds: a step asks no question twice"
        )
    if (staleness + 1) * asked > len(tasks):
        raise ConfigError(
            f"rollout.max_staleness: found {staleness}, wanted at most {len(tasks) // asked - 1}: "
            f"of the {len(tasks)} tasks that data.train holds, {asked} are asked for each update, "
            "and none is under way twice"
        )


def _intake(recipe: Recipe) -> Intake:
    return Intake(drop=recipe.data.bad_rows == "drop")


def _say(intake: Intake) -> None:
    if distributed.rank() == 0:
        for line in intake.report():
            print(line, flush=True)
