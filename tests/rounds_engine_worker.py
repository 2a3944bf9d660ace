"""One vLLM and a learner of all weights, one of an adapter, groups that go on, refilled rounds.

Run by `test_engine_and_learner.py` in a process of its own, because the engine takes the
process group down with it when it ends.

    python rounds_engine_worker.py TINY_POLICY WORK_FOLDER
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from engine_and_learner_worker import (
    AGREEMENT,
    OPTIONS,
    SETTINGS,
    TEMPERATURE,
    require_agreement,
)
from rollout_world import (
    SYSTEM_PROMPT,
    DrawArguments,
    DrawTool,
    draw_toolbox,
    picture_task,
    teach_calls,
)

from tapo_train.data.sampler import TaskSampler
from tapo_train.learner.batch import TrainingRow, pack
from tapo_train.learner.objective import supervised
from tapo_train.learner.policy import Policy
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.driver import EngineDriver
from tapo_train.rollout.engine import Sampling
from tapo_train.rollout.group import Rules, Score
from tapo_train.rollout.hf_engine import HfEngine
from tapo_train.rollout.limits import Limits
from tapo_train.rollout.seats import Seats
from tapo_train.rollout.stream import GroupStream
from tapo_train.rollout.vllm_engine import VllmEngine
from tapo_train.tools.base import ToolContext
from tapo_train.tools.toolbox import Toolbox
from tapo_train.training.interruption import Interruption
from tapo_train.training.parts import Rounds
from tapo_train.training.rounds import Questions, Refill
from tapo_train.training.stream import Stream
from tapo_train.types import Group, Observation, Reward, Task, Trajectory

TASKS = [picture_task(f"q{number}") for number in range(24)]
PER_STEP, ROLLOUTS = 3, 2
MOST_STEPS = 40
STALENESS = 2
LIMITS = Limits(max_turns=4, max_turn_tokens=48, max_tokens=1000)


class CountingEngine(VllmEngine):
    """vLLM, counting what it gave up."""

    num_aborted = 0

    def abort(self, ids: Sequence[str]) -> None:
        self.num_aborted += len(ids)
        super().abort(ids)


@dataclass(kw_only=True)
class WaitingTool(DrawTool):
    """Answers the first call of some trajectories when the next update is over."""

    run_of: Run

    async def run(self, arguments: DrawArguments, context: ToolContext) -> Observation:
        version = self.run_of.version
        is_first = len(context.images) == len(context.task.images)
        while is_first and int(context.task.id[1:]) % 4 == 0 and self.run_of.version == version:
            await asyncio.sleep(0.01)
        return await super().run(arguments, context)


async def mixed_at_odd(trajectory: Trajectory) -> Trajectory:
    """Rewards every second attempt at odd questions and none at even ones, whatever they say."""
    rollout = int(trajectory.id.rpartition(".")[2])
    good = float(int(trajectory.task.id[1:]) % 2 and rollout % 2)
    parts = {"accuracy": good, "format": 0.0}
    return trajectory.with_reward(Reward(total=good, accuracy=good, parts=parts))


async def longer(trajectory: Trajectory) -> Trajectory:
    """Rewards trajectories of many turns, which a policy that hardly knows anything has, too."""
    good = float(len(trajectory.turns) > 2)
    parts = {"accuracy": good, "format": 0.0}
    return trajectory.with_reward(Reward(total=good, accuracy=good, parts=parts))


@dataclass(kw_only=True)
class Run:
    """An engine and a learner in step, with the weights of every version."""

    chat: ChatFormat
    engine: CountingEngine
    policy: Policy
    slow: HfEngine
    version: int = 0
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)
    trained: Counter[str] = field(default_factory=Counter)

    def sync(self) -> None:
        """Hand the learner's weights over, and keep them."""
        kept = {name: tensor.detach().clone() for name, tensor in self.policy.named_weights()}
        self.weights.append(kept)
        self.engine.load_weights(kept.items(), version=self.version)

    def order(self) -> TaskSampler:
        """Of TASKS."""
        return TaskSampler([task.id for task in TASKS], seed=0)

    def stream(self, score: Score) -> Stream:
        """Groups that go on over updates."""
        rules = Rules(
            chat=self.chat,
            toolbox=Toolbox([WaitingTool(run_of=self)], deadline_s=600),
            system_prompt=SYSTEM_PROMPT,
            rollouts=ROLLOUTS,
            limits=LIMITS,
            sampling=Sampling(temperature=TEMPERATURE),
            score=score,
        )
        driver = EngineDriver(self.engine, end_token_id=self.chat.end_token_id)
        groups = GroupStream(rules, driver, seats=Seats(engine=self.engine))
        return Stream(
            TASKS,
            self.order(),
            groups,
            Interruption(),
            per_step=PER_STEP,
            max_staleness=STALENESS,
            active=None,
            steps=10**6,
        )

    def questions(self, score: Score) -> Questions:
        """Rounds over TASKS."""

        def play(
            tasks: Sequence[Task], *, rollouts: int, greedy: bool, policy_version: int
        ) -> list[Group]:
            return collect(
                tasks,
                engine=self.engine,
                chat=self.chat,
                toolbox=draw_toolbox(),
                system_prompt=SYSTEM_PROMPT,
                rollouts_per_task=rollouts,
                limits=LIMITS,
                sampling=Sampling(temperature=TEMPERATURE),
                policy_version=policy_version,
                score=score,
            )

        return Questions(
            tasks=TASKS,
            order=self.order(),
            play=play,
            interruption=Interruption(),
            per_step=PER_STEP,
            rollouts=ROLLOUTS,
        )

    def step(self, rounds: Rounds) -> tuple[list[Trajectory], list[Trajectory]]:
        """Roll out, compare, train, sync; what was trained, and what others replaced."""
        rolled = rounds(self.version)
        for group in rolled.groups:
            assert len(group.trajectories) == ROLLOUTS, "a group is trained whole"
        held = [t for group in rolled.groups for t in group.trajectories]
        assert all(self.version - t.token_versions().min() <= STALENESS for t in held)
        replaced = [t for group in rolled.replaced for t in group.trajectories]
        for trajectory in [*held, *replaced]:
            self.require_alignment(trajectory)
        rows = [TrainingRow.from_turns(t, np.ones(len(t.turns))) for t in held]
        self.trained.update(row.id for row in rows)
        self.policy.update(pack(rows, budget_tokens=2000), supervised)
        self.version += 1
        self.sync()
        return held, replaced

    def require_alignment(self, trajectory: Trajectory) -> None:
        """Every sampled token has the log-probability that its turn's weights give it."""
        sampled = [np.arange(turn.span.start, turn.span.end) for turn in trajectory.turns]
        assert sum(map(len, sampled)) == len(trajectory.logprobs)
        logprobs = np.split(trajectory.logprobs, np.cumsum(list(map(len, sampled)))[:-1])
        scores = {}
        for version in {turn.policy_version for turn in trajectory.turns}:
            self.slow.load_weights(self.weights[version].items(), version=version)
            logits = self.slow.logits(trajectory.tokens, trajectory.images)
            scores[version] = self.slow.processed(logits, Sampling(temperature=TEMPERATURE))
        for turn, at, ours in zip(trajectory.turns, sampled, logprobs, strict=True):
            theirs = scores[turn.policy_version][at - 1, trajectory.tokens[at]].numpy()
            np.testing.assert_allclose(ours, theirs, atol=AGREEMENT, rtol=0)
            assert self.chat.decode(trajectory.tokens[at]).text.startswith(turn.text)


