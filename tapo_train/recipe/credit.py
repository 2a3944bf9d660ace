"""The credit stage: the options are its own dataclasses."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from tapo_train.credit.controls import PlaceboOptions, ShrinkOptions
from tapo_train.credit.gigpo import GiGPOOptions
from tapo_train.credit.options import TapoOptions
from tapo_train.recipe.values import STRICT


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class NoCredit:
    """Every step keeps its trajectory's advantage: the baseline."""

    name: Literal["none"] = "none"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class TapoCredit(TapoOptions):
    """Credit transfer to tool steps of failing trajectories; the fields of `TapoOptions`."""

    name: Literal["tapo"] = "tapo"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class GigpoCredit(GiGPOOptions):
    """Step-level advantages by equal states (arXiv 2505.10978); the fields of `GiGPOOptions`."""

    name: Literal["gigpo"] = "gigpo"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class PlaceboCredit(PlaceboOptions):
    """A control: TAPO's changes on random steps of failing trajectories; `PlaceboOptions`."""

    name: Literal["placebo"] = "placebo"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class ShrinkCredit(ShrinkOptions):
    """A control: all negative advantages smaller by as much as TAPO's; `ShrinkOptions`."""

    name: Literal["shrink"] = "shrink"
