"""Every field a recipe can set: its unit, its range, and what the extremes mean.

The YAML files under `recipes/` are checked against these dataclasses before anything heavy
starts; `compose.py` reads the files. Only plain values here: no torch, no hydra.
A field name is a promise to users: a field nobody needs is deleted.
"""

from __future__ import annotations

from dataclasses import field

from pydantic import Field
from pydantic.dataclasses import dataclass

from tapo_train.recipe.algo import (
    Advantage,
    Algo,
    CispoLoss,
    GeometricImportance,
    GmpoLoss,
    GrpoLoss,
    GspoLoss,
    ImportanceChoice,
    Kl,
    MaskedImportance,
    NoImportance,
    SapoLoss,
    TotalVariationImportance,
    TruncatedImportance,
)
from tapo_train.recipe.credit import (
    GigpoCredit,
    NoCredit,
    PlaceboCredit,
    ShrinkCredit,
    TapoCredit,
)
from tapo_train.recipe.custom import Custom
from tapo_train.recipe.learner import Learner
from tapo_train.recipe.report import Report
from tapo_train.recipe.reward import (
    CallPenalty,
    CustomPart,
    EnvironmentPart,
    ExactMatch,
    InfoSeek,
    JudgePart,
    Maths,
    MultipleChoice,
    NumericMatch,
    Overlong,
    RewardSettings,
    Supported,
    TokenF1,
    WellFormed,
)
from tapo_train.recipe.rollout import (
    DeadlineSettings,
    HfSettings,
    Rollout,
    ServerSettings,
    VllmSettings,
)
from tapo_train.recipe.run import Data, Lora, Mixture, Model, Probe, Run
from tapo_train.recipe.services import (
    DenseSettings,
    LookAlikeSettings,
    PageSettings,
    ServiceSettings,
    SummarySettings,
)
from tapo_train.recipe.sft import Sft
from tapo_train.recipe.tools import McpServerSettings, ToolLimitSettings, Tools
from tapo_train.recipe.values import STRICT
from tapo_train.recipe.watch import WatchSettings

__all__ = [
    "DenseSettings",
    "LookAlikeSettings",
    "PageSettings",
    "ServiceSettings",
    "SummarySettings",
    "Advantage",
    "Algo",
    "CallPenalty",
    "CispoLoss",
    "Custom",
    "CustomPart",
    "Data",
    "DeadlineSettings",
    "ExactMatch",
    "GeometricImportance",
    "GigpoCredit",
    "EnvironmentPart",
    "GmpoLoss",
    "GrpoLoss",
    "GspoLoss",
    "HfSettings",
    "ImportanceChoice",
    "InfoSeek",
    "JudgePart",
    "Kl",
    "Learner",
    "Lora",
    "MaskedImportance",
    "Maths",
    "McpServerSettings",
    "Mixture",
    "Model",
    "MultipleChoice",
    "NoCredit",
    "NoImportance",
    "NumericMatch",
    "Overlong",
    "PlaceboCredit",
    "Probe",
    "Recipe",
    "Report",
    "RewardSettings",
    "Rollout",
    "Run",
    "SapoLoss",
    "ServerSettings",
    "Sft",
    "ShrinkCredit",
    "Supported",
    "TapoCredit",
    "TokenF1",
    "ToolLimitSettings",
    "Tools",
    "TotalVariationImportance",
    "TruncatedImportance",
    "VllmSettings",
    "WatchSettings",
    "WellFormed",
]


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Recipe:
    """A whole experiment."""

    run: Run
    model: Model
    data: Data
    rollout: Rollout = field(default_factory=Rollout)
    tools: Tools = field(default_factory=Tools)
    reward: RewardSettings = field(default_factory=RewardSettings)
    algo: Algo = field(default_factory=Algo)
    credit: TapoCredit | NoCredit | GigpoCredit | PlaceboCredit | ShrinkCredit | Custom = Field(
        default_factory=TapoCredit, discriminator="name"
    )
    learner: Learner = field(default_factory=Learner)
    probe: Probe = field(default_factory=Probe)
    watch: WatchSettings = field(default_factory=WatchSettings)
    report: Report = field(default_factory=Report)
    sft: Sft = field(default_factory=Sft)
