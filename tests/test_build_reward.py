"""From a recipe's reward to judgements, and what is refused before anything starts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_rewards import call, trajectory
from test_rewards_parts import judging  # noqa: F401  # a fixture

from tapo_train.build.custom import require_custom_parts
from tapo_train.build.reward import build_scoring
from tapo_train.errors import ConfigError
from tapo_train.recipe.compose import load_recipe, recipe_to_show
from tapo_train.tools.ledger import Ledger
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Reward, Trajectory

DEMO = Path(__file__).resolve().parent.parent / "recipes" / "demo_cpu.yaml"


def judged(overrides: Sequence[str], met: Trajectory, ledger: Ledger) -> Reward:
    with ExitStack() as ending:
        toolbox = Toolbox([], deadline_s=1.0, ledger=ledger)
        scoring = build_scoring(load_recipe(DEMO, overrides), toolbox, ending)
        return asyncio.run(scoring(met)).scored()


def test_parts_of_a_recipe_are_judged_weighed_and_paid_for(
    judging: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "open sesame")
    ledger = Ledger()
    endpoint = f"http://127.0.0.1:{judging.server_address[1]}/v1"
    overrides = [
        "reward.parts.f1={name: token_f1, weight: 0.5}",
        "reward.parts.calls={name: call_penalty, weight: 0.25, free: 1}",
        "reward.parts.length={name: overlong, longest: 4, buffer: 2}",
        f"reward.parts.judged={{name: judge, endpoint: '{endpoint}', model: m, weight: 2.0}}",
        "reward.parts.judged.key_variable=JUDGE_KEY",
        "reward.parts.judged.limits.price=0.5",
        "reward.parts.format=null",
    ]
    met = trajectory("<answer>Velor Eiffel</answer>", calls=(call(), call()))
    reward = judged(overrides, met, ledger)
    assert reward.parts == {
        "accuracy": 0.0, "f1": 0.5, "calls": -1.0, "length": -1.0, "judged": 1.0,
    }  # fmt: skip
    assert reward.total == pytest.approx(0.5 * 0.5 - 0.25 - 1.0 + 2.0)
    assert reward.turns == (-0.25, 0.0)
    ((key, asked),) = judging.asked
    assert key == "Bearer open sesame" and (asked["model"], asked["temperature"]) == ("m", 0.0)
    assert float(ledger.spent) == 0.5


def test_the_data_source_chooses_the_parts() -> None:
    overrides = ["reward.by_source={web: {accuracy: {name: supported, weight: 3.0}}}"]
    met = trajectory("<answer>seen</answer>", calls=(call(),))
    assert judged(overrides, met, Ledger()).total == 0.5
    web = replace(met, task=replace(met.task, source="web"))
    assert judged(overrides, web, Ledger()).total == 3.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.parts.accuracy=null", "reward.parts: found accuracy, format, wanted a part named"),
        ("reward.by_source.x={format: {name: format}}", "reward.by_source.x: found format, wanted"),
        (
            "reward.parts.l={name: overlong, longest: 5, buffer: 6}",
            "reward.parts.l.buffer: found 6, wanted at most longest (5)",
        ),
        (
            "reward.parts.j={name: judge, endpoint: 'ftp://x', model: m}",
            "reward.parts.j.endpoint: found 'ftp://x', wanted http",
        ),
        (
            "reward.parts.j={name: judge, endpoint: 'http://x/v1', model: m, template: hm}",
            "reward.parts.j.template: found 'hm', wanted answer, support",
        ),
        ("reward.parts.j={name: jugde}", "found 'jugde', wanted one of 'exact_match', 'token_f1'"),
        ("reward.parts.format.weight=-1", "reward.parts.format.weight: found -1, wanted a number"),
    ],
)
def test_what_is_no_reward_is_refused_with_its_path(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(DEMO, [override])
    assert message in str(caught.value)


ENDPOINT = "https://x/v1?token=abcdefgh"
JUDGE = f"reward.parts.j={{name: judge, endpoint: '{ENDPOINT}', model: m, key_variable: NOT_SET}}"


def test_a_key_that_is_not_there_is_missed_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="NOT_SET"):
        require_custom_parts(load_recipe(DEMO, [JUDGE]))


def test_other_eyes_do_not_see_what_a_judges_address_may_hide() -> None:
    shown = recipe_to_show(load_recipe(DEMO, [JUDGE]))["reward"]["parts"]["j"]["endpoint"]
    assert shown == "https://x/v1?token=***"
