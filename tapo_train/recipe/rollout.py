"""How trajectories are sampled."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from tapo_train.recipe.values import STRICT, Count, CountOrZero, Fraction, OpenFraction, Positive


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class VllmSettings:
    """Sampling by vLLM inside the training process, one engine per rank."""

    name: Literal["vllm"] = "vllm"
    kv_cache_gib: Count = 1
    """[GiB] of KV cache on CPU; CUDA devices use gpu_memory_utilization instead."""
    gpu_memory_utilization: OpenFraction = 0.45
    """Share of the device's memory for weights and KV cache; the learner has the rest."""
    tensor_parallel: Count = 1
    """Ranks that share one engine, for a model too large for one device; divides their number."""
    sleep_in_update: bool = False
    """Give that memory back while the learner learns, the weights as well: the next sync sends
    them anyway. GPU only."""
    picture_cache_gib: Positive = 4.0
    """[GiB] of processed pictures that each engine keeps in the host's memory; one of 1280 x 960
    pixels takes 29 MB. A picture that was thrown out is processed again."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class HfSettings:
    """Sampling by transformers' forward pass: the slow reference."""

    name: Literal["hf"] = "hf"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class ServerSettings:
    """Sampling by engine servers (`serve-engine`), here or on other machines.

    Trainer and servers share a secret in the environment variable TAPO_ENGINE_SECRET.
    """

    name: Literal["server"] = "server"
    urls: tuple[Annotated[str, Field(pattern=r"^https?://[^/\s@]+$")], ...]
    """One `http://host:port` per server. With as many servers as ranks each rank has its own."""
    weights: Literal["folder", "nccl", "ipc"] = "folder"
    """How new weights reach the servers: as files in weights_root, or between GPUs by vLLM's weight
    transfer, to other devices (nccl) or engines on the learner's own (ipc; loopback only)."""
    weights_root: str | None = None
    """The folder of weights=folder, which trainer and servers see under the same absolute path.
    null: `weights` in run.dir, for servers on this machine."""
    timeout_s: Positive = 60.0
    """[s] of silence, or of a hanging engine, after which a server is given up."""
    patience_s: Positive = 120.0
    """[s] to wait for all servers at the start, and later for one when none is left."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class DeadlineSettings:
    """When a training trajectory is late [s]; null is never.

    A late one is cut at the border of an observation, kept in the dumps with stop `deadline`,
    and leaves loss and baseline.
    """

    turn_s: Positive | None = None
    """[s] for one turn: waiting for the engine, sampling, and its tools."""
    trajectory_s: Positive | None = None
    """[s] for a trajectory, from its first request on."""
    step_s: Positive | None = None
    """[s] for all attempts at a question, from its beginning; where the rollout stands still for an
    update, that is not counted. Evaluation knows no such limit."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Rollout:
    """How trajectories are sampled."""

    engine: VllmSettings | HfSettings | ServerSettings = Field(
        default_factory=VllmSettings, discriminator="name"
    )
    rollouts_per_question: Count = 8
    """G, the group size; group-relative advantages need at least 2."""
    max_turns: Count = 10
    """Assistant turns; a trajectory that still calls a tool in the last one ends unanswered."""
    max_turn_tokens: Count = 1024
    """[tokens] sampled in one turn at most."""
    max_tokens: Count = 16_384
    """[tokens] of a whole trajectory: prompt, turns, observations and image tokens."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """Of training rollouts; 0 is greedy and leaves a group without differences. Evaluation is
    greedy whatever stands here."""
    max_parallel_calls: Count = 1
    """Tool calls of one turn that are run, side by side; further ones are recorded only."""
    max_failed_fraction: Fraction = 0.5
    """The run stops when more than this share of trajectories failed outside the policy (a tool
    timed out or broke; what a deadline cut is not counted), over the step and, where it is small,
    over those before it until there are 32. 1: never."""
    max_in_flight: Count | None = None
    """Trajectories under way at a time on one rank. null: 256 at first, then as many as the
    engine's KV cache holds of trajectories as long as those of the last rollouts, 32 to 256."""
    oversample: Annotated[float, Field(ge=1, le=4)] = 1.0
    """Times G attempts are started per question; the first G to finish are kept, the others
    aborted. Above 1 the slow tail costs no time, but short trajectories finish first: the
    policy is taught to be brief. 1 is off."""
    refill_rounds: CountOrZero = 0
    """Dynamic sampling: most further rounds of a step, in which questions whose trajectories all
    earned the same are replaced by the next ones. 0 is off. Each round has its own
    deadlines.step_s. Only with max_staleness=0."""
    max_staleness: CountOrZero = 0
    """S: the rollout goes on while the policy is updated, or from one update to the next, with the
    weights of the moment; no token is more than S updates old when it is trained. (S + 1) times
    questions_per_step questions are untrained at most; late ones are waited for, never thrown away.
    Above 0 algo.importance must name a correction. 0 is the synchronous run."""
    active_questions: Count | None = None
    """Questions under way at a time, over all ranks, of those that max_staleness admits. null:
    all of them."""
    deadlines: DeadlineSettings = field(default_factory=DeadlineSettings)
