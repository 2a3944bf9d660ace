"""From a recipe to the parts of a run: which questions are played when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tapo_train.build.limits import limits_of
from tapo_train.build.rollout import build_play, deadlines_of, samples_by_seed
from tapo_train.data.sampler import TaskSampler
from tapo_train.recipe.compose import Recipe
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.driver import EngineDriver
from tapo_train.rollout.engine import Engine, Sampling
from tapo_train.rollout.group import Rules, Score
from tapo_train.rollout.seats import Seats
from tapo_train.rollout.servers.engine import ServerEngine
from tapo_train.rollout.stream import GroupStream
from tapo_train.rollout.tensor_parallel import MirroredEngine
from tapo_train.tools.toolbox import Toolbox
from tapo_train.training.interruption import Interruption
from tapo_train.training.parts import Play, Rounds
from tapo_train.training.rounds import Questions, Refill
from tapo_train.training.stream import AtOnce, GroupsUnderWay, Stream
from tapo_train.types import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Player:
    """How an engine is played on."""

    driver: EngineDriver | None
    """Steps an engine on devices of its own, at work; None where who rolls out does it."""
    play: Play
    groups: GroupsUnderWay
    """From one update to the next."""


def build_player(
    recipe: Recipe,
    engine: Engine,
    chat: ChatFormat,
    toolbox: Toolbox,
    score: Score,
    *,
    on_progress: Callable[[], None] = lambda: None,
) -> Player:
    """All that rolls out on an engine."""
    driver = EngineDriver(engine, end_token_id=chat.end_token_id, on_progress=on_progress)
    if is_apart := isinstance(engine, ServerEngine):
        driver.start()
    apart = driver if is_apart else None
    play = build_play(recipe, engine, chat, toolbox, score, driver=apart, on_progress=on_progress)
    groups = _groups(recipe, engine, chat, toolbox, score, play, driver)
    return Player(driver=apart, play=play, groups=groups)


def _groups(
    recipe: Recipe,
    engine: Engine,
    chat: ChatFormat,
    toolbox: Toolbox,
    score: Score,
    play: Play,
    driver: EngineDriver,
) -> GroupsUnderWay:
    rollout = recipe.rollout
    if isinstance(engine, MirroredEngine):
        return AtOnce(play, rollouts=rollout.rollouts_per_question)
    seed = recipe.run.seed if samples_by_seed(recipe) else None
    rules = Rules(
        chat=chat,
        toolbox=toolbox,
        system_prompt=recipe.data.system_prompt,
        rollouts=rollout.rollouts_per_question,
        limits=limits_of(recipe),
        sampling=Sampling(temperature=rollout.temperature, seed=seed),
        deadlines=deadlines_of(rollout.deadlines, greedy=False),
        oversample=rollout.oversample,
        score=score,
    )
    return GroupStream(
        rules, driver, seats=Seats(engine=engine), max_in_flight=rollout.max_in_flight
    )


def build_rounds(
    recipe: Recipe,
    tasks: Sequence[Task],
    order: TaskSampler,
    player: Player,
    interruption: Interruption,
) -> Rounds:
    """How a step fills its batch."""
    rollout = recipe.rollout
    if rollout.refill_rounds:
        questions = Questions(
            tasks=tasks,
            order=order,
            play=player.play,
            interruption=interruption,
            per_step=recipe.data.questions_per_step,
            rollouts=rollout.rollouts_per_question,
        )
        return Refill(questions, most=rollout.refill_rounds, on_close=player.groups.close)
    return Stream(
        tasks,
        order,
        player.groups,
        interruption,
        per_step=recipe.data.questions_per_step,
        max_staleness=rollout.max_staleness,
        active=rollout.active_questions,
        steps=recipe.run.steps,
    )
