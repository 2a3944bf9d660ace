"""Engine and learner over one policy, updates and syncs between them; asserts that they agree.

Run by `test_engine_and_learner.py` in a process of its own, because the engine takes the
process group down with it when it ends.

    python engine_and_learner_worker.py TINY_POLICY WORK_FOLDER full|adapter
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from rollout_world import SYSTEM_PROMPT, draw_toolbox, picture_task, teach_calls

from tapo_train.learner.batch import TrainingRow, join, pack
from tapo_train.learner.objective import supervised
from tapo_train.learner.policy import Policy
from tapo_train.learner.settings import AdapterSettings, LearnerSettings
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import Sampling
from tapo_train.rollout.limits import Limits
from tapo_train.rollout.vllm_engine import VllmEngine, VllmOptions
from tapo_train.types import Trajectory

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
        rollouts_per_task=32,
        limits=Limits(max_turns=4, max_turn_tokens=48, max_tokens=1000),
        sampling=Sampling(temperature=TEMPERATURE),
        policy_version=version,
    )
    return list(group.trajectories)


SETTINGS = {
    "full": LearnerSettings(precision="fp32", zero_stage=1, learning_rate=3e-4),
    "adapter": LearnerSettings(
        precision="fp32",
        zero_stage=1,
        learning_rate=1e-2,
        adapter=AdapterSettings(rank=8, alpha=16.0, targets=("q_proj", "v_proj", "down_proj")),
    ),
}


def main(source: Path, work: Path, trained: str) -> None:
    """Three rounds of play, compare, update, sync, and a last comparison."""
    chat = ChatFormat(teach_calls(source, work / "model"))
    engine = VllmEngine(chat, VllmOptions(dtype="float32", max_model_len=1024, max_num_seqs=16))
    policy = Policy(
        chat.model,
        settings=SETTINGS[trained],
        pixels=chat.pixels,
        temperature=TEMPERATURE,
        banned_token_ids=chat.banned_token_ids,
    )
    probe: Trajectory | None = None
    for version in range(4):
        trajectories = play(engine, chat, version=version)
        rich = [t for t in trajectories if len(t.images) >= 2 and len(t.turns) >= 3]
        assert len(rich) >= 2, f"version {version}: {len(rich)} of {len(trajectories)} to compare"
        rows = [TrainingRow.from_turns(t, np.ones(len(t.turns))) for t in rich]
        for trajectory, row in zip(rich, rows, strict=True):
            ours = policy.logprobs(join([row])).numpy()
            np.testing.assert_allclose(ours, trajectory.logprobs, atol=AGREEMENT, rtol=0)
        probe = probe or rich[0]
        before = engine.score(probe.tokens, probe.images)
        np.testing.assert_allclose(
            policy.score(probe.tokens, probe.images), before, atol=AGREEMENT, rtol=0
        )
        policy.update(pack(rows, budget_tokens=2000), supervised)
        engine.load_weights(policy.named_weights(), version=version + 1)
        moved = np.abs(engine.score(probe.tokens, probe.images) - before).max()
        assert moved > 100 * AGREEMENT, "the update did not reach the engine"
    policy.close()
    engine.close()
    print("agreed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
