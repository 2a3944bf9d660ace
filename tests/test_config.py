"""Recipes: what is read, what is refused, and in which words."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tapo_train.errors import ConfigError
from tapo_train.recipe.compose import (
    GROUPS,
    Recipe,
    batch_arithmetic,
    load_recipe,
    recipe_from_dict,
    recipe_to_dict,
    to_yaml,
)
from tapo_train.recipe.problems import known_paths

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
RUNNABLE = [path for path in RECIPES if path.stem != "base"]
CHOICES = [
    f"{group}={file.stem}"
    for group in GROUPS
    for file in sorted((ROOT / "recipes" / group).glob("*.yaml"))
]
DEMO = ROOT / "recipes" / "demo_cpu.yaml"
MOST_FIELDS = 175

MINIMAL: dict[str, Any] = {
    "run": {"dir": "runs/x"},
    "model": {"path": "m"},
    "data": {"train": ["t.jsonl"]},
    "tools": {"names": []},
}


def refusal(*overrides: str, recipe: Path = DEMO) -> str:
    """The message that refuses these overrides."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_read(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.run.dir == f"runs/{path.stem.removesuffix('_cpu')}"
    assert batch_arithmetic(recipe, 1)


@pytest.mark.parametrize("model", ["warm_start", "chain_warm_start"])
def test_the_recipe_in_the_folder_of_a_shipped_model_is_read(model: str) -> None:
    recipe = load_recipe(ROOT / "assets" / model / "recipe.yaml")
    assert set(recipe.reward.parts) == {"accuracy", "format"}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_group_choice_is_read_and_taken(choice: str) -> None:
    group, name = choice.split("=")
    own = [f"{group.replace('/', '.')}.path=mine:part"] if name == "custom" else []
    part: Any = recipe_to_dict(load_recipe(DEMO, [choice, *own]))
    for key in group.split("/"):
        part = part[key]
    written = (ROOT / "recipes" / group / f"{name}.yaml").read_text()
    assert f"{part.get('name') or part['kind']}" in written


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_the_resolved_recipe_is_a_recipe_of_the_same_run(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, ["run.seed=7"])
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(to_yaml(recipe))
    assert load_recipe(resolved) == recipe


def test_the_resolved_recipe_says_every_field() -> None:
    def leaves(part: Any) -> int:
        return sum(
            leaves(value) if is_dataclass(value) else 1
            for value in (getattr(part, item.name) for item in fields(part))
        )

    assert len(known_paths(recipe_to_dict(load_recipe(DEMO)))) == leaves(load_recipe(DEMO))


