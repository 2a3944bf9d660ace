"""Search services of others, and the pages their results lead to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from tapo_train.recipe.values import STRICT, Count, Fraction, NonNegative
from tapo_train.tools.addresses import HIDDEN, shown


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class ServiceSettings:
    """A service that answers JSON: a known one by name, or described by paths."""

    name: Literal["serper", "serpapi", "jina", "json"] = "json"
    """A known one needs no more than its key; jina searches texts only. json: as described."""
    key_variable: str | None = None
    """Name of the environment variable that holds the key, {key} below; none: no key."""
    url: str | None = None
    """http(s) address; none: that of the known service."""
    method: Literal["GET", "POST"] = "POST"
    """json: how it is asked. POST sends request as JSON, GET in the address."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """json: fields to send; {query}, {top_k}, {picture} (its address) and {key} are filled in."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """json: headers to send, {key} filled in."""
    results: str = "results"
    """json: path of the list of results, as data.items."""
    fields: Mapping[Literal["title", "text", "html", "url", "thumbnail"], str] = field(
        default_factory=dict
    )
    """json: paths within a result, where its names are not the usual ones."""
    nothing: str = ""
    """json: words of an answer without a list that mean nothing was found."""
    upload: str | None = None
    """http(s) address a picture is posted to for an address that the service can fetch it from;
    needed by a picture search."""
    uploaded: str = "url"
    """Path of that address in the answer."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class SummarySettings:
    """An OpenAI-compatible endpoint that summarises pages."""

    endpoint: str
    """http(s) address that ends before /chat/completions."""
    model: str
    """As the endpoint calls it."""
    words: Count = 150
    """Most words of a summary, as it is told."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the request beside model and messages, as {temperature: 0}."""
    key_variable: str | None = None
    """Name of the environment variable that holds its key; none: no key is sent."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class PageSettings:
    """Pages of a text search's results, read in place of their snippets."""

    reader: Literal["direct", "jina"] = "direct"
    """direct: fetched and reduced to their words here; jina: by Jina's reader."""
    key_variable: str | None = None
    """Name of the environment variable that holds the reader's key; none: no key is sent."""
    max_chars: Count = 20_000
    """[characters] of a page that are read."""
    summary: SummarySettings | None = None
    """What makes of a page what it says about the query; none: the page's beginning is shown."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class DenseSettings:
    """Vectors beside the words of a text index: `index embed` made them with the same model."""

    folder: str | None = None
    """A sentence-transformers folder, run on the CPU; or an endpoint:"""
    endpoint: str | None = None
    """http(s) address, OpenAI-compatible, that ends before /embeddings."""
    model: str = ""
    """As the endpoint calls it."""
    key_variable: str | None = None
    """Name of the environment variable that holds the endpoint's key; none: no key is sent."""
    query_prefix: str = ""
    """What the model wants in front of a query, as "query: "."""
    passage_prefix: str = ""
    """What it wants in front of a passage."""
    weight: NonNegative = 1.0
    """Of the vectors' scores, brought to 0 to 1."""
    words_weight: NonNegative = 0.5
    """Of BM25's, brought to 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class LookAlikeSettings:
    """What a picture search shows that finds nothing: `index look-alikes` made the vectors."""

    folder: str
    """A CLIP or SigLIP folder, run on the CPU; that of the vectors."""
    threshold: Fraction
    """Cosine from which pictures look alike. Every model has its own: look at what it says of
    pictures that do and of others that do not."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class StoreSettings:
    """A corpus on a database server, which `index upload` wrote."""

    engine: Literal["milvus", "opensearch"]
    """milvus: extra `milvus`; opensearch: extra `opensearch`, for Elasticsearch's words as well."""
    url: str
    """http(s) address of the server."""
    collection: str
    """Its name there: a collection of Milvus', an index of OpenSearch's."""
    key_variable: str | None = None
    """Name of the environment variable that holds user:password, or Milvus' API key; none: no
    key."""
    digest: str = ""
    """What `index upload` printed: other passages are refused. Needed by replay=replay, which asks
    nobody; empty: whatever the collection holds."""


def hide_services(tools: dict[str, Any]) -> None:
    """Take out of the plain values of `tools` what may be a secret of its services."""
    for service in filter(None, (tools["text_service"], tools["image_service"])):
        for name in ("url", "upload"):
            service[name] = service[name] and shown(service[name])
        for name in ("headers", "request"):
            told = service[name].items()
            service[name] = {key: value if _is_template(value) else HIDDEN for key, value in told}
    dense = tools["dense"]
    if dense and dense["endpoint"]:
        dense["endpoint"] = shown(dense["endpoint"])
    if tools["text_store"]:
        tools["text_store"]["url"] = shown(tools["text_store"]["url"])
    summary = (tools["pages"] or {}).get("summary")
    if summary:
        summary["endpoint"] = shown(summary["endpoint"])


def _is_template(value: Any) -> bool:
    """Whether a value says only where others go."""
    return isinstance(value, str) and "{" in value
