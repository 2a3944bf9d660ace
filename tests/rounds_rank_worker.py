"""A step's rounds on one or two ranks, for what must not depend on their number.

    rounds_rank_worker.py MODEL OUT      alone, or under torchrun with 2 processes

Writes, per rank, what it holds: position, question and answers of each group, and the metrics.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from rewarding import scoring
from rollout_world import SYSTEM_PROMPT, draw_toolbox
from scripted_engine import ScriptedEngine

from tapo_train.data.sampler import TaskSampler
from tapo_train.learner import distributed
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import GenerationRequest, Sampling
from tapo_train.rollout.limits import Limits
from tapo_train.training.interruption import Interruption
from tapo_train.training.rounds import Questions, Refill
from tapo_train.types import Group, Task

STEPS = 3


def mixed_at_odd(request: GenerationRequest) -> str:
    """Odd questions are answered rightly by every second attempt, even ones by all."""
    question, _, rest = request.id.partition("/")
    rollout = int(rest.rpartition(":")[0].rpartition(".")[2])
    is_wrong = int(question) % 2 == 1 and rollout % 2 == 1
    return f"<answer>{'no' if is_wrong else 'yes'}</answer>"


class ScriptedPlay:
    """Plays with a scripted engine; notes what it was asked."""

    def __init__(self, chat: ChatFormat) -> None:
        self.engine = ScriptedEngine(chat, mixed_at_odd)
        self.asked: list[list[str]] = []

    def __call__(
        self, tasks: Sequence[Task], *, rollouts: int, greedy: bool, policy_version: int
    ) -> list[Group]:
        self.asked.append([task.id for task in tasks])
        return collect(
            tasks,
            engine=self.engine,
            chat=self.engine.chat,
            toolbox=draw_toolbox(),
            system_prompt=SYSTEM_PROMPT,
            rollouts_per_task=rollouts,
            limits=Limits(max_turns=4, max_turn_tokens=200, max_tokens=2000),
            sampling=Sampling(temperature=0.0 if greedy else 1.0),
            policy_version=policy_version,
            score=scoring(),
        )


def numbered(num_tasks: int) -> list[Task]:
    """Questions "0", "1", …; the right answer is yes."""
    return [
        Task(id=str(number), question="?", images=(), answers=("yes",))
        for number in range(num_tasks)
    ]


def refill(play: ScriptedPlay, *, most: int, num_tasks: int = 40, per_step: int = 6) -> Refill:
    """Rounds over numbered questions, in an order of seed 0."""
    questions = Questions(
        tasks=numbered(num_tasks),
        order=TaskSampler([task.id for task in numbered(num_tasks)], seed=0),
        play=play,
        interruption=Interruption(),
        per_step=per_step,
        rollouts=2,
    )
    return Refill(questions, most=most)


def main(model: Path, out: Path) -> None:
    """Some steps, and what this rank has of them."""
    distributed.init()
    play = ScriptedPlay(ChatFormat(model))
    rounds = refill(play, most=3)
    steps = []
    for step in range(STEPS):
        rolled = rounds(step)
        groups = [
            (position, [(t.id, t.answer) for t in group.trajectories])
            for position, group in zip(rolled.questions, rolled.groups, strict=True)
        ]
        replaced = [group.task.id for group in rolled.replaced]
        steps.append({"groups": groups, "replaced": replaced, "metrics": dict(rolled.metrics)})
    written = {"steps": steps, "calls": len(play.asked)}
    (out / f"{distributed.world_size()}.{distributed.rank()}.json").write_text(json.dumps(written))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
