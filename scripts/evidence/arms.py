"""What the study compares: worlds, arms (one way to train in one world) and the tables over them.

An arm has a name of its own, so that a run that several tables need is made once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tapo_train.demo.world.chains import Chains

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = ROOT / "recipes" / "chain_cpu.yaml"
RECORDS = ROOT / "docs" / "evidence" / "records"
"""RECORDS/ARM/seed_N.json, a few KB each, committed."""
PAGES = ROOT / "docs" / "evidence"
SCRATCH = ROOT / "runs" / "evidence"
"""Worlds and run folders; may be deleted at any time."""

SEEDS = (0, 1, 2, 3, 4)
WORLD_SEED = 1
WORLDS = {
    "chain": Chains(hops=(3, 3), text_only=True, syllables=1, late_failure=0.15),
    "misleading": Chains(
        hops=(3, 3), text_only=True, syllables=1, late_failure=0.15, misleading=0.4
    ),
    "lucky": Chains(hops=(3, 3), text_only=True, syllables=1, late_failure=0.15, values=2),
    "late": Chains(hops=(3, 3), text_only=True, syllables=1, late_failure=0.8),
    "long": Chains(hops=(5, 5), text_only=True, syllables=1, late_failure=0.15),
}
RATE = 3.0e-4
"""Of the recipe, from a first look with credit=none and seed 100: 1e-3 forgot how to search within
six steps, 3e-4 went from 0.41 to 0.75 in sixteen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to train."""

    name: str
    overrides: tuple[str, ...] = ()
    world: str = "chain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Arms beside each other, and which are tested against which."""

    title: str
    arms: tuple[Arm, ...]
    compared: tuple[tuple[str, str], ...] = ()
    """(arm, baseline) by name."""
    together: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()
    """Comparisons of several worlds as one: what it is called, and the (arm, baseline) of each."""


def _credit(name: str, *more: str, tag: str = "", world: str = "chain") -> Arm:
    label = "-".join(part for part in (world if world != "chain" else "", name, tag) if part)
    return Arm(name=label, overrides=(f"credit={name}", *more), world=world)


def _pairs(*pairs: tuple[Arm, Arm], title: str, together: str = "") -> Table:
    """Tables of (none, tapo) under several conditions; `together`: what all of them are called."""
    compared = tuple((treated.name, plain.name) for plain, treated in pairs)
    return Table(
        title=title,
        arms=tuple(arm for pair in pairs for arm in pair),
        compared=compared,
        together=((together, compared),) if together else (),
    )


def _pair(*more: str, tag: str = "", world: str = "chain") -> tuple[Arm, Arm]:
    return (
        _credit("none", *more, tag=tag, world=world),
        _credit("tapo", *more, tag=tag, world=world),
    )


NONE, TAPO = _pair()
_CONTROLS = tuple(_credit(name) for name in ("placebo", "shrink", "gigpo"))
_ABLATIONS = (
    _credit("tapo", "credit.use_support=false", tag="no-support"),
    _credit("tapo", "credit.use_clip=false", tag="no-clip"),
    _credit("tapo", "credit.beta=0.4", tag="beta-0.4"),
    _credit("tapo", "credit.theta=1", "credit.theta_by_tool={}", tag="theta-1"),
    _credit("tapo", "credit.alpha_min=0.5", tag="alpha-0.5"),
    _credit("tapo", "credit.correct_repeats=first", tag="first-repeat"),
)


_STAGES = ("none", "tapo", "placebo", "shrink")
_ELSEWHERE = tuple(_credit(name, world=world) for world in ("late", "long") for name in _STAGES)


def _in_three_worlds(stage: str, other: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    pairs = tuple((f"{world}{stage}", f"{world}{other}") for world in ("", "late-", "long-"))
    return f"{stage} − {other}, all three", pairs


_THREE_WORLDS = tuple(
    _in_three_worlds(*pair)
    for pair in (
        ("tapo", "none"),
        ("placebo", "none"),
        ("shrink", "none"),
        ("tapo", "placebo"),
        ("tapo", "shrink"),
    )
)


def _two_updates(loss: str) -> tuple[Arm, Arm]:
    return _pair(
        f"algo/loss={loss}",
        "algo.aggregation=token-mean",
        "learner.updates_per_batch=2",
        tag=f"{loss}-2",
    )


def _group(rollouts: int, questions: int) -> tuple[Arm, Arm]:
    return _pair(
        f"rollout.rollouts_per_question={rollouts}",
        f"data.questions_per_step={questions}",
        tag=f"group-{rollouts}",
    )


TABLES = {
    "credit": Table(
        title="Credit stages",
        arms=(NONE, TAPO, *_CONTROLS),
        compared=(
            *((arm.name, NONE.name) for arm in (TAPO, *_CONTROLS)),
            *((TAPO.name, control) for control in ("placebo", "shrink")),
        ),
    ),
    "rates": _pairs(
        _pair(f"learner.lr={RATE / 2}", tag="half-rate"),
        (NONE, TAPO),
        _pair(f"learner.lr={RATE * 2}", tag="double-rate"),
        title="Learning rate",
    ),
    "losses": _pairs(
        *(_two_updates(loss) for loss in ("grpo", "gspo", "sapo")),
        title="Losses, two updates per batch",
    ),
    "ablations": Table(
        title="Ablations of TAPO",
        arms=(TAPO, *_ABLATIONS),
        compared=tuple((arm.name, TAPO.name) for arm in _ABLATIONS),
    ),
    "controls": Table(
        title="The controls in three worlds",
        arms=(NONE, TAPO, *_CONTROLS[:2], *_ELSEWHERE),
        compared=tuple(pair for _, pairs in _THREE_WORLDS for pair in pairs),
        together=_THREE_WORLDS,
    ),
    "groups": _pairs(_group(4, 8), (NONE, TAPO), _group(16, 2), title="Group size"),
    "worlds": _pairs(
        (NONE, TAPO),
        _pair(world="late"),
        _pair(world="misleading"),
        _pair(world="lucky"),
        _pair(world="long"),
        _pair("tools.names=[]", "tools.extra=[moody_search:MoodySearch]", tag="moody"),
        title="Where it helps and where it hurts",
        together="tapo − none, all six",
    ),
}
"""By name, in the order in which they are run."""
