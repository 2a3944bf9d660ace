"""From a recipe to the parts of a run: the tools that ask a server, behind their guards."""

from __future__ import annotations

from collections import Counter

from tapo_train.recipe import JudgePart
from tapo_train.recipe.compose import Recipe
from tapo_train.tools.addresses import AllowedHosts, host_of_endpoint
from tapo_train.tools.base import Tool
from tapo_train.tools.contamination import Contamination
from tapo_train.tools.net import FetchLimits, HttpClient
from tapo_train.tools.remote_search import (
    RemoteImageSearch,
    RemoteTextSearch,
    Results,
    Retrieve,
)
from tapo_train.tools.sandbox import Sandbox, SandboxLimits


def build_remote_tools(recipe: Recipe, events: Counter[str]) -> dict[str, Tool]:
    """The searches whose endpoint the recipe names, by the tool's name; one client, one sandbox.

    Args:
        events: where guards count what they did.
    """
    tools = recipe.tools
    made: dict[str, Tool] = {}
    # Several inputs of one call have to fit into its deadline, hostile ones too.
    limits = SandboxLimits(timeout_s=min(SandboxLimits().timeout_s, tools.deadline_s / 3))
    client, sandbox = build_client(recipe), Sandbox(limits)
    contamination = Contamination(
        hosts=frozenset(host.lower() for host in tools.blocked_hosts),
        answers=tools.filter_answers,
        counts=events,
    )
    if tools.text_endpoint is not None:
        made["text_search_tool"] = RemoteTextSearch(
            tools.text_endpoint,
            client,
            sandbox,
            contamination,
            form=Retrieve() if tools.text_endpoint_form == "retrieve" else Results(),
            top_k=tools.text_top_k,
            max_chars=tools.max_observation_chars,
        )
    if tools.image_endpoint is not None:
        made["image_search_tool"] = RemoteImageSearch(
            tools.image_endpoint,
            client,
            sandbox,
            contamination,
            top_k=tools.image_top_k,
            thumbnail_side_px=tools.thumbnail_side,
            thumbnail_s=tools.deadline_s / 3,
        )
    return made


def build_judge_client(recipe: Recipe, judge: JudgePart, *, key: str) -> HttpClient:
    """Meets the judge's endpoint; in a strict replay it refuses everything."""
    host = host_of_endpoint(judge.endpoint, field="reward.parts: endpoint of a judge")
    return HttpClient(
        allowed=AllowedHosts.parse([host]),
        key=key,
        limits=FetchLimits(timeout_s=judge.limits.deadline_s or recipe.reward.deadline_s),
        forbidden="tools.replay=replay forbids the network"
        if recipe.tools.replay == "replay"
        else "",
    )


def build_client(recipe: Recipe) -> HttpClient:
    """The one HTTP client of a run; in a strict replay it refuses everything."""
    tools = recipe.tools
    named = list(tools.allowed_hosts)
    for field, endpoint in (
        ("tools.text_endpoint", tools.text_endpoint),
        ("tools.image_endpoint", tools.image_endpoint),
    ):
        if endpoint is not None:
            named.append(host_of_endpoint(endpoint, field=field))
    return HttpClient(
        allowed=AllowedHosts.parse(named),
        limits=FetchLimits(timeout_s=tools.deadline_s),
        forbidden="tools.replay=replay forbids the network" if tools.replay == "replay" else "",
    )
