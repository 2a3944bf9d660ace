"""Every field a recipe can set: its unit, its range, and what the extremes mean.

The YAML files under `recipes/` are checked against these dataclasses before anything heavy
starts; `config.py` reads the files. Only plain values here: no torch, no hydra.
A field name is a promise to users: a field no recipe sets is deleted.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from tapo_train.algos.advantages import AdvantageKind, StdKind
from tapo_train.credit.gigpo import GiGPOOptions
from tapo_train.credit.options import TapoOptions

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
InnerFraction = Annotated[float, Field(gt=0, lt=1)]
OpenFraction = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Run:
    """Where the run lives, how long it is, what it saves."""

    dir: str
    """Run folder: recipe, manifest, metrics, dumps, checkpoints, export. Its last part names
    the run in wandb."""
    seed: CountOrZero = 0
    """Seeds question order, sampling and initialisation."""
    steps: Count = 100
    """Training steps; one step is one batch of questions."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: go on from the last checkpoint if there is one; never: refuse a folder that holds
    a run; must: refuse a folder that does not."""
    save_every: CountOrZero = 10
    """[steps] between checkpoints; 0: only at the end."""
    keep_last: Count = 2
    """Checkpoints kept; older ones are deleted."""
    eval_every: CountOrZero = 0
    """[steps] between validations; 0: none."""
    eval_questions: CountOrZero = 0
    """Validation questions asked each time, the first ones of the file; 0: all."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if logged in, else offline."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Model:
    """The policy that is trained."""

    path: str
    """Hugging Face folder of a Qwen2.5-VL or Qwen3-VL model. Pictures are resized as its
    preprocessor_config.json says (`size`, in pixels of area), in training and ever after."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of learner and engine. bfloat16 keeps float32 master weights in the optimizer."""
    freeze_vision: bool = True
    """Leave the vision tower as it is. (SenseNova-MARS trains so.)"""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Data:
    """Questions, and how many of them make a step."""

    train: tuple[str, ...] = Field(min_length=1)
    """Task files, read one after the other."""
    validation: tuple[str, ...] = ()
    """Task files; may be empty when run.eval_every is 0."""
    format: Literal["auto", "native", "fvqa", "livevqa"] = "auto"
    """auto: by the file's ending."""
    system_prompt: str = ""
    """Text of the system turn, before the tool schemas; empty: only the schemas."""
    questions_per_step: Count = 16
    """Over all ranks; a multiple of the number of ranks."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class VllmEngine:
    """Sampling by vLLM inside the training process, one engine per rank."""

    name: Literal["vllm"] = "vllm"
    kv_cache_gib: Count = 1
    """[GiB] of KV cache on CPU; CUDA devices use gpu_memory_utilization instead."""
    gpu_memory_utilization: OpenFraction = 0.45
    """Share of the device's memory for weights and KV cache; the learner has the rest."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class HfEngine:
    """Sampling by transformers' forward pass: the slow reference."""

    name: Literal["hf"] = "hf"


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Rollout:
    """How trajectories are sampled."""

    engine: VllmEngine | HfEngine = Field(default_factory=VllmEngine, discriminator="name")
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
    max_in_flight: Count = 64
    """Trajectories under way at a time on one rank."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Tools:
    """What the policy may call, and the indexes behind it."""

    names: tuple[Literal["image_zoom_in_tool", "text_search_tool", "image_search_tool"], ...] = (
        "image_zoom_in_tool",
        "text_search_tool",
        "image_search_tool",
    )
    """Empty: a policy without tools."""
    deadline_s: Positive = 30.0
    """[s] for one call; afterwards its outcome is `timeout`."""
    corpus: str | None = None
    """Documents of the text search (jsonl); needed by text_search_tool."""
    image_index: str | None = None
    """Titled pictures of the image search (jsonl); needed by image_search_tool."""
    text_top_k: Count = 3
    """Documents shown for a query."""
    image_top_k: Count = 3
    """Pictures shown for a picture."""
    max_observation_chars: Count = 8192
    """[characters] of text one observation may hold; the rest is cut and the cut is said."""
    min_crop_side: Count = 28
    """[px] a zoom into a region with a shorter side is refused, and the policy reads why."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class RewardWeights:
    """reward = accuracy_weight · accuracy + format_weight · format, both in [0, 1]."""

    accuracy_weight: NonNegative = 1.0
    """Of an answer equal to an accepted one after normalisation."""
    format_weight: NonNegative = 0.5
    """Of a non-empty <answer> with all calls readable; 0: format is not rewarded."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Advantage:
    """From rewards to one advantage per trajectory."""

    kind: AdvantageKind = "grpo"
    """grpo: (r − mean)/std of the group; mean_only: r − mean (Dr. GRPO); leave_one_out: minus
    the mean of the others (RLOO); reinforce_pp: (r − mean)/std of the whole batch;
    reinforce_pp_baseline: mean_only, then the same."""
    std: StdKind = "unbiased"
    """Unbiased divides by G − 1 (verl, TRL); population by G."""
    batch_renorm: bool = False
    """z-score over the batch afterwards (BN of SenseNova-MARS)."""
    drop_uniform_groups: bool = False
    """Leave groups whose rewards are all equal out of every token and sequence count."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class GrpoLoss:
    """Clipped surrogate; DAPO is clip_high 0.28 with token-mean."""

    name: Literal["grpo"] = "grpo"
    clip_low: InnerFraction = 0.2
    """Ratios below 1 − clip_low get no gradient where A < 0."""
    clip_high: Positive = 0.2
    """Ratios above 1 + clip_high get no gradient where A > 0."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """Ratio at which the loss is bounded where A < 0; null: never."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class GspoLoss:
    """Sequence ratio in the token form, so that per-step advantages stay with their step."""

    name: Literal["gspo"] = "gspo"
    clip_low: InnerFraction = 3e-4
    """As for GRPO, of the length-normalised sequence ratio, which is far closer to 1."""
    clip_high: Positive = 4e-4
    """As for GRPO, of the sequence ratio."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class SapoLoss:
    """Soft gate instead of a clip."""

    name: Literal["sapo"] = "sapo"
    tau_pos: Positive = 1.0
    """Steepness of the gate where A > 0; larger forgets off-policy tokens sooner."""
    tau_neg: Positive = 1.05
    """The same where A ≤ 0."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Kl:
    """Penalty for leaving the policy the run started from."""

    coef: NonNegative = 0.0
    """Only 0 so far: the losses have the penalty, runs do not load a reference policy yet."""
    estimator: Literal["k1", "abs", "k2", "k3", "k1+", "k3+"] = "k3"
    """A plus: value of that estimator with the gradient of k2 (straight-through)."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Importance:
    """Correction between sampler (engine) and learner log-probabilities."""

    level: Literal["token", "sequence"] = "token"
    """One weight per token, or the product over the trajectory."""
    mode: Literal["truncate", "mask", "off"] = "truncate"
    """truncate: weights are capped at the threshold; mask: beyond it the weight is 0."""
    threshold: Annotated[float, Field(gt=1)] = 2.0
    """Largest weight; mask also drops those below its inverse."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Algo:
    """From advantages to a loss."""

    advantage: Advantage = field(default_factory=Advantage)
    loss: GrpoLoss | GspoLoss | SapoLoss = Field(default_factory=GrpoLoss, discriminator="name")
    aggregation: Literal[
        "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
    ] = "token-mean"
    """How per-token losses become one number, with the counts of the whole update; the last
    divides by rollout.max_tokens (Dr. GRPO)."""
    kl: Kl = field(default_factory=Kl)
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus; 0: entropy is not computed."""
    importance: Importance = field(default_factory=Importance)


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class NoCredit:
    """Every step keeps its trajectory's advantage: the baseline."""

    name: Literal["none"] = "none"


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class TapoCredit(TapoOptions):
    """Credit transfer to tool steps of failing trajectories; the fields of `TapoOptions`."""

    name: Literal["tapo"] = "tapo"


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class GigpoCredit(GiGPOOptions):
    """Step-level advantages by equal states (arXiv 2505.10978); the fields of `GiGPOOptions`."""

    name: Literal["gigpo"] = "gigpo"


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Learner:
    """The optimizer, and how a batch becomes updates."""

    lr: Positive = 1e-6
    """Peak learning rate of AdamW."""
    warmup_updates: CountOrZero = 0
    """[updates] of linear rise to lr."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up; cosine falls to min_lr_ratio · lr at the last step."""
    min_lr_ratio: Fraction = 0.0
    """Where a cosine ends, as a share of lr."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of AdamW's running means of the gradient and of its square."""
    weight_decay: NonNegative = 0.0
    """Of AdamW, decoupled."""
    max_grad_norm: NonNegative = 1.0
    """The gradient is scaled down to this 2-norm; 0: never."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed: 0 shards nothing, 1 the optimizer, 2 gradients too, 3 parameters too."""
    offload_optimizer: bool = False
    """Keep optimizer states in the host's memory; needs zero_stage 1 or more."""
    micro_batch_tokens: Count = 16_384
    """[tokens] in one forward pass; a longer trajectory goes alone."""
    updates_per_batch: Count = 1
    """Optimizer updates a step's trajectories are dealt out to; 1: on-policy."""
    epochs: Count = 1
    """Passes over a step's trajectories."""
    gradient_checkpointing: bool = True
    """Compute activations twice and keep few: slower, far less memory."""
    old_logprobs: Literal["recompute", "engine"] = "recompute"
    """Where the ratio's denominator comes from; engine saves a forward pass and needs
    algo.importance.mode=off."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Probe:
    """One fixed prompt, scored by engine and learner after every weight sync."""

    tolerance: Positive = 0.05
    """[nats] largest difference of a token's log-probability; beyond it the run stops.
    float32 agrees to about 1e-5, bfloat16 to a few hundredths."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Sft:
    """The supervised warm start (`sft` subcommand); optimizer settings are `learner`'s."""

    worlds: Count = 8
    """Worlds demonstrated in, of the seeds first_world_seed, first_world_seed + 1, …"""
    first_world_seed: CountOrZero = 1000
    """Keep it away from the seeds of worlds used for training and evaluation."""
    questions_per_world: Count = 2000
    """Each is demonstrated once without and once with faults."""
    drills: tuple[tuple[Count, Count], ...] = ((1, 150), (2, 600), (4, 500), (6, 300))
    """Stages of copying drills: [names in the list, updates]; the lists should grow."""
    able_updates: CountOrZero = 4500
    """Updates on faultless demonstrations, which come first."""
    habit_updates: CountOrZero = 700
    """Updates on faulty ones, which set the habits training starts from."""
    trajectories_per_update: Count = 8
    """Demonstrations in one update, over all ranks."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights that are written at the end."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Recipe:
    """A whole experiment."""

    run: Run
    model: Model
    data: Data
    rollout: Rollout = field(default_factory=Rollout)
    tools: Tools = field(default_factory=Tools)
    reward: RewardWeights = field(default_factory=RewardWeights)
    algo: Algo = field(default_factory=Algo)
    credit: TapoCredit | NoCredit | GigpoCredit = Field(
        default_factory=TapoCredit, discriminator="name"
    )
    learner: Learner = field(default_factory=Learner)
    probe: Probe = field(default_factory=Probe)
    sft: Sft = field(default_factory=Sft)
