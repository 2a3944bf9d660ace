"""From a recipe to the sampler: in this process, or servers and how they are started."""

from __future__ import annotations

import ipaddress
import json
import socket
import uuid
import zlib
from dataclasses import asdict
from pathlib import Path

from tapo_train import recipe as recipes
from tapo_train.build.device import DEVICE
from tapo_train.build.limits import probe_tolerance
from tapo_train.build.rollout import build_local_engine, most_images, samples_by_seed
from tapo_train.errors import ConfigError
from tapo_train.learner import distributed
from tapo_train.recipe.compose import Recipe
from tapo_train.report.run_folder import RunFolder
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.engine import Engine
from tapo_train.rollout.seats import MOST
from tapo_train.rollout.servers.engine import ServerEngine
from tapo_train.rollout.servers.fleet import ServerOptions
from tapo_train.rollout.servers.gate import shared_secret
from tapo_train.rollout.servers.identity import Served, chat_identity, weights_fingerprint
from tapo_train.rollout.servers.launch import Launch
from tapo_train.rollout.servers.placement import servers_of_rank
from tapo_train.rollout.servers.weights import FolderWeights, ForeignWeights, WeightCarrier
from tapo_train.rollout.tensor_parallel import MirroredEngine
from tapo_train.training.probe import MAXIMUM_FACTOR


def build_engine(recipe: Recipe, chat: ChatFormat) -> Engine:
    """The sampler of this rank."""
    engine = recipe.rollout.engine
    if engine.name == "server":
        return _server_engine(recipe, chat, engine)
    ranks = engine.tensor_parallel if engine.name == "vllm" else 1
    seed = recipe.run.seed * 1000 + distributed.rank() // ranks
    local = build_local_engine(recipe, chat, engine, seed=seed)
    return local if ranks == 1 else MirroredEngine(local, distributed.Subgroup(ranks))


def _server_engine(recipe: Recipe, chat: ChatFormat, engine: recipes.ServerSettings) -> Engine:
    """The servers of this rank; their weights are named after this start of the run."""
    secret = shared_secret()
    urls, sends = servers_of_rank(engine.urls, distributed.rank(), distributed.world_size())
    options = ServerOptions(
        secret=secret,
        base=weights_fingerprint(chat.model),
        run=distributed.broadcast_object(uuid.uuid4().hex),
        timeout_s=engine.timeout_s,
        patience_s=engine.patience_s,
        agreement=probe_tolerance(recipe) * MAXIMUM_FACTOR,
    )
    return ServerEngine(urls, chat=chat, options=options, carrier=_carrier(recipe, engine, sends))


def _carrier(recipe: Recipe, engine: recipes.ServerSettings, sends: bool) -> WeightCarrier:
    if engine.weights != "folder":
        if DEVICE == "cpu":
            raise ConfigError(
                f"rollout.engine.weights: found {engine.weights!r} without a GPU, wanted 'folder'"
            )
        from tapo_train.rollout.servers.transfer import TransferWeights  # loads vllm

        return TransferWeights(engine.weights, sends=sends)
    if not sends:
        return ForeignWeights()
    return FolderWeights(Path(engine.weights_root or RunFolder(recipe.run.dir).weights).absolute())


def engine_server(
    recipe: Recipe,
    chat: ChatFormat,
    *,
    host: str,
    port: int,
    data_parallel: int = 1,
    tensor_parallel: int = 1,
) -> tuple[list[str], dict[str, str]]:
    """Command line and variables of a vLLM server that samples what the recipe wants.

    Raises:
        ConfigError: there is no secret, or the weights would come over an open network.
    """
    shared_secret()
    engine, rollout = recipe.rollout.engine, recipe.rollout
    # Where the recipe says how an engine in the trainer is to be, caches are as large here.
    local = engine if engine.name == "vllm" else recipes.VllmSettings()
    transfer = engine.weights if engine.name == "server" and engine.weights != "folder" else None
    if transfer == "ipc" and not ipaddress.ip_address(socket.gethostbyname(host)).is_loopback:
        raise ConfigError(
            f"--host: found {host}, wanted 127.0.0.1: with rollout.engine.weights=ipc the server "
            "unpickles what it is sent"
        )
    launch = Launch(
        model=chat.model,
        dtype=recipe.model.dtype,
        host=host,
        port=port,
        max_tokens=rollout.max_tokens,
        max_sequences=rollout.max_in_flight or MOST,
        max_images=most_images(recipe),
        # Servers that share a run must not draw the same numbers.
        seed=zlib.crc32(f"{recipe.run.seed} {socket.gethostname()} {host} {port}".encode()),
        seeded=samples_by_seed(recipe),
        data_parallel=data_parallel,
        tensor_parallel=tensor_parallel,
        picture_cache_gib=local.picture_cache_gib,
        cache_gib=local.kv_cache_gib if DEVICE == "cpu" else None,
        transfer=transfer,
    )
    served = Served(
        identity=chat_identity(chat),
        base=weights_fingerprint(chat.model),
        max_tokens=rollout.max_tokens,
        replicas=data_parallel,
        devices=data_parallel * tensor_parallel,
    )
    return launch.command(), launch.environment(json.dumps(asdict(served)))
