"""Engine and learner over one policy, updates and syncs between them; asserts that they agree.

Run by `test_engine_and_learner.py` in a process of its own, because the engine takes the
process group down with it when it ends.

    python engine_and_learner_worker.py TINY_POLICY WORK_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from rollout_world import (
    SYSTEM_PROMPT,
    draw_toolbox,
    picture_task,
    requests_of,
    teach_calls,
    written_trajectory,
)

from tapo_train.learner.batch import TrainingRow, join, pack
from tapo_train.learner.objective import supervised
from tapo_train.learner.policy import Policy
from tapo_train.learner.settings import AdapterSettings, LearnerSettings
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import Completion, Sampling
from tapo_train.rollout.limits import Limits
from tapo_train.rollout.vllm_engine import VllmEngine, VllmOptions
from tapo_train.types import Span, Trajectory

AGREEMENT = 1e-4
"""[nat] largest difference in float32."""
TEMPERATURE = 0.8


def play(engine: VllmEngine, chat: ChatFormat, *, version: int) -> list[Trajectory]:
    """Trajectories of several turns, whose tool answers with a picture each time."""
    (group,) = collect(
        [picture_task()],
        engine=engine,
        chat=chat,
        toolbox=draw_toolbox(),
        system_prompt=SYSTEM_PROMPT,
        rollouts_per_task=8,
        limits=Limits(max_turns=4, max_turn_tokens=48, max_tokens=1000),
        sampling=Sampling(temperature=TEMPERATURE),
        policy_version=version,
    )
    return list(group.trajectories)


def row_of(trajectory: Trajectory) -> TrainingRow:
    """All its turns, to be raised."""
    return TrainingRow.from_turns(trajectory, np.ones(len(trajectory.turns)))


def continuations(engine: VllmEngine, written: Trajectory) -> list[TrainingRow]:
    """Sampled in place of each turn of a written trajectory, one after the other."""
    rows = []
    for request in requests_of(written, sampling=Sampling(temperature=TEMPERATURE)):
        engine.submit(request)
        done: list[Completion] = []
        while engine.has_unfinished():
            done += engine.step()
        tokens = np.concatenate([request.tokens, done[0].tokens])
        rows.append(
            TrainingRow(
                id=request.id,
                tokens=tokens,
                images=request.images,
                spans=(Span(start=len(request.tokens), end=len(tokens)),),
                advantages=np.ones(len(done[0].tokens)),
                sampler_logprobs=done[0].logprobs,
            )
        )
    return rows


SETTINGS = {
    "full": LearnerSettings(precision="fp32", zero_stage=1, learning_rate=3e-4),
    "adapter": LearnerSettings(
        precision="fp32",
        zero_stage=1,
        learning_rate=1e-2,
        adapter=AdapterSettings(rank=8, alpha=16.0, targets=("q_proj", "v_proj", "down_proj")),
    ),
}


OPTIONS = VllmOptions(dtype="float32", max_model_len=1024, max_num_seqs=16)


def require_agreement(engine: VllmEngine, chat: ChatFormat, trained: str, *, version: int) -> int:
    """Three rounds of play, compare, update, sync, and a last comparison; the engine's version."""
    policy = Policy(
        chat.model,
        settings=SETTINGS[trained],
        pixels=chat.pixels,
        temperature=TEMPERATURE,
        banned_token_ids=chat.banned_token_ids,
    )
    if version:  # It has the weights of another learner.
        engine.load_weights(policy.named_weights(), version=version)
    # What the policy plays depends on the machine: this has three turns and two drawn pictures.
    written = written_trajectory(chat)
    for at in range(version, version + 4):
        sampled = [row_of(t) for t in play(engine, chat, version=at)]
        sampled += continuations(engine, written)
        for row in sampled:
            ours = policy.logprobs(join([row])).numpy()
            np.testing.assert_allclose(ours, row.sampler_logprobs, atol=AGREEMENT, rtol=0)
        before = engine.score(written.tokens, written.images)
        np.testing.assert_allclose(
            policy.score(written.tokens, written.images), before, atol=AGREEMENT, rtol=0
        )
        policy.update(pack([row_of(written), *sampled[:4]], budget_tokens=2000), supervised)
        engine.load_weights(policy.named_weights(), version=at + 1)
        moved = np.abs(engine.score(written.tokens, written.images) - before).max()
        assert moved > 100 * AGREEMENT, "the update did not reach the engine"
    policy.close()
    print(f"{trained}: agreed")
    return version + 4


def main(source: Path, work: Path) -> None:
    """All weights are trained."""
    chat = ChatFormat(teach_calls(source, work / "model"))
    engine = VllmEngine(chat, OPTIONS)
    require_agreement(engine, chat, "full", version=0)
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
