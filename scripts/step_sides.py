"""The two sides of bench_step.py: our training step and TRL's, of the same scripted turns."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_update import CLIP, PEER_OPTIONS, ROPE, TEXT, VISION, no_pictures, text_model
from pydantic import BaseModel, Field
from timed_engine import TimedEngine
from transformers import AutoTokenizer, Qwen3VLConfig
from transformers import Qwen3VLForConditionalGeneration as Qwen3VL

from tapo_train.algos.advantages import group_advantages
from tapo_train.algos.losses import grpo
from tapo_train.algos.turn_advantages import Advantages
from tapo_train.credit.assigners import CreditAssigner
from tapo_train.credit.steps import from_trajectory
from tapo_train.demo.tiny.model import VOCABULARY, build_tiny_policy
from tapo_train.learner.batch import pack
from tapo_train.learner.objective import policy_gradient
from tapo_train.learner.policy import Policy
from tapo_train.learner.settings import LearnerSettings
from tapo_train.rewards.format import is_well_formed
from tapo_train.rewards.matching import exact_match
from tapo_train.rewards.reward import RewardFunction, Weighted
from tapo_train.rewards.score import by_rule
from tapo_train.rewards.scoring import Scoring
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import GenerationRequest, Sampling
from tapo_train.rollout.limits import Limits
from tapo_train.tools.base import ToolContext
from tapo_train.tools.toolbox import Toolbox
from tapo_train.training.step_batch import Batch, rows_of_updates
from tapo_train.types import Group, Observation, Task, Trajectory

Shape = dict[str, int]
SHAPES: dict[str, Shape] = {
    "update": {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64},
    "demo": {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32},
}
"""Of the language model: that of bench_update.py, and that which the demo trains."""
TURNS = 4
MEDIAN_WORDS, SPREAD = 24, 0.9
"""Of an observation of one trajectory, and the sigma of the logarithm over trajectories."""
EPS = 1e-4
"""TRL's, next to the deviation of a group's rewards."""
BUDGET = 2048
SYSTEM = "Answer the question. Search first."
QUESTIONS = ("Who built the tower?", "Which river runs past the old mill at the green gate?")
ANSWERS = ("Velor", "Tamar")
REWARD = RewardFunction(
    parts={
        "accuracy": Weighted(part=by_rule(lambda t: exact_match(t.answer, t.task.answers))),
        "format": Weighted(part=by_rule(is_well_formed), weight=0.5),
    }
)
WORDS = ["house", "tower", "Velor", "river", "green", "gate", "built", "by", "the", "old", "mill"]
MARKS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


@dataclass(frozen=True)
class Script:
    """What every trajectory writes and reads, by its number in the batch."""

    rollouts: int
    """Of each question."""

    @property
    def count(self) -> int:
        """Trajectories of a step."""
        return self.rollouts * len(QUESTIONS)

    def turn(self, number: int, turn: int) -> str:
        """A call, or at last the answer: right in every third trajectory."""
        thought = "<think>\n" + " ".join(WORDS[:6]) + "\n</think>\n\n"
        if turn < TURNS:
            call = f'{{"name": "search", "arguments": {{"query": "{number} {turn}"}}}}'
            return f"{thought}<tool_call>\n{call}\n</tool_call>"
        right = ANSWERS[number // self.rollouts]
        return f"{thought}<answer>{right if number % 3 == 0 else 'nobody'}</answer>"

    def observation(self, query: str) -> str:
        """Words, as many as the trajectory's place among the quantiles says."""
        number, turn = map(int, query.split())
        places = np.random.default_rng(0).permutation(self.count)
        quantile = statistics.NormalDist().inv_cdf((places[number] + 0.5) / self.count)
        length = int(np.exp(np.log(MEDIAN_WORDS) + SPREAD * quantile))
        random = np.random.default_rng([number, turn])
        return " ".join(random.choice(WORDS, size=length).tolist())


class Arguments(BaseModel):
    """Of the tool."""

    query: str = Field(description="What to look for.")

    @classmethod
    def model_json_schema(cls, *_: Any, **__: Any) -> dict[str, Any]:
        """As transformers writes that of a function, type first, so that prompts are equal."""
        query = {"type": "string", "description": cls.model_fields["query"].description}
        return {"type": "object", "properties": {"query": query}, "required": ["query"]}


