"""From a recipe to search services and embedders, with keys from the environment."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tapo_train.errors import ConfigError
from tapo_train.recipe.compose import Recipe
from tapo_train.recipe.services import DenseSettings, PageSettings, ServiceSettings, StoreSettings
from tapo_train.tools.addresses import AllowedHosts, host_of_endpoint
from tapo_train.tools.corpus_index import CorpusIndex
from tapo_train.tools.dense_index import HybridIndex
from tapo_train.tools.embedders import Embedder, EndpointEmbedder, FolderEmbedder
from tapo_train.tools.net import FetchLimits, HttpClient
from tapo_train.tools.pages import JINA, PageReader, Summariser
from tapo_train.tools.sandbox import Sandbox
from tapo_train.tools.services import PICTURE_SERVICES, TEXT_SERVICES, Service
from tapo_train.tools.text_search import TextIndex
from tapo_train.tools.text_store import StoreIndex, TextStore

__all__ = [
    "build_client_of",
    "build_embedder",
    "build_page_reader",
    "build_service",
    "build_store",
    "build_text_index",
    "key_from",
]


def key_from(variable: str | None, *, field: str) -> str:
    """A key from the environment; "" if none is named.

    Raises:
        ConfigError: the variable is empty or not set.
    """
    key = os.environ.get(variable, "") if variable is not None else ""
    if variable is not None and not key:
        raise ConfigError(f"{field} is {variable!r}, which is empty or not set here")
    return key


def build_embedder(dense: DenseSettings, *, forbidden: str = "") -> Embedder:
    """What makes vectors of texts.

    Args:
        forbidden: why no endpoint may be asked; "" if it may.
    """
    prefixes = {"query_prefix": dense.query_prefix, "passage_prefix": dense.passage_prefix}
    if dense.folder is not None:
        return FolderEmbedder(Path(dense.folder), **prefixes)
    endpoint, field = dense.endpoint or "", "tools.dense.endpoint"
    key = key_from(dense.key_variable, field="tools.dense.key_variable")
    client = HttpClient(
        allowed=AllowedHosts.parse([host_of_endpoint(endpoint, field=field)]),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        forbidden=forbidden,
    )
    return EndpointEmbedder(client, endpoint=endpoint, model=dense.model, **prefixes)


def build_text_index(recipe: Recipe, path: Path | None) -> TextIndex:
    """The corpus, by words alone or by vectors, too.

    Args:
        path: folder or file; None: on the server of `tools.text_store`.
    """
    dense, store, replay = recipe.tools.dense, recipe.tools.text_store, recipe.tools.replay
    embedder = build_embedder(dense, forbidden=_forbidden(recipe)) if dense is not None else None
    dense = dense or DenseSettings()
    if path is not None:
        if embedder is None:
            return CorpusIndex.load(path)
        weights = {"dense_weight": dense.weight, "words_weight": dense.words_weight}
        return HybridIndex(path, embedder, **weights)
    if store is None:
        raise ConfigError("tools.corpus: found nothing; text_search_tool wants a file")
    return StoreIndex(
        f"{store.engine}:{store.collection}",
        None if replay == "replay" else build_store(store, timeout_s=recipe.tools.deadline_s),
        wanted=store.digest,
        embedder=embedder,
        weights=(dense.weight, dense.words_weight),
    )


def build_store(settings: StoreSettings, *, timeout_s: float) -> TextStore:
    """The collection of a server.

    Raises:
        ConfigError: its client is not installed, or its key is not set.
        ToolDownError: it is down.
    """
    key = key_from(settings.key_variable, field="tools.text_store.key_variable")
    url, name = settings.url, settings.collection
    try:
        if settings.engine == "milvus":
            from tapo_train.tools.milvus_store import MilvusStore

            return MilvusStore(url, name, token=key, timeout_s=timeout_s)
        from tapo_train.tools.opensearch_store import OpenSearchStore
    except ImportError as error:
        raise ConfigError(
            f"tools.text_store: {error}; wanted the extra {settings.engine}: "
            f"pip install 'tapo_train[{settings.engine}]'"
        ) from error
    return OpenSearchStore(url, name, key=key, timeout_s=timeout_s)


def _forbidden(recipe: Recipe) -> str:
    is_strict = recipe.tools.replay == "replay"
    return "tools.replay=replay forbids the network" if is_strict else ""


def build_service(settings: ServiceSettings, *, field: str) -> Service:
    """The service, its key in it.

    Args:
        field: of the recipe: tools.text_service or tools.image_service.

    Raises:
        ConfigError: it has no address, no upload for pictures, or no key where it says so.
    """
    is_pictures = field == "tools.image_service"
    known = PICTURE_SERVICES if is_pictures else TEXT_SERVICES
    key = key_from(settings.key_variable, field=f"{field}.key_variable")
    if is_pictures and settings.upload is None:
        raise ConfigError(f"{field}.upload: found nothing, wanted where pictures get an address")
    upload, uploaded = settings.upload or "", settings.uploaded
    if settings.name != "json":
        if settings.name not in known:
            wanted = " or ".join((*known, "json"))
            raise ConfigError(f"{field}.name: found {settings.name}, wanted {wanted}")
        service = replace(known[settings.name], key=key, upload=upload, uploaded=uploaded)
        return replace(service, url=settings.url) if settings.url else service
    if settings.url is None:
        raise ConfigError(f"{field}.url: found nothing, wanted the address of the service")
    return Service(
        url=settings.url,
        method=settings.method,
        request=dict(settings.request),
        headers=dict(settings.headers),
        results=settings.results,
        fields={str(name): path for name, path in settings.fields.items()},
        nothing=settings.nothing,
        upload=upload,
        uploaded=uploaded,
        key=key,
    )


def build_client_of(
    recipe: Recipe, address: str, *, field: str, headers: Mapping[str, str] | None = None
) -> HttpClient:
    """A client that may meet this server of the recipe, and sends it alone the headers."""
    return HttpClient(
        allowed=AllowedHosts.parse([host_of_endpoint(address, field=field)]),
        headers=headers,
        limits=FetchLimits(timeout_s=recipe.tools.deadline_s),
        forbidden=_forbidden(recipe),
    )


def build_page_reader(
    recipe: Recipe, pages: PageSettings, sandbox: Sandbox, *, web: HttpClient, counts: Counter[str]
) -> PageReader:
    """What reads the pages of results, and summarises them if the recipe says so.

    Args:
        web: what pages are fetched by when they are fetched directly.
    """
    is_jina = pages.reader == "jina"
    key = key_from(pages.key_variable, field="tools.pages.key_variable")
    headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    summary, summariser = pages.summary, None
    if summary is not None:
        field = "tools.pages.summary.endpoint"
        secret = key_from(summary.key_variable, field="tools.pages.summary.key_variable")
        bearer = {"Authorization": f"Bearer {secret}"} if secret else {}
        summariser = Summariser(
            client=build_client_of(recipe, summary.endpoint, field=field, headers=bearer),
            endpoint=summary.endpoint,
            model=summary.model,
            words=summary.words,
            options=summary.options,
        )
    return PageReader(
        client=build_client_of(recipe, JINA, field="tools.pages", headers=headers)
        if is_jina
        else web,
        sandbox=sandbox,
        counts=counts,
        summariser=summariser,
        is_jina=is_jina,
        max_chars=pages.max_chars,
        seconds=recipe.tools.deadline_s / 3,
    )
