"""From a recipe to the parts of a run: what a trajectory is worth."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

from tapo_train import recipe as recipes
from tapo_train.build.custom import custom_reward, key_of
from tapo_train.build.remote_tools import build_judge_client
from tapo_train.build.tools import replay_of, tool_limits
from tapo_train.errors import ConfigError
from tapo_train.recipe.compose import Recipe
from tapo_train.recipe.reward import RewardPart
from tapo_train.rewards import answers, penalties
from tapo_train.rewards.format import is_well_formed
from tapo_train.rewards.judge import GROUNDED, Judge, JudgeTool, template_text
from tapo_train.rewards.matching import exact_match
from tapo_train.rewards.maths import MathsVerifier
from tapo_train.rewards.official import infoseek_match
from tapo_train.rewards.reward import RewardFunction, Weighted
from tapo_train.rewards.score import Part, Rule, by_rule
from tapo_train.rewards.scoring import Scoring
from tapo_train.tools.ledger import Ledger
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Trajectory

__all__ = ["build_scoring"]


def build_scoring(recipe: Recipe, toolbox: Toolbox, ending: ExitStack) -> Scoring:
    """The reward of the recipe behind its boundary.

    Args:
        toolbox: the run's: whose ledger records and pays the calls of judges, and whose
            environments hold state.
        ending: closes what the parts keep open.
    """
    settings = recipe.reward
    made = partial(_weighted, recipe, toolbox, ending)
    reward = RewardFunction(
        parts=made("", settings.parts),
        by_source={source: made(source, parts) for source, parts in settings.by_source.items()},
    )
    return Scoring(reward, deadline_s=settings.deadline_s)


def _weighted(
    recipe: Recipe,
    toolbox: Toolbox,
    ending: ExitStack,
    source: str,
    parts: Mapping[str, RewardPart | None],
) -> dict[str, Weighted]:
    return {
        name: Weighted(
            part=_part(
                recipe, toolbox, ending, "_".join(filter(None, ("judge", source, name))), part
            ),
            weight=part.weight,
        )
        for name, part in parts.items()
        if part is not None
    }


def _part(recipe: Recipe, toolbox: Toolbox, ending: ExitStack, name: str, part: RewardPart) -> Part:
    """One part. `name` is that of its calls, if it makes any."""
    if isinstance(part, recipes.JudgePart):
        return _judge(recipe, toolbox.ledger, ending, name, part)
    if isinstance(part, recipes.EnvironmentPart):
        if toolbox.environments is None:
            raise ConfigError("reward.parts: found an environment part without tools.environment")
        return by_rule(partial(toolbox.environments.state, attribute=part.attribute))
    if isinstance(part, recipes.CustomPart):
        return custom_reward(part, ending)
    if isinstance(part, recipes.Maths):
        verifier = MathsVerifier()
        ending.callback(verifier.close)
        return verifier
    return by_rule(_rule(part))


def _rule(part: RewardPart) -> Rule:
    """A part that only computes."""
    match part:
        case recipes.TokenF1():
            return lambda t: answers.token_f1(t.answer, t.task.answers)
        case recipes.NumericMatch(relative=relative, absolute=absolute, overlap=overlap):
            meets = partial(
                answers.numeric_match, relative=relative, absolute=absolute, overlap=overlap
            )
            return lambda t: meets(t.answer, t.task.answers)
        case recipes.InfoSeek():
            return _infoseek
        case recipes.MultipleChoice():
            return lambda t: answers.choice_match(t.answer, t.task.answers)
        case recipes.WellFormed():
            return is_well_formed
        case recipes.Overlong(longest=longest, buffer=buffer):
            punished = partial(penalties.overlong, longest=longest, buffer=buffer)
            return lambda t: punished(penalties.sampled_tokens(t))
        case recipes.CallPenalty(count=count, free=free):
            return partial(penalties.call_penalty, count=count, free=free)
        case recipes.Supported():
            return penalties.is_supported
        case _:
            return lambda t: exact_match(t.answer, t.task.answers)


def _infoseek(trajectory: Trajectory) -> bool:
    task = trajectory.task
    kind = str(task.metadata.get("question_type", ""))
    return infoseek_match(trajectory.answer, task.answers, question_type=kind)


def _judge(
    recipe: Recipe, ledger: Ledger, ending: ExitStack, name: str, part: recipes.JudgePart
) -> Judge:
    tool = JudgeTool(
        name,
        build_judge_client(recipe, part, key=key_of(part)),
        endpoint=part.endpoint,
        model=part.model,
        with_images=part.with_images,
        options=part.options,
    )
    toolbox = Toolbox(
        [tool],
        deadline_s=recipe.reward.deadline_s,
        limits={name: tool_limits(part.limits)},
        ledger=ledger,
        replay=replay_of(recipe),
    )
    ending.callback(toolbox.close)
    return Judge(
        toolbox=toolbox,
        name=name,
        template=template_text(part.template),
        exact_first=part.exact_first and part.template not in GROUNDED,
    )