@dataclass
class Search:
    """The tool for our side: waits without holding up anything else."""

    script: Script
    latency: float = 0.0
    calls: int = 0
    name: str = "search"
    version: str = "1"
    description: str = "Search."
    arguments_model: type[BaseModel] = Arguments

    async def run(self, arguments: Any, context: ToolContext) -> Observation:
        """Wait, then answer."""
        self.calls += 1
        await asyncio.sleep(self.latency)
        return Observation(text=self.script.observation(arguments.query))


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step took, and what it computed."""

    wall_s: float
    busy_s: float
    """CPU time plus time asleep for tools."""
    loss: float
    norm: float
    """Of the gradient, before it is clipped."""
    rows: list[tuple[tuple[int, ...], tuple[int, ...]]]
    """Tokens of each trajectory and the positions that are trained, sorted."""


def write_policy(folder: Path, template: str, shape: Shape) -> Path:
    """A model with a tokenizer and the chat template of both sides."""
    build_tiny_policy(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    half = shape["head_dim"] // 2
    sections = [half // 2, half // 4, half // 4]
    rope = ROPE | {"mrope_section": sections, "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=TEXT | shape | {"rope_parameters": rope, "vocab_size": VOCABULARY},
        vision_config=VISION | {"out_hidden_size": shape["hidden_size"]},
        tie_word_embeddings=False,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in MARKS.items()},
    )
    Qwen3VL(config).save_pretrained(folder)
    return folder


class Ours:
    """Rollout, reward, advantages, credit, packing and update, as `Trainer.step` calls them."""

    def __init__(self, folder: Path, script: Script) -> None:
        self.script, self.tool = script, Search(script)
        self.chat = ChatFormat(folder)
        self.policy = Policy(
            folder,
            settings=LearnerSettings(zero_stage=0, precision="fp32"),
            pixels=no_pictures,
        )
        self._objective = policy_gradient(
            partial(grpo, clip_low=CLIP, clip_high=CLIP, dual_clip=None), is_only_update=True
        )
        self._toolbox = Toolbox([self.tool], deadline_s=300.0)
        self._turns = [
            [self.chat.assistant(script.turn(n, t)) for t in range(TURNS + 1)]
            for n in range(script.count)
        ]

    def __call__(self, latency: float, credit: CreditAssigner) -> Step:
        """One step whose calls take `latency` [s]."""
        self.tool.latency, self.tool.calls = latency, 0
        wall, cpu = time.perf_counter(), time.process_time()
        played = self._play()
        asleep = (time.perf_counter() - wall) - (time.process_time() - cpu) if latency else 0.0
        trajectories, metrics = self._learn(played, credit)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if self.tool.calls != self.script.count * TURNS:
            raise SystemExit(f"ours ran {self.tool.calls} calls")
        loss, norm = (float(metrics[f"update/{name}"][0]) for name in ("loss", "grad_norm"))
        rows = sorted((tuple(t.tokens.tolist()), _trained(t)) for t in trajectories)
        return Step(wall_s=wall, busy_s=cpu + asleep, loss=loss, norm=norm, rows=rows)

    def _play(self) -> list[Group]:
        tasks = [
            Task(id=f"{i}", question=question, images=(), answers=(ANSWERS[i],))
            for i, question in enumerate(QUESTIONS)
        ]
        return collect(
            tasks,
            engine=TimedEngine(self._reply),
            chat=self.chat,
            toolbox=self._toolbox,
            system_prompt=SYSTEM,
            rollouts_per_task=self.script.rollouts,
            limits=Limits(max_turns=TURNS + 1, max_turn_tokens=200, max_tokens=8192),
            sampling=Sampling(),
            score=Scoring(REWARD, deadline_s=60.0),
        )

    def _reply(self, request: GenerationRequest) -> tuple[Any, float]:
        name, _, turn = request.id.rpartition(":")
        number = int(name.partition("/")[0]) * self.script.rollouts
        return self._turns[number + int(name.rpartition(".")[2])][int(turn)], 0.0

    def _learn(
        self, played: Sequence[Group], credit: CreditAssigner
    ) -> tuple[list[Trajectory], Any]:
        trajectories = [t for group in played for t in group.trajectories]
        names = [t.task.id for t in trajectories]
        advantages = group_advantages([t.scored().total for t in trajectories], names, eps=EPS)
        batch = Batch(
            trajectories=trajectories,
            question=[int(name) for name in names],
            advantages=Advantages(rows=advantages),
            trained=[True] * len(trajectories),
        )
        pairs = zip(trajectories, advantages, strict=True)
        result = credit([from_trajectory(t, float(a)) for t, a in pairs])
        (rows,) = rows_of_updates(batch, result, version=0, updates=1, questions=len(QUESTIONS))
        return trajectories, self.policy.update(pack(rows, budget_tokens=BUDGET), self._objective)


def _trained(trajectory: Trajectory) -> tuple[int, ...]:
    spans = [turn.span for turn in trajectory.turns]
    return tuple(i for span in spans for i in range(span.start, span.end))


class Peer:
    """`GRPOTrainer.training_step` with `tools=`, then clipping and AdamW as its loop does."""

    def __init__(self, folder: Path, script: Script, shape: Shape, scratch: Path) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        self.script, self._latency, self._turn, self.calls = script, 0.0, 0, 0
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.inputs = [
            {"prompt": _messages(question), "answer": answer}
            for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
            for _ in range(script.rollouts)
        ]
        self.trainer = GRPOTrainer(
            model=text_model(folder, TEXT | shape | {"vocab_size": VOCABULARY}),
            reward_funcs=_rewards,
            args=GRPOConfig(
                output_dir=str(scratch / "trl"),
                per_device_train_batch_size=script.count,
                num_generations=script.rollouts,
                max_completion_length=8192,
                **PEER_OPTIONS,
            ),
            train_dataset=Dataset.from_list(self.inputs),
            processing_class=tokenizer,
            tools=[self._tool()],
        )
        self.trainer._generate_single_turn = self._write
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.create_optimizer_and_scheduler(100)
        self._turns = [
            [
                [*tokenizer.encode(script.turn(n, t)), tokenizer.eos_token_id]
                for t in range(TURNS + 1)
            ]
            for n in range(script.count)
        ]

    def __call__(self, latency: float) -> Step:
        """One step whose calls take `latency` [s]."""
        trainer = self.trainer
        self._latency, self._turn, self.calls = latency, 0, 0
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.model.train()
        loss = trainer.training_step(trainer.model, list(self.inputs), None)
        norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if self.calls != self.script.count * TURNS:
            raise SystemExit(f"TRL ran {self.calls} calls")
        rows, self.padding = _unpadded(trainer._buffered_inputs[0])
        busy = cpu + self.calls * latency
        return Step(wall_s=wall, busy_s=busy, loss=float(loss), norm=float(norm), rows=rows)

    def _tool(self) -> Callable[[str], str]:
        # No return type: it would become part of the schema, which ours has not.
        def search(query: str):  # type: ignore[no-untyped-def]
            """Search.

            Args:
                query: What to look for.
            """
            self.calls += 1
            time.sleep(self._latency)
            return self.script.observation(query)

        return search

    def _write(self, prompts: list[Any], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        """The next turn of all trajectories: each has as many."""
        if len(prompts) != self.script.count:
            raise SystemExit(f"TRL asked for {len(prompts)} turns at turn {self._turn}")
        self._turn += 1
        return [list(turns[self._turn - 1]) for turns in self._turns], None


def _messages(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def _rewards(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """Correctness, and half a point for form, which every trajectory keeps."""
    found = [
        messages[-1]["content"].partition("<answer>")[2].partition("</answer>")[0]
        for messages in completions
    ]
    return [
        float(exact_match(text, (right,))) + 0.5 for text, right in zip(found, answer, strict=True)
    ]


def _unpadded(inputs: dict[str, torch.Tensor]) -> tuple[list[Any], float]:
    """Rows as `Step` has them, and the share of padding."""
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool()
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    silent = torch.zeros_like(inputs["prompt_mask"])
    trained = torch.cat([silent, inputs["tool_mask"]], dim=1)
    rows = sorted(
        (tuple(t[m].tolist()), tuple(torch.nonzero(s[m]).flatten().tolist()))
        for t, m, s in zip(tokens, mask, trained, strict=True)
    )
    return rows, float(1 - mask.float().mean())
