"""How often engine and learner choose other experts in bf16, and what it does to log-probabilities.

By hand, for docs/models.md; on CPU, where vLLM has no `routed_experts`, its routers are asked:

    PYTHONPATH=.:tests python tests/expert_choice_worker.py FOLDER SPREAD...

SPREAD is the standard deviation of the random weights: 0.02 is transformers' own, where every
expert is nearly as good as any other; with 0.1 a router decides.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from family_engine_worker import TEMPERATURE, one_by_one, sampled_after
from learner_rows import make_policy, make_row
from tiny_families import TEXT, tokenizer
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from vllm.model_executor.layers.fused_moe.layer import MoERunner

from tapo_train.demo.tiny.chat_template import CHAT_TEMPLATE
from tapo_train.learner.batch import join
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.vllm_engine import VllmEngine, VllmOptions

SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
ROWS, SAMPLED = 16, 96


def build(out: Path, spread: float) -> Path:
    """A Qwen3-MoE of random weights."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**{**TEXT, **SHAPE}, initializer_range=spread)
    model = transformers.Qwen3MoeForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(out)
    own = tokenizer()
    own.chat_template = CHAT_TEMPLATE
    own.save_pretrained(out)
    return out


class Chosen:
    """What the engine's routers choose, layer by layer, token by token."""

    def __init__(self, engine: VllmEngine) -> None:
        self._layers: dict[int, list[Tensor]] = {}
        engine._llm.apply_model(self._listen)

    def _listen(self, model: Any) -> None:
        for module in model.modules():
            if isinstance(module, MoERunner):
                layer = module.layer_id
                module.router.set_capture_fn(lambda ids, at=layer: self._keep(at, ids))

    def _keep(self, layer: int, ids: Tensor) -> None:
        self._layers.setdefault(layer, []).append(ids.long().clone())

    def take(self) -> Tensor:
        """[layers, T, experts] since the last call."""
        taken = [torch.cat(parts) for _, parts in sorted(self._layers.items())]
        self._layers.clear()
        return torch.stack(taken)


@contextmanager
def routed(model: Any, given: Tensor | None, seen: list[Tensor]) -> Iterator[None]:
    """Note what the learner's routers choose, and let them take what is `given` instead."""
    routers = [m for m in model.modules() if isinstance(m, Qwen3MoeTopKRouter)]

    def take(layer: int, answer: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, scores, chosen = answer
        seen.append(chosen)
        if given is None:
            return answer
        weights = logits.softmax(-1, dtype=torch.float).gather(1, given[layer])
        return logits, (weights / weights.sum(-1, keepdim=True)).to(scores.dtype), given[layer]

    hooks = [
        router.register_forward_hook(lambda _, __, answer, at=i: take(at, answer))
        for i, router in enumerate(routers)
    ]
    yield
    for hook in hooks:
        hook.remove()


def measure(folder: Path, spread: str) -> None:
    """Sample, score twice, and say what differs."""
    chat = ChatFormat(build(folder, float(spread)))
    engine = VllmEngine(chat, VllmOptions(dtype="bfloat16", max_model_len=256, max_num_seqs=1))
    chosen = Chosen(engine)
    policy = make_policy(
        chat.model,
        chat,
        precision="bf16",
        temperature=TEMPERATURE,
        banned_token_ids=chat.banned_token_ids,
    )
    other, plain, replayed, at_other, at_same = [], [], [], [], []
    for seed in range(ROWS):
        start = make_row(chat, policy.layout, seed=seed)
        row = sampled_after(engine, start, max_tokens=SAMPLED)
        experts = chosen.take()
        own: list[Tensor] = []
        # The last token is sampled and goes through no router of the engine.
        given = torch.cat([experts, experts[:, -1:]], dim=1)
        for replay, found in ((None, plain), (given, replayed)):
            with routed(policy.model, replay, own if replay is None else []):
                ours = policy.logprobs(join([row])).numpy()
            found.append(np.abs(ours - row.sampler_logprobs))
        mine = torch.stack(own)[:, :-1].sort(-1).values
        differs = (mine != experts.sort(-1).values).any(-1)
        other.append(differs.numpy())
        # A sampled token is predicted at the position before it.
        flipped = differs.any(0).numpy()[row.spans[0].start - 1 :]
        at_other.append(plain[-1][flipped])
        at_same.append(plain[-1][~flipped])
    policy.close()
    engine.close()
    tokens = sum(map(len, plain))
    say = {
        "choices that differ": np.concatenate([o.ravel() for o in other]).mean(),
        "tokens with one in any layer": np.concatenate([o.any(0) for o in other]).mean(),
        "|difference| [nat], own experts, mean": np.concatenate(plain).mean(),
        "|difference| [nat], own experts, max": np.concatenate(plain).max(),
        "of tokens whose experts differ": np.concatenate(at_other).mean(),
        "of the others": np.concatenate(at_same).mean(),
        "|difference| [nat], engine's experts, mean": np.concatenate(replayed).mean(),
        "|difference| [nat], engine's experts, max": np.concatenate(replayed).max(),
    }
    print(f"spread {spread}, {tokens} sampled tokens")
    for name, value in say.items():
        print(f"  {name}: {value:.5f}")


if __name__ == "__main__":
    one_by_one(measure, Path(sys.argv[1]), sys.argv[2:])
