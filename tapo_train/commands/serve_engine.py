"""`serve-engine`: a sampler in a process of its own."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from tapo_train.commands.recipe_arguments import OVERRIDES_HELP, quoted
from tapo_train.errors import ConfigError
from tapo_train.recipe.compose import load_recipe

DESCRIPTION = """\
Start vLLM's server with what a recipe implies, for training runs that have its address in
rollout.engine.urls (rollout/engine=server). docs/engines.md says when that pays and what happens
if a server dies.

The environment variable TAPO_ENGINE_SECRET must hold the secret that servers and trainer share;
every path of the server asks for it. It travels unencrypted: listen on another address than
127.0.0.1 only where nobody else reads the network.
"""


def main(argv: Sequence[str]) -> None:
    """Become vLLM's server, which serves until SIGTERM or SIGINT."""
    arguments = _parser().parse_intermixed_args(argv)
    words = [word for word in (arguments.recipe, *arguments.overrides) if word is not None]
    # With --model the recipe may be left out, and the first word be an override.
    named = words.pop(0) if words and ("=" not in words[0] or Path(words[0]).is_file()) else None
    recipe_file, overrides = recipe_and_overrides(named, arguments.model)
    recipe = load_recipe(recipe_file, [*overrides, *words])

    from tapo_train import build  # loads torch and vllm

    host, port = arguments.host, arguments.port or _free_port(arguments.host)
    command, variables = build.engine_server(
        recipe,
        build.build_chat(recipe),
        host=host,
        port=port,
        data_parallel=arguments.data_parallel,
        tensor_parallel=arguments.tensor_parallel,
    )
    print(f"loading {recipe.model.path} to serve it on http://{host}:{port}", flush=True)
    os.execve(command[0], command, {**os.environ, **variables})


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
        "--data-parallel",
        type=_count,
        default=1,
        metavar="N",
        help="engines behind the port, each with whole weights and devices of its own (1)",
    )
    parser.add_argument(
        "--tensor-parallel",
        type=_count,
        default=1,
        metavar="N",
        help="devices over which the weights of an engine are split (1)",
    )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text}, wanted a number from 1 on")
    return int(text)


def _free_port(host: str) -> int:
    """A port that is free at the moment.

    Raises:
        ConfigError: this machine has no such address.
    """
    try:
        with socket.create_server((host, 0)) as free:
            return int(free.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            f"--host: cannot listen on {host}: {error}; wanted an address of this machine"
        ) from error
