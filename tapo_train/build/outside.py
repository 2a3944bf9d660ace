"""From a recipe and an address to something that plays: a model that somebody serves."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

from tapo_train.build.limits import limits_of
from tapo_train.build.tools import replay_of
from tapo_train.errors import ConfigError
from tapo_train.recipe.compose import Recipe
from tapo_train.rewards.scoring import Scoring
from tapo_train.rollout.outside import OutsideEpisode
from tapo_train.rollout.outside_model import MODEL, OutsideModel
from tapo_train.tools.addresses import AllowedHosts, host_of_endpoint
from tapo_train.tools.limits import ToolLimits
from tapo_train.tools.net import FetchLimits, HttpClient
from tapo_train.tools.toolbox import Toolbox
from tapo_train.training.parts import Play
from tapo_train.types import Group, Task, Trajectory

__all__ = ["Endpoint", "build_outside_play"]

ANSWER_S = 300.0
"""[s] for an answer of the model, with all retries."""
IN_FLIGHT = 16
"""Attempts under way, where the recipe says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """An OpenAI-compatible server and a model of it."""

    url: str
    """http(s)://host[:port]/v1"""
    model: str
    key_variable: str = ""
    """Environment variable that holds the key; "" sends none."""


def build_outside_play(
    recipe: Recipe, endpoint: Endpoint, toolbox: Toolbox, scoring: Scoring, ending: ExitStack
) -> Play:
    """Rollouts of an outside model with the recipe's prompt, tools and limits, scored.

    Raises:
        ConfigError: the address is none, or the key's variable is empty.
    """
    if toolbox.environments is not None:
        raise ConfigError("--endpoint: an outside model has no environments (tools.environment)")
    in_flight = recipe.rollout.max_in_flight or IN_FLIGHT
    models = {
        greedy: ending.enter_context(
            closing(_model(recipe, endpoint, toolbox, greedy=greedy, in_flight=in_flight))
        )
        for greedy in (True, False)
    }

    async def attempt(
        task: Task, number: int, greedy: bool, seats: asyncio.Semaphore
    ) -> Trajectory:
        async with seats:
            episode = OutsideEpisode(
                id=f"{task.id}/0.0.{number}",
                task=task,
                attempt=number,
                model=models[greedy],
                toolbox=toolbox,
                limits=limits_of(recipe),
                system_prompt=recipe.data.system_prompt,
            )
            return await scoring(await episode.play())

    async def group(task: Task, rollouts: int, greedy: bool, seats: asyncio.Semaphore) -> Group:
        played = (attempt(task, number, greedy, seats) for number in range(rollouts))
        return Group(task=task, trajectories=tuple(await asyncio.gather(*played)))

    async def groups(tasks: Sequence[Task], rollouts: int, greedy: bool) -> list[Group]:
        seats = asyncio.Semaphore(in_flight)
        return await asyncio.gather(*(group(task, rollouts, greedy, seats) for task in tasks))

    def play(
        tasks: Sequence[Task], *, rollouts: int, greedy: bool, policy_version: int
    ) -> list[Group]:
        with toolbox.settled(), models[greedy].settled():
            return asyncio.run(groups(tasks, rollouts, greedy))

    return play


def _model(
    recipe: Recipe, endpoint: Endpoint, toolbox: Toolbox, *, greedy: bool, in_flight: int
) -> Toolbox:
    """The served model as the one tool of a toolbox."""
    rollout = recipe.rollout
    temperature = 0.0 if greedy else rollout.temperature
    tool = OutsideModel(
        _client(recipe, endpoint),
        endpoint=endpoint.url,
        model=endpoint.model,
        tools=toolbox.schemas(),
        options={"temperature": temperature, "max_tokens": rollout.max_turn_tokens},
    )
    return Toolbox(
        [tool],
        deadline_s=ANSWER_S,
        limits={MODEL: ToolLimits(concurrency=in_flight, retries=3, deadline_s=ANSWER_S)},
        replay=replay_of(recipe),
    )


def _client(recipe: Recipe, endpoint: Endpoint) -> HttpClient:
    key = os.environ.get(endpoint.key_variable, "") if endpoint.key_variable else ""
    if endpoint.key_variable and not key:
        raise ConfigError(f"--endpoint-key: {endpoint.key_variable} is empty or not set here")
    return HttpClient(
        allowed=AllowedHosts.parse([host_of_endpoint(endpoint.url, field="--endpoint")]),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        limits=FetchLimits(timeout_s=ANSWER_S),
        forbidden="tools.replay=replay forbids the network"
        if recipe.tools.replay == "replay"
        else "",
    )
