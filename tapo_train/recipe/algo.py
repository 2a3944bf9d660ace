"""From rewards to a loss."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from tapo_train.algos.advantages import AdvantageKind, StdKind
from tapo_train.algos.turn_advantages import TurnKind
from tapo_train.recipe.custom import Custom, CustomOrPath
from tapo_train.recipe.values import (
    STRICT,
    Fraction,
    InnerFraction,
    NonNegative,
    OpenFraction,
    Positive,
)


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Advantage:
    """From rewards to one advantage per trajectory."""

    custom: CustomOrPath | None = None
    """Your own in place of kind: (rows of all ranks) → an advantage per trajectory or turn."""
    kind: AdvantageKind | TurnKind = "grpo"
    """grpo: (r − mean)/std of the group; mean_only: r − mean (Dr. GRPO); leave_one_out: minus
    the mean of the others (RLOO); reinforce_pp: (r − mean)/std of the whole batch;
    reinforce_pp_baseline: mean_only, then the same. By turn, of what is earned from a turn on:
    returns_to_go: (R − mean)/std over all turns of the group; per_turn: over the group's rows at
    that turn; reinforce_pp_tokens: over all tokens of the batch."""
    gamma: Fraction = 1.0
    """Discount per turn of what is earned later, in the kinds by turn."""
    std: StdKind = "unbiased"
    """Unbiased divides by G − 1 (verl, TRL); population by G."""
    batch_renorm: bool = False
    """z-score over the batch afterwards (BN of SenseNova-MARS)."""
    drop_uniform_groups: bool = False
    """Leave groups whose rewards are all equal out of every token and sequence count."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class GrpoLoss:
    """Clipped surrogate; DAPO is clip_high 0.28 with token-mean."""

    name: Literal["grpo"] = "grpo"
    clip_low: InnerFraction = 0.2
    """Ratios below 1 − clip_low get no gradient where A < 0."""
    clip_high: Positive = 0.2
    """Ratios above 1 + clip_high get no gradient where A > 0."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """Ratio at which the loss is bounded where A < 0; null: never."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class GspoLoss:
    """Sequence ratio in the token form, so that per-step advantages stay with their step."""

    name: Literal["gspo"] = "gspo"
    clip_low: InnerFraction = 3e-4
    """As for GRPO, of the length-normalised sequence ratio, which is far closer to 1."""
    clip_high: Positive = 4e-4
    """As for GRPO, of the sequence ratio."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class SapoLoss:
    """Soft gate instead of a clip."""

    name: Literal["sapo"] = "sapo"
    tau_pos: Positive = 1.0
    """Steepness of the gate where A > 0; larger forgets off-policy tokens sooner."""
    tau_neg: Positive = 1.05
    """The same where A ≤ 0."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class CispoLoss:
    """REINFORCE with a bounded weight: no token loses its gradient (MiniMax-M1)."""

    name: Literal["cispo"] = "cispo"
    clip_low: OpenFraction = 1.0
    """Weights are at least 1 − clip_low; 1: small ones stay as they are."""
    clip_high: Positive = 0.28
    """Weights are at most 1 + clip_high."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class GmpoLoss:
    """Geometric mean of clipped token ratios, in token form."""

    name: Literal["gmpo"] = "gmpo"
    clip_low: Positive = 0.4
    """Log-ratios below −clip_low are held there where A ≤ 0."""
    clip_high: Positive = 0.4
    """Log-ratios above clip_high are held there where A > 0."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Kl:
    """Penalty for leaving the policy the run started from."""

    coef: NonNegative = 0.0
    """Weight of the penalty; 0: no reference policy is loaded. Above, model.path is loaded a
    second time, in model.dtype and without optimizer, sharded under learner.zero_stage=3."""
    estimator: Literal["k1", "abs", "k2", "k3", "k1+", "k3+"] = "k3"
    """A plus: value of that estimator with the gradient of k2 (straight-through)."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class TruncatedImportance:
    """Weights between sampler and learner, capped (truncated importance sampling)."""

    name: Literal["truncate"] = "truncate"
    level: Literal["token", "sequence"] = "token"
    """One weight per token, or the product over the trajectory."""
    high: Annotated[float, Field(ge=1)] = 2.0
    """Largest weight."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class MaskedImportance:
    """Weights, and 0 beyond both bounds (IcePop; by sequence: trajectories are rejected)."""

    name: Literal["mask"] = "mask"
    level: Literal["token", "sequence"] = "token"
    """As for truncate."""
    low: Fraction = 0.5
    """Smallest weight that is kept."""
    high: Annotated[float, Field(ge=1)] = 2.0
    """Largest weight that is kept."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class GeometricImportance:
    """Capped weights, and 0 for trajectories whose geometric mean of them is out of bounds."""

    name: Literal["geometric"] = "geometric"
    low: Fraction = 0.99
    """Smallest geometric mean of a trajectory's weights; the mean does not grow with length."""
    high: Annotated[float, Field(ge=1)] = 1.01
    """Largest one."""
    cap: Annotated[float, Field(ge=1)] = 2.0
    """Largest weight of a token of a trajectory that is kept."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class TotalVariationImportance:
    """DPPO: weights, and 0 where a token's probability has moved far from the sampler's."""

    name: Literal["total_variation"] = "total_variation"
    delta: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Change of probability, in the direction of the token's advantage, that stops it."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class NoImportance:
    """Weights of 1; the mismatch is measured all the same."""

    name: Literal["none"] = "none"


ImportanceChoice = (
    TruncatedImportance
    | MaskedImportance
    | GeometricImportance
    | TotalVariationImportance
    | NoImportance
)


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Algo:
    """From advantages to a loss."""

    advantage: Advantage = field(default_factory=Advantage)
    loss: GrpoLoss | GspoLoss | SapoLoss | CispoLoss | GmpoLoss | Custom = Field(
        default_factory=GrpoLoss, discriminator="name"
    )
    aggregation: Literal[
        "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
    ] = "token-mean"
    """How per-token losses become one number, with the counts of the whole update; the last
    divides by rollout.max_tokens (Dr. GRPO). `algo/loss=gspo`
    and `sapo` set seq-mean-token-mean."""
    kl: Kl = field(default_factory=Kl)
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus; 0: entropy is only estimated (rollout/entropy)."""
    importance: ImportanceChoice = Field(default_factory=TruncatedImportance, discriminator="name")
