"""From a recipe to the parts of a run: the tools that ask a server, behind their guards."""

from __future__ import annotations

from collections import Counter

from tapo_train.build.services import build_client_of, build_page_reader, build_service
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
    ServiceTexts,
    TextForm,
)
from tapo_train.tools.sandbox import Sandbox, SandboxLimits
from tapo_train.tools.services import PictureService, Service


def build_remote_tools(recipe: Recipe, events: Counter[str]) -> dict[str, Tool]:
    """The searches whose endpoint the recipe names, by the tool's name; one client, one sandbox.

    Args:
        events: where guards count what they did.
    """
    tools = recipe.tools
    # Several inputs of one call have to fit into its deadline, hostile ones too.
    limits = SandboxLimits(timeout_s=min(SandboxLimits().timeout_s, tools.deadline_s / 3))
    client, sandbox = build_client(recipe), Sandbox(limits)
    contamination = Contamination(
        hosts=frozenset(host.lower() for host in tools.blocked_hosts),
        answers=tools.filter_answers,
        counts=events,
    )
    made = (
        _text_search(recipe, client, sandbox, contamination),
        _image_search(recipe, client, sandbox, contamination),
    )
    return {tool.name: tool for tool in made if tool is not None}


def _text_search(
    recipe: Recipe, client: HttpClient, sandbox: Sandbox, contamination: Contamination
) -> Tool | None:
    tools, pages = recipe.tools, None
    endpoint, texts, form = tools.text_endpoint, client, _form(tools.text_endpoint_form)
    if tools.text_service is not None:
        service = build_service(tools.text_service, field="tools.text_service")
        endpoint, form = service.url, ServiceTexts(service)
        texts = _client_of(recipe, service, field="tools.text_service")
    if endpoint is None:
        return None
    if tools.pages is not None:
        counts = contamination.counts
        pages = build_page_reader(recipe, tools.pages, sandbox, web=client, counts=counts)
    return RemoteTextSearch(
        endpoint,
        texts,
        sandbox,
        contamination,
        form=form,
        pages=pages,
        top_k=tools.text_top_k,
        max_chars=tools.max_observation_chars,
    )


def _image_search(
    recipe: Recipe, client: HttpClient, sandbox: Sandbox, contamination: Contamination
) -> Tool | None:
    tools, pictures = recipe.tools, None
    endpoint = tools.image_endpoint
    if tools.image_service is not None:
        service = build_service(tools.image_service, field="tools.image_service")
        endpoint = service.url
        pictures = PictureService(
            service=service,
            client=_client_of(recipe, service, field="tools.image_service"),
            uploading=build_client_of(recipe, service.upload, field="tools.image_service.upload"),
        )
    if endpoint is None:
        return None
    return RemoteImageSearch(
        endpoint,
        client,
        sandbox,
        contamination,
        service=pictures,
        top_k=tools.image_top_k,
        thumbnail_side_px=tools.thumbnail_side,
        thumbnail_s=tools.deadline_s / 3,
    )


def _form(name: str) -> TextForm:
    return Retrieve() if name == "retrieve" else Results()


def _client_of(recipe: Recipe, service: Service, *, field: str) -> HttpClient:
    return build_client_of(recipe, service.url, field=field, headers=service.sent_headers())


def build_judge_client(recipe: Recipe, judge: JudgePart, *, key: str) -> HttpClient:
    """Meets the judge's endpoint; in a strict replay it refuses everything."""
    host = host_of_endpoint(judge.endpoint, field="reward.parts: endpoint of a judge")
    return HttpClient(
        allowed=AllowedHosts.parse([host]),
        headers={"Authorization": f"Bearer {key}"} if key else {},
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