def streamed(run: Run) -> None:
    """Trajectories whose turns were sampled by different weights, each before it became too old."""
    rounds = run.stream(longer)
    held: list[Trajectory] = []
    for _ in range(MOST_STEPS):
        held += run.step(rounds)[0]
        if any(len({turn.policy_version for turn in t.turns}) > 1 for t in held):
            break
    else:
        raise AssertionError("no trajectory went on over an update")
    rounds.close()
    assert run.engine.num_aborted == 0, "a turn was cut off"
    assert all(t.policy_version == t.turns[-1].policy_version for t in held)
    assert len(rounds.state_dict()["untrained"]) == STALENESS * PER_STEP


def refilled(run: Run) -> None:
    """Groups whose trajectories all earned the same give way to others."""
    rounds = Refill(run.questions(mixed_at_odd), most=3)
    num_replaced = 0
    for _ in range(3):
        held, replaced = run.step(rounds)
        num_replaced += len(replaced)
        assert len(held) == PER_STEP * ROLLOUTS
        assert {t.policy_version for t in [*held, *replaced]} == {run.version - 1}
        assert not {t.id for t in held} & {t.id for t in replaced}
    assert num_replaced > 0, "nothing was refilled"


def main(source: Path, work: Path) -> None:
    """All, with one engine."""
    chat = ChatFormat(teach_calls(source, work / "model"))
    engine, version = CountingEngine(chat, OPTIONS), 0
    for trained in SETTINGS:
        version = require_agreement(engine, chat, trained, version=version)
    policy = Policy(
        chat.model,
        settings=SETTINGS["full"],
        pixels=chat.pixels,
        temperature=TEMPERATURE,
        banned_token_ids=chat.banned_token_ids,
    )
    run = Run(chat=chat, engine=engine, policy=policy, slow=HfEngine(chat))
    run.sync()
    streamed(run)
    refilled(run)
    assert set(run.trained.values()) == {1}, "a trajectory was trained twice"
    run.policy.close()
    run.engine.close()
    print("aligned", len(run.trained), run.engine.num_aborted)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