def test_a_prompt_with_a_dollar_sign_survives_the_resolved_recipe(tmp_path: Path) -> None:
    content = {**MINIMAL, "data": {"train": ["t"], "system_prompt": "costs ${5}\nor $6"}}
    recipe = recipe_from_dict(content)
    (tmp_path / "r.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "r.yaml").data.system_prompt == "costs ${5}\nor $6"


def test_a_recipe_outside_the_repository_builds_on_the_shipped_base(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "defaults: [base, override credit: none, _self_]\n"
        "run: {dir: r}\nmodel: {path: m}\ndata: {train: [t.jsonl]}\ntools: {names: []}\n"
    )
    recipe = load_recipe(mine, ["algo/loss=sapo"])
    assert (recipe.credit.name, recipe.algo.loss.name) == ("none", "sapo")


def test_a_group_choice_replaces_the_fields_of_the_other() -> None:
    assert "tau_neg" in recipe_to_dict(load_recipe(DEMO, ["algo/loss=sapo"]))["algo"]["loss"]
    assert "algo.loss.tau_neg: unknown key" in refusal("algo.loss.tau_neg=2")


def test_a_loss_comes_with_the_aggregation_of_its_paper_unless_another_is_said() -> None:
    paper = {
        "grpo": "token-mean",
        "dapo": "token-mean",
        "gspo": "seq-mean-token-mean",
        "sapo": "seq-mean-token-mean",
        "cispo": "token-mean",
        "gmpo": "seq-mean-token-mean",
    }
    for name, aggregation in paper.items():
        assert load_recipe(DEMO, [f"algo/loss={name}"]).algo.aggregation == aggregation
    said = load_recipe(DEMO, ["algo/loss=gspo", "algo.aggregation=seq-mean-token-sum"])
    assert (said.algo.loss.name, said.algo.aggregation) == ("gspo", "seq-mean-token-sum")
    assert said.algo.loss.clip_high == 4e-4


def test_recipes_stay_small() -> None:
    assert len(known_paths({})) <= MOST_FIELDS


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.lrr=3", "learner.lrr: unknown key; did you mean learner.lr?"),
        ("lerner.lr=3", "lerner.lr: unknown key; did you mean learner.lr?"),
        ("beta=3", "beta: unknown key; did you mean credit.beta?"),
        ("learner.temperature=1", "did you mean rollout.temperature?"),
        ("learner.lr=abc", "learner.lr: found 'abc', wanted a number"),
        ("learner.lr=0", "learner.lr: found 0, wanted a number greater than 0"),
        ("rollout.max_turns=2.5", "rollout.max_turns: found 2.5, wanted an integer"),
        ("rollout.max_turns=true", "rollout.max_turns: found True, wanted an integer"),
        ("learner.zero_stage=4", "found 4, wanted a number less than or equal to 3"),
        ("data.train=t.jsonl", "data.train: found 't.jsonl', wanted a list"),
        ("data.train=[]", "data.train: found [], wanted a list of at least one"),
        ("tools.names=[zoom]", "tools.names.0: found 'zoom', wanted 'image_zoom_in_tool'"),
        ("credit.beta=-1", "credit.beta"),
        ("probe.atol=1", "probe.atol: unknown key; known: probe.tolerance"),
        ("credit.success_rule=bth", "found 'bth', wanted 'both', 'outcome' or 'advantage'"),
        ("model.path=null", "model.path: found None, wanted a string"),
        ("algo.loss=gspo", "algo.loss: found 'gspo', wanted a section; its choices are made by"),
        (
            "algo/loss=gpso",
            "algo/loss: found 'gpso', wanted one of cispo, custom, dapo, gmpo, grpo, gspo, sapo",
        ),
        ("algo/los=gspo", "unknown group algo/los; did you mean algo/loss?"),
        ("learner.lr=1,2", "found several values, wanted one"),
        ("learner.lr", "wanted dotted.path=value"),
        ("run.dir=runs/实验", """stands in quotes, in a shell as "run.dir='runs/实验'\""""),
        ("model.path=~/models/x", """in a shell as "model.path='~/models/x'\""""),
        ("run.dir=runs/lr=1e-6", """in a shell as "run.dir='runs/lr=1e-6'\""""),
        ("data.system_prompt=Say <answer>", "data.system_prompt='Say <answer>'"),
        ("run.dir=it's $x", r"run.dir='it\'s \$x'"),
        ("watch.stop_on=[kl_growing]", "'kl_growing' with algo.kl.coef=0, wanted a reference"),
        ("learner.lr=${learner.peak}", "learner.peak"),
        ("learner.lr=nan", "learner.lr"),
    ],
)
def test_a_wrong_override_is_refused_with_path_found_and_wanted(
    override: str, message: str
) -> None:
    assert message in refusal(override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.max_turn_tokens=2000"], "wanted at most rollout.max_tokens (1024)"),
        (["data.validation=[]"], "data.validation: found no file, wanted one because"),
        (["rollout.rollouts_per_question=1"], "wanted at least 2 because"),
        (
            ["watch.stop_on=[tool_use_dyin]"],
            "found 'tool_use_dyin', wanted names of signs; did",
        ),
        (
            [
                "watch.stop_on=[engine_drifting]",
                "learner.old_logprobs=engine",
                "algo/importance=none",
            ],
            "watch.stop_on: found 'engine_drifting' with learner.old_logprobs=engine",
        ),
        (["learner.old_logprobs=engine"], "algo.importance: found truncate, wanted none"),
        (["learner.old_logprobs=log_linear"], "learner.old_logprobs: found log_linear, wanted"),
        (["learner.offload_optimizer=true", "learner.zero_stage=0"], "learner.zero_stage"),
        (["learner.offload_parameters=true", "learner.zero_stage=2"], "learner.zero_stage"),
        (["learner.offload_in_rollout=true", "learner.zero_stage=3"], "learner.zero_stage"),
        (
            [
                "learner.offload_in_rollout=true",
                "learner.offload_optimizer=true",
                "learner.zero_stage=2",
            ],
            "learner.offload_in_rollout",
        ),
        (["learner.betas=[0.9,1.0]"], "learner.betas.1: found 1.0, wanted a number less than 1"),
        (["learner.betas=[-0.1,0.9]"], "learner.betas.0: found -0.1, wanted a number greater"),
        (["learner.updates_per_batch=3"], "wanted a divisor of data.questions_per_step (16)"),
        (["tools.corpus=null"], "tools.corpus: found nothing, wanted a file"),
        (["tools.image_index=null"], "tools.image_index: found nothing, wanted a file"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(overrides: list[str], message: str) -> None:
    assert message in refusal(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.max_turn_tokens=1024"],
        ["data.validation=[]", "run.eval_every=0"],
        ["rollout.rollouts_per_question=2"],
        ["rollout.rollouts_per_question=1", "algo/advantage=reinforce_pp"],
        ["learner.old_logprobs=engine", "algo/importance=none"],
        ["learner.old_logprobs=engine", "algo/importance=total_variation"],
        ["learner.old_logprobs=log_linear", "learner.updates_per_batch=2"],
        ["learner.updates_per_batch=4"],
        ["tools.image_index=null", "tools.names=[text_search_tool]"],
    ],
    ids=" ".join,
)
def test_fields_that_just_fit_together_are_taken(overrides: list[str]) -> None:
    assert load_recipe(DEMO, overrides)


def test_all_problems_of_a_recipe_are_told_at_once() -> None:
    lines = refusal("learner.lr=-1", "run.sedd=1").splitlines()
    assert lines[0].endswith("demo_cpu.yaml:")
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["run.sedd", "learner.lr"]


def test_a_missing_section_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model: found nothing, wanted a value"):
        recipe_from_dict({key: value for key, value in MINIMAL.items() if key != "model"})


def test_a_missing_file_names_those_that_exist() -> None:
    assert "recipes/demo_cpu.yaml" in refusal(recipe=ROOT / "recipes" / "no.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'run: !!python/object/apply:os.system ["touch pwned"]', "could not determine a const"),
        (b"run: [1", "while parsing a flow sequence"),
        (b"\xff\xfe\x00", "'utf-8' codec can't decode"),
        (b"run: {dir: a, dir: b}", "found duplicate key dir"),
        (b"run: " + b"[" * 20_000, "recursion"),
    ],
)
def test_a_file_that_is_no_plain_yaml_is_refused_in_one_message(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "stranger.yaml"
    recipe.write_bytes(content)
    for overrides in ([], ["algo/loss=gspo"]):
        found = refusal(*overrides, recipe=recipe)
        assert found.startswith(f"recipe {recipe}: ") and message in found
        assert found.endswith("; wanted YAML of plain values")
    assert [path.name for path in tmp_path.iterdir()] == ["stranger.yaml"]


def test_a_recipe_may_read_the_environment_but_no_secret_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TAPO_PLACE", "/data")
    monkeypatch.setenv("SOME_API_KEY", "hunter2")
    monkeypatch.delenv("TAPO_NOWHERE", raising=False)
    assert load_recipe(DEMO, ["run.dir=${oc.env:TAPO_PLACE}/x"]).run.dir == "/data/x"
    assert load_recipe(DEMO, ["run.dir=${oc.env:TOKENIZER_DIR,there}"]).run.dir == "there"
    assert load_recipe(DEMO, ["run.dir=${oc.env:TAPO_NOWHERE,here}"]).run.dir == "here"
    assert "TAPO_NOWHERE" in refusal("run.dir=${oc.env:TAPO_NOWHERE}")
    found = refusal("tools.text_endpoint=https://example.org/${oc.env:SOME_API_KEY}")
    assert "${oc.env:SOME_API_KEY} looks like a secret" in found and "hunter2" not in found


def test_an_installed_package_holds_the_shipped_recipes(tmp_path: Path) -> None:
    for name in ("tapo_train", "recipes"):
        shutil.copytree(
            ROOT / name, tmp_path / name, symlinks=True,
            ignore=shutil.ignore_patterns("*.py", "__pycache__"),
        )  # fmt: skip
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tapo_train" / "__init__.py").write_text('__version__ = "0"\n')
    code = "import setuptools.build_meta as b; b.build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if "recipes" in name}
    files = (ROOT / "recipes").rglob("*.yaml")
    assert packed == {f"tapo_train/shipped_{path.relative_to(ROOT)}" for path in files}


def test_a_group_cannot_be_chosen_in_a_resolved_recipe(tmp_path: Path) -> None:
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(to_yaml(load_recipe(DEMO)))
    assert "has no defaults list" in refusal("credit=none", recipe=resolved)


def sized(**changes: int) -> Recipe:
    """16 questions × 8 rollouts of at most 1000 tokens, 4000 tokens per micro-batch."""
    recipe = recipe_from_dict(MINIMAL)
    learner = {"micro_batch_tokens": 4000, "updates_per_batch": 2, "epochs": 1, **changes}
    return replace(
        recipe,
        rollout=replace(recipe.rollout, max_turn_tokens=100, max_tokens=1000),
        learner=replace(recipe.learner, **learner),
    )


@pytest.mark.parametrize(
    ("changes", "world_size", "sentence"),
    [
        ({}, 1, "at most 16 micro-batches × 1 ranks × 2 updates (64 trajectories"),
        ({}, 2, "at most 8 micro-batches × 2 ranks × 2 updates (32 trajectories"),
        ({"epochs": 3}, 2, "at most 8 micro-batches × 2 ranks × 6 updates (32 trajectories"),
        ({"updates_per_batch": 1}, 16, "at most 2 micro-batches × 16 ranks × 1 updates (8 "),
        ({"micro_batch_tokens": 3000}, 1, "at most 22 micro-batches × 1 ranks × 2 updates (64 "),
        ({"updates_per_batch": 64}, 4, "at most 1 micro-batches × 4 ranks × 64 updates (1 "),
        ({"micro_batch_tokens": 999}, 1, "at most 64 micro-batches × 1 ranks × 2 updates (64 "),
    ],
)
def test_the_batch_arithmetic_adds_up(
    changes: dict[str, int], world_size: int, sentence: str
) -> None:
    text = batch_arithmetic(sized(**changes), world_size)
    assert text.startswith("16 questions × 8 rollouts = 128 trajectories → ")
    assert sentence in text


def test_questions_that_do_not_divide_over_the_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"found 16 on 3 ranks, wanted a multiple of 3"):
        batch_arithmetic(sized(), 3)
