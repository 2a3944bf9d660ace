"""Each fault the probe was made for, on a real engine beside a real learner, in both number types.

The policy is the demo's, which has learned to look; the engine is the slow one, as a fault is a
fault in either and it costs seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from learner_rows import make_policy
from process_environment import ROOT

from tapo_train.build.limits import PROBE_TOLERANCE
from tapo_train.data.tasks import load_tasks
from tapo_train.errors import ProbeError
from tapo_train.learner.batch import TrainingRow, join
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.objective import supervised
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.hf_engine import HfEngine
from tapo_train.training.probe import Agreement, Probe, Turn
from tapo_train.types import Image, Span

Weights = dict[str, torch.Tensor]
Tokens = npt.NDArray[np.int32]
FOLDER = ROOT / "assets" / "warm_start"
HEAD = "lm_head.weight"
LOOKS = (
    "<think>The red panel is the one asked about.</think><tool_call>"
    '{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [500, 0, 1000, 500], "img_idx": 0}}'
    "</tool_call>"
)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a learner said before and after its update."""

    values: npt.NDArray[np.float32]

    def score(self, tokens: Tokens, images: Sequence[Image]) -> npt.NDArray[np.float32]:
        return self.values


@dataclass(frozen=True, kw_only=True)
class Learner:
    """Its chat, its turn; its scores and weights at two versions."""

    chat: ChatFormat
    dtype: str
    turn: Turn
    scores: tuple[Scored, Scored]
    weights: tuple[Weights, Weights]


def a_turn(chat: ChatFormat, world: Path) -> Turn:
    """A question of the demo's world with its picture, and a written turn."""
    task = load_tasks(world / "train.jsonl")[0]
    prompt = chat.prompt(task, system_prompt="Answer the question.", tool_schemas=[])
    tokens = np.concatenate([prompt, chat.assistant(LOOKS)])
    return Turn(tokens=tokens, images=task.images, sampled_from=len(prompt))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def learner(request: pytest.FixtureRequest, small_world: Path) -> Iterator[Learner]:
    chat = ChatFormat(FOLDER)
    turn = a_turn(chat, small_world)
    kind = {"float32": "fp32", "bfloat16": "bf16"}[request.param]
    change = {"optimizer": "adamw", "learning_rate": 1e-3, "zero_stage": 1, "precision": kind}
    policy = make_policy(FOLDER, chat, **change)
    row = TrainingRow.supervised(
        id="turn",
        tokens=turn.tokens,
        images=turn.images,
        spans=(Span(start=turn.sampled_from, end=len(turn.tokens)),),
    )
    scores, weights = [], []
    for _ in range(2):
        scores.append(Scored(values=policy.score(turn.tokens, turn.images)))
        weights.append({name: tensor.clone() for name, tensor in policy.named_weights()})
        policy.update([join([row])], supervised)
    policy.close()
    end_process_group()
    yield Learner(
        chat=chat,
        dtype=request.param,
        turn=turn,
        scores=(scores[0], scores[1]),
        weights=(weights[0], weights[1]),
    )


class UntiedHead(HfEngine):
    """Keeps a head of its own beside the embedding, as engines do that shard them apart."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._model.lm_head.weight = torch.nn.Parameter(self._model.lm_head.weight.clone())


class StaleCache(HfEngine):
    """Reads the keys and values of a prompt that other weights have computed."""

    kept: Any = None

    @torch.inference_mode()
    def logits(self, tokens: Tokens, images: Sequence[Image]) -> torch.Tensor:
        length = len(tokens) // 2
        if self.kept is None:
            prompt = self._prefilled(tokens[:length], images, use_cache=True)
            self.kept = prompt, self._model.model.rope_deltas
        prompt, self._model.model.rope_deltas = self.kept
        rest = self._model.model(
            input_ids=torch.from_numpy(tokens[length:]).long()[None],
            past_key_values=deepcopy(prompt.past_key_values),
            use_cache=True,
        )
        return torch.cat([self._logits(prompt), self._logits(rest)])


class FlatPositions(HfEngine):
    """Counts the tokens of a picture one by one, as if they were text."""

    def _prefilled(self, tokens: Tokens, images: Sequence[Image], *, use_cache: bool) -> Any:
        body = self._model.model
        body.get_rope_index = lambda ids, *_, **__: (
            torch.arange(ids.shape[1]).expand(3, 1, -1),
            torch.zeros(1, 1, dtype=torch.int64),
        )
        return super()._prefilled(tokens, images, use_cache=use_cache)


class OtherPixels(ChatFormat):
    """Normalises pictures by the mean and deviation of another model family (CLIP)."""

    def pixels(self, images: Sequence[Image]) -> dict[str, torch.Tensor]:
        found = dict(super().pixels(images))
        found["pixel_values"] = (found["pixel_values"] * 0.5 + 0.5 - 0.45) / 0.27
        return found


def dtype_of(learner: Learner) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[learner.dtype]


def watched(learner: Learner, engine: HfEngine, last: Weights | None = None) -> list[Agreement]:
    """What the probe finds at both versions; `last` are the weights the engine gets at the end."""
    probe = Probe(
        lambda: learner.turn,
        unsampled=learner.chat.banned_token_ids,
        tolerance=PROBE_TOLERANCE[learner.dtype],
    )
    found = []
    sent = [learner.weights[0], last or learner.weights[1]]
    for version, (scores, weights) in enumerate(zip(learner.scores, sent, strict=True)):
        engine.load_weights(weights.items(), version=version)
        found.append(probe(scores, engine, version=version))
    return found


@pytest.mark.parametrize("kind", [HfEngine, UntiedHead])
def test_an_engine_in_order_agrees_before_and_after_an_update(
    learner: Learner, kind: type[HfEngine]
) -> None:
    before, after = watched(learner, kind(learner.chat, dtype=dtype_of(learner)))
    assert before.lag is None and after.lag is not None
    assert abs(after.lag) < 0.25


def test_a_tied_head_that_was_not_sent_is_found(learner: Learner) -> None:
    engine = UntiedHead(learner.chat, dtype=dtype_of(learner))
    last = learner.weights[1] | {HEAD: learner.weights[0][HEAD]}
    with pytest.raises(ProbeError, match="of version 1"):
        watched(learner, engine, last)


def test_a_stale_cache_is_found(learner: Learner) -> None:
    with pytest.raises(ProbeError, match="of version 1"):
        watched(learner, StaleCache(learner.chat, dtype=dtype_of(learner)))


def test_wrong_positions_are_found_at_once(learner: Learner) -> None:
    with pytest.raises(ProbeError, match="of version 0"):
        watched(learner, FlatPositions(learner.chat, dtype=dtype_of(learner)))


def test_another_preprocessing_of_pictures_is_found_at_once(learner: Learner) -> None:
    with pytest.raises(ProbeError, match="of version 0"):
        watched(learner, HfEngine(OtherPixels(FOLDER), dtype=dtype_of(learner)))
