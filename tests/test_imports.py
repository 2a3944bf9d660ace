"""Rules of the source tree that no linter knows: layers, doors, sizes, broad excepts."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tapo_train"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = (
    {"errors", "import_path", "types"},
    {"algos", "credit", "data", "families", "tools"},
    {"learner", "report", "rewards", "rollout"},
    {"recipe"},
    {"evaluation", "training"},
    {"demo", "inspector", "systems"},
    {"build"},
    {"benchmarks", "collecting", "imitating", "runs"},
    {"commands", "__main__", "__init__"},
)
"""From the bottom up; a module imports its own layer and those below."""

DOORS = {
    "vllm": {
        "rollout/vllm_engine.py",
        "rollout/vllm_inputs.py",
        "rollout/servers/transfer.py",
    },
    "deepspeed": {"learner/engine.py"},
    # Whatever a policy or a page can name goes through `tools`, which judges each address. The
    # last asks the servers of the recipe alone, most of them private, and sends them the secret.
    "httpx": {"tools/connections.py", "tools/net.py"},
    "aiohttp": {"rollout/servers/client.py"},
    "hydra": {"recipe/compose.py"},
    "tantivy": {"tools/corpus_index.py"},
    "faiss": {"tools/vector_index.py"},
    # The servers of the recipe alone.
    "pymilvus": {"tools/milvus_store.py"},
    "opensearchpy": {"tools/opensearch_store.py"},
    "omegaconf": {"recipe/compose.py"},
    "wandb": {"report/wandb_sink.py"},
    "wandb_workspaces": {"report/wandb_workspace.py"},
    "rich": {"report/live_console.py"},
    "mcp": {"tools/mcp.py", "tools/mcp_answer.py"},
    "math_verify": {"rewards/maths.py"},
    # The second writes the invented videos.
    "av": {"tools/video_frames.py", "systems/invented_videos.py"},
}

FILE_LINES = 300
LONGER_FILES: dict[str, int] = {}

FUNCTION_LINES = 40
LONGER_FUNCTIONS: dict[str, int] = {}
"""`file:function` to lines, for functions that would be harder to read in parts."""

BROAD_EXCEPTS = {"rewards/scoring.py": 1, "tools/call.py": 1, "tools/threads.py": 1}
"""The boundaries of rewards and tools, which record what they caught, and a thread that hands it to
its waiter."""


def _name(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def _imported(file: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, wherever it stands in the file."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(file)}:{node.lineno} imports relatively"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _layer(part: str) -> int:
    for index, members in enumerate(LAYERS):
        if part in members:
            return index
    raise AssertionError(f"tapo_train/{part} has no place in LAYERS")


def _own_layer(file: Path) -> int:
    return _layer(file.relative_to(PACKAGE).parts[0].removesuffix(".py"))


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_imports_point_down(file: Path) -> None:
    parts = {name.split(".")[1] for name in _imported(file) if name.startswith("tapo_train.")}
    above = {part for part in parts if _layer(part) > _own_layer(file)}
    assert not above


@pytest.mark.parametrize("library", DOORS)
def test_a_heavy_library_is_imported_by_its_door_alone(library: str) -> None:
    users = {_name(file) for file in FILES if library in {n.split(".")[0] for n in _imported(file)}}
    assert users == DOORS[library]


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_a_file_is_short_enough_to_read(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LONGER_FILES.get(_name(file), FILE_LINES)


def _functions(file: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or 0) - _first_line(node) + 1


def _first_line(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Where the code begins: a docstring and the signature are not what makes code long."""
    body = node.body
    documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    return body[1 if documented and len(body) > 1 else 0].lineno


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_a_function_fits_on_a_screen(file: Path) -> None:
    long = {f"{_name(file)}:{name}": lines for name, lines in _functions(file)}
    limits = {key: LONGER_FUNCTIONS.get(key, FUNCTION_LINES) for key in long}
    assert not {key: lines for key, lines in long.items() if lines > limits[key]}


def _is_broad(handler: ast.ExceptHandler) -> bool:
    caught = [handler.type] if not isinstance(handler.type, ast.Tuple) else handler.type.elts
    return any(
        kind is None or (isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException"))
        for kind in caught
    )


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_exceptions_are_caught_broadly_only_at_the_named_boundaries(file: Path) -> None:
    handlers = [node for node in ast.walk(_tree(file)) if isinstance(node, ast.ExceptHandler)]
    assert sum(_is_broad(node) for node in handlers) <= BROAD_EXCEPTS.get(_name(file), 0)


def test_no_module_is_called_utils() -> None:
    vague = {"utils", "util", "helpers", "helper", "manager", "misc", "common"}
    assert not [_name(file) for file in FILES if vague & set(_name(file)[:-3].split("/"))]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["eval", "--help"],
        ["sft", "--help"],
        ["world", "--help"],
        ["analyze", "--help"],
        ["collect", "--help"],
        ["data", "--help"],
        ["doctor", "--help"],
        ["dashboard", "--dry-run"],
        ["index", "--help"],
        ["serve-search", "--help"],
        ["train", "recipes/demo_cpu.yaml", "--dry-run"],
    ],
    ids=" ".join,
)
def test_a_command_that_computes_nothing_loads_no_heavy_library(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from tapo_train.__main__ import main\n"
        "try:\n"
        "    code = main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    code = end.code\n"
        "heavy = {'torch', 'transformers', 'vllm', 'deepspeed', 'wandb'} & set(sys.modules)\n"
        "sys.exit(code or ', '.join(sorted(heavy)) or None)\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout
