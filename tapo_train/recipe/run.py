"""The run, its model, its data, its reward and its probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from tapo_train.recipe.custom import CustomOrPath
from tapo_train.recipe.values import (
    STRICT,
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    Positive,
)

Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Run:
    """Where the run lives, how long it is, what it saves."""

    dir: str = Field(pattern=r"\S")
    """Run folder: recipe, manifest, metrics, dumps, checkpoints, export. Its last part names
    the run in wandb."""
    seed: CountOrZero = 0
    """Seeds question order, sampling and initialisation."""
    steps: Count = 100
    """Training steps; one step is one batch of questions."""
    resume: Literal["auto", "never", "must", "previous_good"] = "auto"
    """auto: go on from the last checkpoint if there is one; never: refuse a folder that holds
    a run; must: refuse a folder that does not; previous_good: as auto, but from an older
    checkpoint where the last is damaged. The number of ranks, zero_stage, dtype and whatever
    the optimizer is told (lr, betas, schedule, ...) may differ from before: the recipe counts."""
    save_every: CountOrZero = 10
    """[steps] between checkpoints; 0: only at the end."""
    keep_last: Count = 2
    """Newest checkpoints kept; older ones are deleted."""
    keep_best: CountOrZero = 0
    """Checkpoints kept besides: those with the best validation accuracy, the newer one of
    equals. Needs save_every to be a multiple of eval_every."""
    eval_every: CountOrZero = 0
    """[steps] between validations; 0: none."""
    eval_questions: CountOrZero = 0
    """Validation questions asked each time, the first ones of the file; 0: all."""
    stall_s: NonNegative = 1800.0
    """[s] without progress on any rank (a stage begun, an engine step, a micro-batch, an answer of
    a tool) after which all ranks dump their Python stacks into the run folder and the run ends with
    status 3; three times as long while models are loaded, before the first step; 0: never."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if logged in and the server is there, else offline; online: or not at all."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Lora:
    """Low-rank adapters in place of training the weights. Engine and export get them merged in."""

    rank: CountOrZero = 0
    """Of the adapters; 0: none, the weights themselves are trained. Adapters want a learner.lr
    some ten times higher."""
    alpha: Positive = 32.0
    """The adapters' product is scaled by alpha / rank."""
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
    )
    """Linear layers that get one, by the end of their name; with freeze_vision=false those of
    the vision tower too."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Model:
    """The policy that is trained."""

    path: str
    """Hugging Face folder of a model of a known family (docs/models.md). Pictures are resized as
    its preprocessor_config.json says (`size`, in pixels of area), in training and ever after."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of learner and engine. bfloat16 keeps float32 master weights in the optimizer."""
    freeze_vision: bool = True
    """Leave the vision tower as it is. (SenseNova-MARS trains so.)"""
    lora: Lora = field(default_factory=Lora)
    call_reader: CustomOrPath | None = None
    """Reads what stands between `<tool_call>` and `</tool_call>`: `(body: str) -> (name,
    arguments)`, ValueError in words for the policy. None: the form the chat template asks for."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Mixture:
    """Which of the training questions are asked, how often, and in which order."""

    weights: Mapping[str, Share] = field(default_factory=dict)
    """By data source: the share of its questions, in (0, 1], that takes part in an epoch, drawn
    anew for each. Sources that are not named take part wholly."""
    needs_search: bool | None = None
    """Keep only questions that need a search, or only those that do not, as the data set says;
    where it says nothing they are kept. null: all."""
    pass_rates: str | None = None
    """A file of attempts: what `eval --repeats` wrote (attempts.jsonl), or a run's dump."""
    pass_rate: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Least and largest share of right attempts in pass_rates; [0.1, 0.9] leaves out what is never
    and what is always answered. Questions without attempts are kept."""
    easy_first: bool = False
    """The first epoch goes from what pass_rates says is answered most often to the least."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Data:
    """Questions, and how many of them make a step."""

    train: tuple[str, ...] = Field(min_length=1)
    """Task files, read one after the other."""
    validation: tuple[str, ...] = ()
    """Task files; may be empty when run.eval_every is 0."""
    format: Literal[
        "auto",
        "native",
        "fvqa",
        "livevqa",
        "livevqa_preview",
        "vision_deepresearch",
        "mmsearch",
        "mmsearch_plus",
        "infoseek",
        "simplevqa",
        "mat_search",
        "hr_mmsearch",
        "browsecomp_vl",
        "text_qa",
        "bird",
        "spider",
    ] = "auto"
    """Of the task files (docs/data.md); auto: told from the columns of the first row."""
    loader: CustomOrPath | None = None
    """Your own reader of the task files in place of format: (path) → tasks."""
    image_roots: tuple[str, ...] = ()
    """Folders that pictures may lie in besides the task file's own: relative paths are looked for
    there too, links and absolute paths may lead there."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """What becomes of rows that cannot be used (not readable, a damaged or missing picture, no room
    for an answer within rollout.max_tokens): refuse names them and starts nothing; drop leaves them
    out and says how many. All are looked for at the start."""
    system_prompt: str = ""
    """Text of the system turn, before the tool schemas; empty: only the schemas."""
    mixture: Mixture = field(default_factory=Mixture)
    questions_per_step: Count = 16
    """Over all ranks; a multiple of the number of ranks."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Probe:
    """One turn, scored by engine and learner after every weight sync; the run stops where they are
    two policies."""

    tolerance: Positive | None = None
    """[nat] largest mean difference of the log-probabilities of tokens that could be sampled; a
    tenth of them may differ by more than 4 times, one by up to 50 times as much. null: 0.001 in
    float32, which agrees to about 1e-5; 0.05 in bfloat16, which agrees to about 0.02."""
