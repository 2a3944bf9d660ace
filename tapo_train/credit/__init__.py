"""The credit stage: which turn deserves how much of its trajectory's advantage."""

from tapo_train.credit.assigners import CreditAssigner, NoTransfer, Tapo
from tapo_train.credit.options import TapoOptions
from tapo_train.credit.result import CallAdvantage, CreditResult, StepRecord, token_advantages
from tapo_train.credit.steps import CreditCall, CreditRow, CreditStep, from_trajectory

__all__ = [
    "CallAdvantage",
    "CreditAssigner",
    "CreditCall",
    "CreditResult",
    "CreditRow",
    "CreditStep",
    "NoTransfer",
    "StepRecord",
    "Tapo",
    "TapoOptions",
    "from_trajectory",
    "token_advantages",
]
