"""Parts of one's own by import path: the examples of docs/examples, and what is refused."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from algos_batches import padded_batch
from loopback import Answering, served_by, url_of
from PIL import Image as Pillow
from test_rewards import trajectory

from tapo_train.algos.losses import TokenBatch
from tapo_train.algos.turn_advantages import RewardRow
from tapo_train.algos.weighted import cispo
from tapo_train.build.algo import build_advantage, build_credit, build_loss, is_over_groups
from tapo_train.build.custom import CustomSink, custom_loader, custom_reward, require_custom_parts
from tapo_train.credit.steps import CreditRow
from tapo_train.errors import ConfigError, DataError
from tapo_train.import_path import load, make
from tapo_train.learner.batch import TrainingRow, join, pack
from tapo_train.learner.dealing import deal_together
from tapo_train.recipe import Custom, CustomPart
from tapo_train.recipe.compose import Recipe, load_recipe
from tapo_train.rewards.reward import RewardFunction, Weighted
from tapo_train.rewards.scoring import Scoring
from tapo_train.types import Span, Task

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "recipes" / "demo_cpu.yaml"
EXAMPLES = [path.stem for path in (ROOT / "docs" / "examples").glob("*.py")]


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder of the examples is on the path, as the working directory would be."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(ROOT / "docs" / "examples")
    yield
    for name in set(sys.modules) - before:
        if name in set(EXAMPLES):
            del sys.modules[name]


def recipe(*overrides: str) -> Recipe:
    return load_recipe(DEMO, overrides)


# Parts for the tests below, as a user's module would hold them.
def flat(rows: list[RewardRow], *, scale: float) -> list[float]:
    return [scale * row.total for row in rows]


def halved(rows: list[CreditRow]) -> list[list[float]]:
    return [[row.advantage / 2] * row.num_turns for row in rows]


def two_tasks(path: Path, *, words: tuple[str, str]) -> list[Task]:
    return [
        Task(id=f"{path.name}.{word}", question=word, images=(), answers=(word,)) for word in words
    ]


def no_tasks(path: Path) -> list[str]:
    return ["nothing"]


def blocking(t: Any, *, worth: float) -> float:
    return worth


class Shifted:
    """A class is made with the arguments, and its instance is called."""

    def __init__(self, by: float = 0.0) -> None:
        self.by = by

    def __call__(self, rows: list[RewardRow]) -> list[float]:
        return [row.total + self.by for row in rows]


def test_the_loss_of_one_file_is_the_packages_own() -> None:
    padded = padded_batch([1.2, -0.8, 0.3, -1.5], per_token=True)
    chosen = recipe(
        "algo/loss=custom", "algo.loss.path=cispo:cispo", "algo.loss.arguments={clip_high: 1.0}"
    )
    require_custom_parts(chosen)
    ours, theirs = padded.logp.clone().requires_grad_(), padded.logp.clone().requires_grad_()
    example = build_loss(chosen)(padded.flat(ours)).per_token
    wanted = cispo(padded.flat(theirs), clip_high=1.0).per_token
    torch.testing.assert_close(example, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(example.sum(), ours), torch.autograd.grad(wanted.sum(), theirs)
    )
    assert not is_over_groups(chosen)


def regression(beta: float = 1.0) -> Any:
    chosen = recipe(
        "algo/loss=custom",
        "algo.loss.path=tapo_train.systems.deepvideo:reg_grpo",
        f"algo.loss.arguments={{beta: {beta}}}",
    )
    assert is_over_groups(chosen)
    return build_loss(chosen)


def token_batch(
    logp: torch.Tensor, rows: list[int], group: list[int], advantage: list[float]
) -> TokenBatch:
    index = torch.tensor([i for i, n in enumerate(rows) for _ in range(n)])
    return TokenBatch(
        logprobs=logp,
        old_logprobs=torch.zeros(len(index), dtype=torch.float64),
        advantages=torch.tensor(advantage, dtype=torch.float64)[index],
        trajectory=index,
        lengths=torch.tensor(rows),
        group=torch.tensor(group),
    )


def test_a_regression_couples_the_trajectories_of_a_question() -> None:
    logp = torch.tensor([0.1, 0.2, -0.4, 0.3, 0.5, -0.6], dtype=torch.float64).requires_grad_()
    batch = token_batch(logp, [2, 1, 3], [0, 1, 0], [1.0, 0.5, -1.0])
    loss = regression(2.0)(batch).per_token
    # Sums .3, -.4, .2 times 2; group 0 has mean (.6 + .4) / 2, group 1 is alone.
    wanted = [(0.6 - 0.5 - 1.0) ** 2, (0.0 - 0.5) ** 2, (0.4 - 0.5 + 1.0) ** 2]
    sums = torch.zeros(3, dtype=torch.float64).index_add(0, batch.trajectory, loss)
    assert sums.tolist() == pytest.approx(wanted)
    (slope,) = torch.autograd.grad(loss.sum(), logp)
    # d/ds_0 of the first and the third term: the mean moves by a half of each.
    own = 2 * 2.0 * (0.6 - 0.5 - 1.0) * 0.5 - 2 * 2.0 * (0.4 - 0.5 + 1.0) * 0.5
    assert slope.tolist() == pytest.approx([own, own, 0.0, -own, -own, -own])


def row(id: str, group: str, length: int) -> TrainingRow:
    return TrainingRow(
        id=id,
        tokens=np.ones(length, dtype=np.int32),
        images=(),
        spans=(Span(start=1, end=3),),
        advantages=np.zeros(2),
        sampler_logprobs=np.zeros(2, dtype=np.float32),
        group=group,
    )


def test_rows_of_a_group_share_a_micro_batch_where_the_loss_asks_for_it() -> None:
    rows = [row(f"{g}{i}", g, 5 + i) for i, g in itertools.product(range(3), "abc")]
    batches = pack(rows, budget_tokens=36, whole_groups=True)
    homes = [{name[0] for name in batch.row_ids} for batch in batches]
    assert sorted(itertools.chain(*homes)) == ["a", "b", "c"], "no group is in two micro-batches"
    assert all(batch.num_tokens <= 36 for batch in batches)
    for batch in batches:
        numbers = dict(zip(batch.row_ids, batch.group.tolist(), strict=True))
        assert len({n for name, n in numbers.items()}) == len({name[0] for name in numbers})
        assert all((numbers[x] == numbers[y]) == (x[0] == y[0]) for x in numbers for y in numbers)
    assert len(pack(rows, budget_tokens=10, whole_groups=True)) == 3, "a group is never cut"
    scattered = [{name[0] for name in b.row_ids} for b in pack(rows, budget_tokens=12)]
    assert len(scattered) > 3


def test_a_row_without_a_group_is_a_group_of_its_own() -> None:
    assert join(
        [row("x", "", 4), row("y", "g", 4), row("z", "", 4), row("w", "g", 4)]
    ).group.tolist() == [0, 1, 2, 1]


def test_ranks_deal_out_whole_groups_and_every_row_once() -> None:
    names = ["a", "b", "a", "", "b", "", "a"]
    dealt = deal_together(
        names,
        [3.0, 1.0, 2.0, 4.0, 1.0, 2.0, 1.0],
        [5] * 7,
        budget_tokens=15,
        num_ranks=2,
        home=[0, 1, 0, 0, 1, 1, 1],
    )
    batches = [batch for rank in dealt for batch in rank]
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert any({0, 2, 6} <= set(batch) for batch in batches)
    assert any({1, 4} <= set(batch) for batch in batches)


def test_an_advantage_of_one_file_is_the_place_among_the_attempts() -> None:
    advantage = build_advantage(recipe("algo.advantage.custom=ranked:ranked").algo.advantage)
    totals = [("a", 3.0), ("b", 9.0), ("a", 1.0), ("a", 1.0), ("b", 9.0)]
    rows = [RewardRow(group=group, total=total, tokens=(1,)) for group, total in totals]
    lost = RewardRow(group="a", total=0.0, tokens=(1,), left_out=True)
    assert advantage([*rows, lost]).rows.tolist() == [1.0, 0.0, -0.5, -0.5, 0.0, 0.0]


def test_a_credit_stage_of_one_file_blames_late_turns_most() -> None:
    chosen = recipe("credit=custom", "credit.path=late_blame:late_blame")
    require_custom_parts(chosen)
    rows = [
        CreditRow(id=name, group="g", correct=0.0, advantage=advantage, num_turns=3)
        for name, advantage in (("bad", -2.0), ("good", 1.0))
    ]
    found = build_credit(chosen)(rows).step_advantages
    assert [turns.tolist() for turns in found] == [[-0.5, -1.0, -2.0], [1.0, 1.0, 1.0]]


def test_a_data_set_of_one_file_has_pictures_and_several_answers(tmp_path: Path) -> None:
    Pillow.new("RGB", (8, 6), "red").save(tmp_path / "red.png")
    lines = "question,answer,picture\nWhich colour?,red|crimson,red.png\n"
    (tmp_path / "colours.csv").write_text(lines)
    (task,) = custom_loader(Custom(path="csv_tasks:csv_tasks"))(tmp_path / "colours.csv")
    assert (task.id, task.question, task.answers) == (
        "colours-0",
        "Which colour?",
        ("red", "crimson"),
    )
    assert (task.source, task.images[0].width, task.images[0].height) == ("colours", 8, 6)


class _Collector(Answering):
    bodies: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        body = self.body()
        self.bodies.append(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
        self.say(b"")


def test_metrics_go_to_a_collector_of_opentelemetry_by_one_file() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="comes with vLLM")
    from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as service

    with served_by(_Collector) as server:
        arguments = {"endpoint": f"{url_of(server)}/v1/metrics"}
        sink = CustomSink(Custom(path="otel_sink:OtelSink", arguments=arguments))
        sink.write(2, {"reward/mean": 0.5, "rollout/calls/text_search_tool": 3.0})
        sink.close()
    told = service.ExportMetricsServiceRequest.FromString(_Collector.bodies[0])
    (gauges,) = [scope.metrics for found in told.resource_metrics for scope in found.scope_metrics]
    values = {g.name: g.gauge.data_points[0] for g in gauges}
    assert values["reward/mean"].as_double == 0.5
    assert values["rollout/calls/text_search_tool"].as_double == 3.0
    assert values["step"].as_int == 2


def test_a_sink_may_be_a_mere_function() -> None:
    rows: list[tuple[int, Any]] = []
    sys.modules[__name__].__dict__["keep"] = lambda step, metrics: rows.append((step, metrics))
    sink = CustomSink(recipe(f"report.sink={__name__}:keep").report.sink)
    sink.write(4, {"reward/mean": 1.0})
    sink.close()
    assert rows == [(4, {"reward/mean": 1.0})]
    with pytest.raises(ConfigError, match=r"report\.sink: flat.* cannot be called as flat\(step"):
        require_custom_parts(recipe(f"report.sink={__name__}:flat"))


class _Grading(Answering):
    def do_POST(self) -> None:
        asked = json.loads(self.body())
        self.say({"grade": 0.75 if "please" in asked["answer"] else "rude"})


def test_the_judge_of_one_file_judges_and_leaves_out_what_it_cannot_judge() -> None:
    with served_by(_Grading) as server:
        arguments = {"url": f"{url_of(server)}/judge"}
        part = custom_reward(CustomPart(path="kind_judge:KindJudge", arguments=arguments))
        scoring = Scoring(RewardFunction(parts={"accuracy": Weighted(part=part)}), deadline_s=30.0)
        polite = asyncio.run(scoring(trajectory("<answer>please</answer>")))
        rude = asyncio.run(scoring(trajectory("<answer>no</answer>")))
    assert polite.scored().total == 0.75
    assert rude.reward is None and "gave 'rude'" in (rude.unscored or "")


def test_a_reward_that_blocks_runs_in_a_thread() -> None:
    part = custom_reward(CustomPart(path=f"{__name__}:blocking", arguments={"worth": 0.5}))
    assert asyncio.run(part(trajectory("x"))).value == 0.5


def test_advantage_credit_and_loader_of_ones_own_are_called_with_their_arguments() -> None:
    chosen = recipe(
        f"algo.advantage.custom={{path: '{__name__}:flat', arguments: {{scale: 2.0}}}}",
        "credit=custom",
        f"credit.path={__name__}:halved",
    )
    require_custom_parts(chosen)
    rows = [RewardRow(group="g", total=total, tokens=(1, 2)) for total in (1.0, -0.5)]
    assert build_advantage(chosen.algo.advantage)(rows).rows.tolist() == [2.0, -1.0]
    made = Custom(path=f"{__name__}:Shifted", arguments={"by": 1})
    shifted = build_advantage(
        recipe(
            f"algo.advantage.custom={{path: '{made.path}', arguments: {{by: 1}}}}"
        ).algo.advantage
    )
    assert shifted(rows).rows.tolist() == [2.0, 0.5]
    row = CreditRow(id="r", group="g", correct=0.0, advantage=-3.0, num_turns=2)
    assert build_credit(chosen)([row]).step_advantages[0].tolist() == [-1.5, -1.5]
    load_tasks = custom_loader(
        Custom(path=f"{__name__}:two_tasks", arguments={"words": ["up", "down"]})
    )
    assert [task.question for task in load_tasks(Path("f"))] == ["up", "down"]
    with pytest.raises(DataError, match="gave a str; wanted at least one Task"):
        custom_loader(Custom(path=f"{__name__}:no_tasks"))(Path("f"))


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("nowhere:f", {}, r"nowhere:f cannot be imported \(ModuleNotFoundError"),
        ("flat", {}, "found 'flat', wanted package.module:name"),
        (f"{__name__}:missing", {}, "AttributeError"),
        (f"{__name__}:ROOT", {}, "is no function and no class"),
        (
            f"{__name__}:flat",
            {},
            r"cannot be called as flat\(rows\): missing a required argument: 'scale'",
        ),
        (f"{__name__}:flat", {"scal": 1.0}, "'scal'|'scale'"),
        (
            f"{__name__}:flat",
            {"scale": "2"},
            r"arguments\.scale: found '2': Input should be a valid number",
        ),
        (f"{__name__}:Shifted", {"to": 1.0}, "unexpected keyword argument 'to'"),
        (f"{__name__}:TASK_LIKE", {}, "AttributeError"),
    ],
)
def test_what_cannot_be_called_as_the_run_will_call_it_is_refused_in_words(
    path: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(load(path, where="algo.x"), arguments, takes=("rows",), where="algo.x")


def test_all_parts_that_do_not_fit_are_told_at_once() -> None:
    chosen = recipe(
        f"algo.advantage.custom={__name__}:flat",
        "credit=custom",
        "credit.path=nowhere:credit",
        "tools.extra=[nowhere:tool]",
        "reward.parts.mine={name: custom, path: 'nowhere:reward'}",
    )
    with pytest.raises(ConfigError) as caught:
        require_custom_parts(chosen)
    said = str(caught.value)
    for where in ("algo.advantage.custom", "credit", "tools.extra", "reward.parts"):
        assert where in said
