"""`serve-engine`: a sampler in a process of its own."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path

from tapo_train.commands.recipe_arguments import OVERRIDES_HELP, quoted
from tapo_train.errors import ConfigError
from tapo_train.recipe.compose import load_recipe

DESCRIPTION = """\
Serve the engine of a recipe to training runs that have it in rollout.engine.urls
(rollout/engine=server). docs/engines.md says when that pays and what happens if a server dies.

The environment variable TAPO_ENGINE_SECRET must hold the secret that servers and trainer share.
Connections are authenticated, not encrypted: listen on another address than 127.0.0.1 only
where nobody else reads the network.
"""


def main(argv: Sequence[str]) -> None:
    """Serve until SIGTERM or SIGINT."""
    arguments = _parser().parse_intermixed_args(argv)
    words = [word for word in (arguments.recipe, *arguments.overrides) if word is not None]
    # With --model the recipe may be left out, and the first word be an override.
    named = words.pop(0) if words and ("=" not in words[0] or Path(words[0]).is_file()) else None
    recipe_file, overrides = recipe_and_overrides(named, arguments.model)
    recipe = load_recipe(recipe_file, [*overrides, *words])

    from tapo_train import build  # loads torch and vllm

    server = build.build_engine_server(
        recipe,
        build.build_chat(recipe),
        host=arguments.host,
        port=arguments.port,
        weights_root=Path(arguments.weights_root) if arguments.weights_root else None,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    host, port = server.address
    print(f"serving {recipe.model.path} on tcp://{host}:{port}", flush=True)
    server.serve()
    print("stopped", flush=True)


def recipe_and_overrides(recipe: str | None, model: str | None) -> tuple[Path, list[str]]:
    """The recipe to read, and the override that a model folder brings.

    Raises:
        ConfigError: neither says how the engine is to be set up.
    """
    beside = Path(model) / "recipe.yaml" if model is not None else None
    if recipe is None and (beside is None or not beside.is_file()):
        raise ConfigError(
            f"serve-engine: found no recipe{f' in {model}' if model else ''}; wanted RECIPE, or "
            "--model DIR with a recipe.yaml in it"
        )
    path = Path(recipe) if recipe is not None else beside
    assert path is not None
    return path, [] if model is None else [f"model.path={quoted(model)}"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tapo_train serve-engine",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", help="default: recipe.yaml in the --model folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    parser.add_argument("--model", metavar="DIR", help="Hugging Face folder; default model.path")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one and prints it")
    parser.add_argument(
        "--weights-root", metavar="DIR", help="folder for weights, shared with the trainer"
    )
    return parser
