"""Commands in README and docs work as they stand there, or are marked as not run, with a reason.

A block is marked by a line `<!-- not run: … -->` above it. `train` is run with `--dry-run`; what
takes a policy or serves for ever is run by other tests, whose names stand here.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from inspected_run import RED_PNG, four_attempts, row_of, write_run

from tapo_train.__main__ import COMMANDS, main
from tapo_train.recipe.compose import load_recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^(<!-- not run: .+ -->\n)?```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = {"", "sh", "bash"}
PROGRAM = re.compile(r"^(?:\w+=\S+ )*(?:python|torchrun\b.*?) -m tapo_train (.*)$")

ELSEWHERE = {
    "collect": "test_collect.py collects",
    "data": "test_data_formats.py checks and prepares files",
    "eval": "test_evaluation.py evaluates files and benchmarks",
    "export": "test_learner_checkpoint.py exports",
    "serve-engine": "test_serve_engine.py starts servers",
    "serve-search": "test_search_server.py starts one",
    "sft": "test_training.py warms a policy up",
    "world": "test_world.py writes worlds",
    "doctor": "test_doctor.py runs all checks",
}
"""Commands that other tests run."""
NO_PROGRAM = re.compile(r"^(make|source|export|for|done|sbatch|wandb|pip|python scripts/|bash)\b")


def commands(page: Path) -> Iterator[str]:
    """Command lines of the blocks that are not marked, continued lines as one, without comments."""
    for marked, language, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        if marked or language not in SHELL:
            continue
        for line in body.replace("\\\n", " ").splitlines():
            text = re.sub(r"\s+#( .*)?$", "", line).strip().removesuffix(" &")
            if PROGRAM.match(text) or NO_PROGRAM.match(text):
                yield text


FOUND = list(dict.fromkeys((page.name, text) for page in PAGES for text in commands(page)))


def expanded(word: str) -> list[str]:
    """As the shell does it."""
    return sorted(map(str, Path().glob(word))) if "*" in word and "=" not in word else [word]


OURS = [(page, text) for page, text in FOUND if PROGRAM.match(text)]


def ranks_of(text: str) -> str:
    """How many a torchrun would start."""
    nodes, ranks = (re.search(rf"--{name} (\d+)", text) for name in ("nnodes", "nproc-per-node"))
    return str(int(nodes[1] if nodes else 1) * int(ranks[1] if ranks else 1))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages' commands name."""
    desk = tmp_path_factory.mktemp("desk")
    for name in ("recipes", "assets", "docs", "scripts"):
        (desk / name).symlink_to(ROOT / name)
    for name in ("demo", "a", "b", "c", "none", "paper"):
        run = write_run(desk / "runs" / name, [four_attempts()])
        recipe = {"run": {"dir": str(run), "steps": 1}, "credit": {"name": "tapo"}}
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (run / "manifest.json").write_text("{}")
        (run / "metrics.jsonl").write_text('{"step": 0, "time": 1.0, "reward/mean": 0.5}\n')
    rows = "".join(json.dumps(row_of(held)) + "\n" for held in four_attempts())
    (desk / "rollouts.jsonl").write_text(rows)
    passage = json.dumps({"id": "1", "contents": '"Tower"\nIt is high.'})
    (desk / "wiki-18.jsonl").write_text(passage + "\n")
    (desk / "photographs").mkdir()
    (desk / "photographs" / "red.png").write_bytes(RED_PNG)
    more = {"id": ["2"], "title": ["Tower"], "text": ["It is low."]}
    pyarrow.parquet.write_table(pyarrow.table(more), desk / "more.parquet")
    (desk / "data").mkdir()
    (desk / "notes").mkdir()
    (desk / "notes" / "one.txt").write_text("A note.")
    return desk


@pytest.mark.parametrize(("page", "text"), OURS, ids=[f"{p}: {t[:60]}" for p, t in OURS])
def test_a_command_of_the_docs_runs(
    page: str, text: str, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    monkeypatch.setenv("WORLD_SIZE", ranks_of(text))
    text = PROGRAM.match(text)[1]  # type: ignore[index]
    name, *arguments = shlex.split(text)
    assert name in COMMANDS, f"{page}: there is no command {name}"
    if name in ELSEWHERE or "--serve" in arguments:
        return
    arguments = [path for word in arguments for path in expanded(word)]
    if name == "train" and "--dry-run" not in arguments:
        arguments.append("--dry-run")
    assert main([name, *arguments]) == 0


def test_every_make_target_of_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"^(?:\w+=\S+ )*make ([a-z-]+)\b|`make ([a-z-]+)`", pages, re.MULTILINE))
    named = {word for pair in named for word in pair if word}
    assert {"demo", "test", "venv", "docs"} <= named <= targets


def test_a_recipe_that_the_docs_show_is_one(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    (shown,) = re.findall(r"```yaml\n# mine\.yaml.*?\n(.*?)```", page, re.DOTALL)
    for recipe in (ROOT / "recipes").iterdir():
        (tmp_path / recipe.name).symlink_to(recipe)
    (tmp_path / "mine.yaml").write_text(shown)
    made = load_recipe(tmp_path / "mine.yaml")
    assert (made.run.dir, made.algo.loss.name, made.credit.beta) == ("runs/mine", "gspo", 0.4)


def test_blocks_without_commands_of_ours_are_marked() -> None:
    loose = [
        f"{page.name}: {line}"
        for page in PAGES
        for marked, language, body in BLOCK.findall(page.read_text(encoding="utf-8"))
        if not marked and language in SHELL
        for line in body.splitlines()
        if re.match(r"(curl|hf|git|ln|rm|apt|docker) ", line)
    ]
    assert not loose
