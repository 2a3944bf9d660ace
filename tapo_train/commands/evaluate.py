"""`eval`: accuracy of a policy on a task file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from tapo_train.commands.recipe_arguments import OVERRIDES_HELP, quoted
from tapo_train.errors import ConfigError
from tapo_train.recipe.compose import load_recipe
from tapo_train.report.files import require_writable

DESCRIPTION = """\
Ask a policy every question of a task file (--tasks), greedily, and print its accuracy with a 95 %
confidence interval; or the questions of benchmarks (--benchmarks name=FILE,…), --repeats times
each, and write tables to --out DIR: pass@1, pass@k, each benchmark's own score, by searches needed,
by tools, turns and cost. An evaluation of benchmarks that was stopped goes on when the same command
is given again. --compare A B compares two such folders.

A question that failed outside the policy (its search was down) is not counted, and said; where
that is more than rollout.max_failed_fraction of them, there is no accuracy and the exit code is 2.

Prompt, tools and limits are those the policy was trained with: the recipe.yaml in its folder,
unless --recipe says another. Where the task file's folder holds a corpus.jsonl or an
image_index.jsonl, the search tools use these.
"""

_INDEXES = {"tools.corpus": "corpus.jsonl", "tools.image_index": "image_index.jsonl"}


def main(argv: Sequence[str]) -> None:
    """Evaluate and print."""
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.questions < 0:
        raise ConfigError(f"eval: --questions is {arguments.questions}; wanted 0 or more")
    if arguments.repeats < 1:
        raise ConfigError(f"eval: --repeats is {arguments.repeats}; wanted 1 or more")
    if arguments.compare:
        print(_comparison(*map(Path, arguments.compare)))
    elif arguments.benchmarks:
        print(_on_benchmarks(arguments))
    else:
        print(_on_tasks(arguments))


def _on_tasks(arguments: argparse.Namespace) -> str:
    model, tasks = _named(arguments, "model"), _named(arguments, "tasks")
    out = Path(arguments.out) if arguments.out else None
    if not tasks.exists():
        raise ConfigError(f"eval: --tasks {tasks} does not exist; wanted a task file")
    if out is not None and out.is_dir():
        raise ConfigError(f"eval: --out {out} is a folder; wanted a file to write")
    if out is not None:
        require_writable(out.parent, field="eval: --out")
    overrides = eval_overrides(model, tasks, arguments.overrides)
    recipe = load_recipe(_recipe(arguments), overrides)

    from tapo_train import benchmarks  # loads torch and vllm

    return benchmarks.evaluate_tasks(recipe, tasks, num_questions=arguments.questions, dump=out)


def _on_benchmarks(arguments: argparse.Namespace) -> str:
    out = _named(arguments, "out")
    model = None if arguments.endpoint else _named(arguments, "model")
    if arguments.endpoint and not (arguments.endpoint_model and arguments.recipe):
        raise ConfigError("eval: --endpoint wants --endpoint-model NAME and --recipe FILE as well")
    named = [one.partition("=") for one in arguments.benchmarks.split(",")]
    files = {name: Path(path) for name, _, path in named}
    absent = [f"{name}={path}" for name, path in files.items() if not name or not path.exists()]
    if absent or len(files) < len(named):
        raise ConfigError(
            f"eval: --benchmarks: found {absent or 'a name twice'}; wanted name=FILE,name=FILE,… "
            "of files that are there"
        )
    require_writable(out, field="eval: --out")
    overrides = eval_overrides(model, next(iter(files.values())), arguments.overrides)
    recipe = load_recipe(_recipe(arguments), overrides)

    from tapo_train import benchmarks, build  # loads torch and vllm
    from tapo_train.learner import distributed

    if "WORLD_SIZE" in os.environ:
        distributed.init(device=build.DEVICE)
    outside = arguments.endpoint and benchmarks.outside_player(
        build.Endpoint(
            url=arguments.endpoint,
            model=arguments.endpoint_model,
            key_variable=arguments.endpoint_key or "",
        )
    )
    return benchmarks.evaluate_benchmarks(
        recipe,
        [benchmarks.Benchmark(name, path) for name, path in files.items()],
        out=out,
        repeats=arguments.repeats,
        num_questions=arguments.questions,
        make_player=outside or benchmarks.local_player,
    )


def _comparison(first: Path, second: Path) -> str:
    """A line per benchmark that both folders hold."""
    from tapo_train.evaluation.attempts_file import read_attempts
    from tapo_train.evaluation.compare import compared

    held = [read_attempts(folder) for folder in (first, second)]
    names = [{attempt.benchmark for attempt in attempts} for attempts in held]
    shared = sorted(names[0] & names[1])
    if not shared:
        raise ConfigError(f"eval: --compare: {first} and {second} hold no benchmark in common")
    lines = []
    for name in shared:
        own = [[one for one in attempts if one.benchmark == name] for attempts in held]
        lines.append(f"{name}: {compared(*own)}")
    return "\n".join(lines)


def _named(arguments: argparse.Namespace, name: str) -> Path:
    value = getattr(arguments, name)
    if value is None:
        raise ConfigError(f"eval: found no --{name}; wanted --{name} PATH")
    return Path(value)


def _recipe(arguments: argparse.Namespace) -> Path:
    path = Path(arguments.recipe or Path(arguments.model) / "recipe.yaml")
    if not path.is_file():
        raise ConfigError(
            f"eval: {path} does not exist, so prompt and tools are unknown; wanted --recipe FILE"
        )
    return path


def eval_overrides(model: Path | None, tasks: Path, overrides: Sequence[str]) -> list[str]:
    """The user's overrides, after those that model and task file bring along."""
    folder = tasks if tasks.is_dir() else tasks.parent
    found = {key: folder / name for key, name in _INDEXES.items() if (folder / name).is_file()}
    implied = {**({} if model is None else {"model.path": model}), **found}
    return [*(f"{key}={quoted(value)}" for key, value in implied.items()), *overrides]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tapo_train eval",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--tasks", metavar="FILE", help="jsonl, parquet or json")
    parser.add_argument("--benchmarks", metavar="A=FILE,B=FILE", help="several, with tables")
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="K", help="attempts at a question of a benchmark"
    )
    parser.add_argument("--endpoint", metavar="URL", help="in place of --model: …/v1 of a server")
    parser.add_argument("--endpoint-model", metavar="NAME", help="as the server calls it")
    parser.add_argument(
        "--endpoint-key", metavar="VARIABLE", help="environment variable that holds its key"
    )
    parser.add_argument("--compare", nargs=2, metavar="DIR", help="two folders of --benchmarks")
    parser.add_argument("--recipe", metavar="FILE", help="default: recipe.yaml in the model folder")
    parser.add_argument(
        "--questions", type=int, default=0, metavar="N", help="ask only the first N; 0: all"
    )
    parser.add_argument("--out", metavar="PATH", help="where trajectories or tables go")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    return parser
