"""From a recipe to the parts of a run: the tools a recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tapo_train.build.remote_tools import build_remote_tools
from tapo_train.build.services import build_text_index
from tapo_train.errors import ConfigError
from tapo_train.import_path import construct, load
from tapo_train.recipe import Custom
from tapo_train.recipe import tools as recipe_tools
from tapo_train.recipe.compose import Recipe
from tapo_train.recipe.services import LookAlikeSettings
from tapo_train.rollout.failures import FailureBudget
from tapo_train.tools.base import Tool
from tapo_train.tools.crop import ZoomTool
from tapo_train.tools.environment import Environments
from tapo_train.tools.image_search import ImageIndex, ImageSearchTool
from tapo_train.tools.images import ImageDecoder, ResultPictures
from tapo_train.tools.ledger import Ledger
from tapo_train.tools.limits import ToolLimits
from tapo_train.tools.look_alikes import LookAlikes, VisionTower
from tapo_train.tools.recording import Recording, Replay
from tapo_train.tools.registry import load_tool
from tapo_train.tools.text_search import TextSearchTool
from tapo_train.tools.toolbox import Toolbox
from tapo_train.training.audit import RolloutAudit


def build_toolbox(
    recipe: Recipe, *, world: Path | None = None, decoder: ImageDecoder | None = None
) -> Toolbox:
    """The tools the recipe names, in its order.

    Args:
        world: a world's folder, whose indexes take the place of the recipe's back ends.
        decoder: the policy's, so that a picture is decoded once for both; None makes one.
    """
    tools, decoder = recipe.tools, decoder or ImageDecoder()
    image_index, corpus = tools.image_index, tools.corpus
    ledger = Ledger()
    remote = {} if world is not None else build_remote_tools(recipe, ledger.events)
    if world is not None:
        image_index, corpus = str(world / "image_index.jsonl"), str(world / "corpus.jsonl")
    made: list[Tool] = []
    for name in tools.names:
        if name in remote:
            made.append(remote[name])
        elif name == "image_zoom_in_tool":
            zoom = ZoomTool(
                decoder, min_side_px=tools.min_crop_side, max_pixels=tools.max_result_pixels
            )
            made.append(zoom)
        elif name == "image_search_tool":
            path = _needed(image_index, "tools.image_index", name)
            near = tools.look_alikes if world is None else None
            made.append(_picture_search(tools, path, decoder, near))
        else:
            stored = tools.text_store is not None and world is None
            file = None if stored else _needed(corpus, "tools.corpus", name)
            index, chars = build_text_index(recipe, file), tools.max_observation_chars
            made.append(TextSearchTool(index, top_k=tools.text_top_k, max_chars=chars))
    made += [load_tool(extra.path, extra.arguments) for extra in tools.extra]
    made += [tool for server in tools.mcp for tool in _served(server, tools.max_observation_chars)]
    environment = None if world is not None else tools.environment
    return Toolbox(
        made,
        environments=None if environment is None else environments_of(environment),
        deadline_s=tools.deadline_s,
        queue_s=tools.queue_s,
        limits={name: tool_limits(chosen) for name, chosen in tools.limits.items()},
        ledger=ledger,
        replay=replay_of(recipe) if world is None else None,
        pictures=ResultPictures(decoder=decoder, max_pixels=tools.max_result_pixels),
    )


def _picture_search(
    tools: recipe_tools.Tools,
    path: Path,
    decoder: ImageDecoder,
    near: LookAlikeSettings | None,
) -> ImageSearchTool:
    """The search in a folder or file of pictures.

    Args:
        near: what shows look-alikes where it finds nothing; None: nothing does.
    """
    index, look_alikes = ImageIndex.load(path, thumbnail_side_px=tools.thumbnail_side), None
    if near is not None:
        tower = VisionTower(Path(near.folder))
        look_alikes = LookAlikes(path, index, tower, threshold=near.threshold)
    return ImageSearchTool(index, decoder, top_k=tools.image_top_k, look_alikes=look_alikes)


def environments_of(part: Custom) -> Environments:
    """The environments of a recipe; an instance is made, to see its tools.

    Raises:
        ConfigError: it cannot be imported or made, or has no tools.
    """
    where = "tools.environment"
    found = load(part.path, where=f"{where}.path")
    return Environments(lambda: construct(found, part.arguments, where=where))


def replay_of(recipe: Recipe) -> Replay | None:
    """What `tools.replay` wants; every process has the recording open once."""
    mode = recipe.tools.replay
    if mode == "off":
        return None
    folder = Path(recipe.tools.recording or Path(recipe.run.dir) / "recording")
    return Replay(Recording(folder, must_exist=mode == "replay"), mode)


def _served(server: recipe_tools.McpServerSettings, max_chars: int) -> Sequence[Tool]:
    """The tools of an MCP server, which is started and ends with the process."""
    try:
        from tapo_train.tools.mcp import McpServer
    except ImportError as error:
        raise ConfigError(
            f"tools.mcp: {error}; wanted the extra mcp: pip install 'tapo_train[mcp]'"
        ) from error
    started = McpServer(server.command, env=server.env, only=server.only, max_chars=max_chars)
    return started.tools


def build_audit(recipe: Recipe, toolbox: Toolbox, spending: Path) -> RolloutAudit:
    """The budgets of a run.

    Args:
        spending: the folder that keeps what tool calls have cost.
    """
    return RolloutAudit(
        toolbox.ledger,
        failures=FailureBudget(
            recipe.rollout.max_failed_fraction, min_scored=recipe.reward.min_scored
        ),
        budget=recipe.tools.budget,
        folder=spending,
    )


def tool_limits(chosen: recipe_tools.ToolLimitSettings) -> ToolLimits:
    return ToolLimits(
        concurrency=chosen.concurrency,
        per_second=chosen.per_second,
        deadline_s=chosen.deadline_s,
        queue_s=chosen.queue_s,
        retries=chosen.retries,
        price=chosen.price,
    )


def _needed(path: str | None, field: str, tool: str) -> Path:
    if path is None:
        raise ConfigError(f"{field}: found nothing; {tool} wants a file")
    return Path(path)
