"""One model split over two ranks, against the whole model on each; asserts that they agree.

Run by `test_rollout_tensor_parallel.py` under torchrun.

    torchrun --nproc-per-node 2 tensor_parallel_worker.py TINY_POLICY WORK_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from rollout_world import SYSTEM_PROMPT, draw_toolbox, picture_task, teach_calls, written_trajectory
from test_rollout_engines import changed_weights

from tapo_train.learner import distributed
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import Sampling
from tapo_train.rollout.hf_engine import HfEngine
from tapo_train.rollout.limits import Limits
from tapo_train.rollout.tensor_parallel import GroupPlay, MirroredEngine
from tapo_train.rollout.vllm_engine import VllmEngine, VllmOptions
from tapo_train.types import Group, Trajectory

AGREEMENT = 1e-4
"""[nat] largest difference in float32."""


def require_greedy(played: Trajectory, slow: HfEngine) -> None:
    """Each sampled token is, to the whole model, the most probable one but for rounding."""
    greedy = slow.processed(slow.logits(played.tokens, played.images), Sampling(temperature=0))
    at = np.concatenate([np.arange(turn.span.start, turn.span.end) for turn in played.turns])
    chosen = greedy[at - 1, played.tokens[at]].numpy()
    np.testing.assert_allclose(played.logprobs, chosen, atol=AGREEMENT, rtol=0)
    best = greedy[at - 1].max(dim=-1).values.numpy()
    np.testing.assert_allclose(chosen, best, atol=AGREEMENT, rtol=0)


def main(source: Path, work: Path) -> None:
    """Play, compare, change the weights, play and compare again."""
    distributed.init()
    if distributed.rank() == 0:
        teach_calls(source, work / "model")
    distributed.barrier()
    chat = ChatFormat(work / "model")
    options = VllmOptions(dtype="float32", max_model_len=1024, max_num_seqs=16, tensor_parallel=2)
    split = MirroredEngine(VllmEngine(chat, options), distributed.Subgroup(2))
    slow = HfEngine(chat)

    def play(tasks: list, **_: object) -> list[Group]:
        return collect(
            tasks,
            engine=split,
            chat=chat,
            toolbox=draw_toolbox(),
            system_prompt=SYSTEM_PROMPT,
            rollouts_per_task=1,
            limits=Limits(max_turns=4, max_turn_tokens=48, max_tokens=1000),
            sampling=Sampling(temperature=0),
        )

    written = written_trajectory(chat)
    tasks = [picture_task(f"rank{distributed.rank()}.{k}") for k in range(2)]
    for version in (0, 1):
        if version:
            weights = changed_weights(chat, seed=version)
            for engine in (split, slow):
                engine.load_weights(weights.items(), version=version)
        shared = GroupPlay(play, split)
        found = shared(tasks, rollouts=1, greedy=True, policy_version=version)
        assert [group.task.id for group in found] == [task.id for task in tasks]
        for group in found:
            require_greedy(group.trajectories[0], slow)
        # All ranks score the same sequence.
        np.testing.assert_allclose(
            split.score(written.tokens, written.images),
            slow.score(written.tokens, written.images),
            atol=AGREEMENT,
            rtol=0,
        )
    # The launcher's lines of two ranks may share one.
    print(f"rank {distributed.rank()} agreed", flush=True)
    split.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
