"""What the policy may call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from tapo_train.recipe.custom import CustomOrPath
from tapo_train.recipe.services import (
    DenseSettings,
    LookAlikeSettings,
    PageSettings,
    ServiceSettings,
    StoreSettings,
)
from tapo_train.recipe.values import STRICT, Count, CountOrZero, NonNegative, Positive


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class ToolLimitSettings:
    """Limits and price of one tool; of each rank where they count calls."""

    concurrency: Count | None = None
    """Most calls at a time; none: as many as trajectories are under way."""
    per_second: Positive | None = None
    """Attempts per second, after a burst of one second's worth; none: no limit."""
    deadline_s: Positive | None = None
    """[s] for the work of a call, all its attempts included; none: tools.deadline_s."""
    queue_s: Positive | None = None
    """[s] a call may wait for its turn: a seat, the rate, a free thread; none: tools.queue_s."""
    retries: CountOrZero = 0
    """Further attempts when a back end fails in a way that may pass; the policy's errors and a
    tool's refusals are never tried again."""
    price: NonNegative = 0.0
    """Of one attempt, in any unit of money; an answer from a store is free."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class McpServerSettings:
    """A process that serves tools over MCP; every rank starts one of its own."""

    command: Annotated[tuple[str, ...], Field(min_length=1)]
    """Program and arguments; it speaks on its standard input and output. Training runs it."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the few variables it inherits (PATH, HOME and their like)."""
    only: tuple[str, ...] = ()
    """Names of the tools to take; empty: all it lists."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Tools:
    """What the policy may call, and the indexes behind it."""

    names: tuple[Literal["image_zoom_in_tool", "text_search_tool", "image_search_tool"], ...] = (
        "image_zoom_in_tool",
        "text_search_tool",
        "image_search_tool",
    )
    """Empty: a policy without tools of ours."""
    extra: tuple[CustomOrPath, ...] = ()
    """Your own tools by import path (package.module:name): a function under @tool, an object, or
    a class or function that makes one from arguments. Training runs the code of that module."""
    environment: CustomOrPath | None = None
    """A class of stateful environments, one for each trajectory, after TRL's environment_factory:
    `reset(**row)` before it, public methods are tools, state is read by the reward part
    `environment`."""
    mcp: tuple[McpServerSettings, ...] = ()
    """Servers whose tools join ours (extra `mcp`), as [{command: [python, server.py]}]."""
    limits: Mapping[str, ToolLimitSettings] = field(default_factory=dict)
    """By the name of the tool; a tool that is not named here has no limits but deadline_s."""
    budget: NonNegative | None = None
    """What the calls of a whole run may cost together, over all ranks and resumptions, in the unit
    of the prices; the run stops before it would spend more. None: no bound."""
    deadline_s: Positive = 30.0
    """[s] for the work of one call, from the moment it has its seat; afterwards its outcome is
    `timeout`."""
    queue_s: Positive = 300.0
    """[s] one call may wait for its turn (a seat, the rate, a free thread); afterwards its outcome
    is `timeout`, too."""
    replay: Literal["off", "record", "replay", "replay_or_record"] = "off"
    """record: keep what tools answer, the first answer to a call for everybody; replay: answer
    from the recording alone, without the network, and stop where it has no answer;
    replay_or_record: from the recording, else ask and record."""
    recording: str | None = None
    """Folder of the recording, on a local disk; none: `recording` in run.dir."""
    text_endpoint: str | None = None
    """http(s) address of a text search (POST query and top_k as JSON) in place of corpus."""
    text_endpoint_form: Literal["results", "retrieve"] = "results"
    """What text_endpoint speaks. results: query and top_k, answered by results; retrieve: that of
    Search-R1 and its kin, queries, topk and return_scores, answered by result."""
    text_service: ServiceSettings | None = None
    """A service of others (Serper, SerpAPI, Jina, or any that answers JSON) in place of corpus."""
    pages: PageSettings | None = None
    """Read the pages that results of the text search lead to; none: their snippets are shown."""
    image_endpoint: str | None = None
    """http(s) address of a picture search (POST a picture) in place of image_index."""
    image_service: ServiceSettings | None = None
    """A reverse picture search of others (SerpAPI, Serper, json) in place of image_index."""
    allowed_hosts: tuple[str, ...] = ()
    """`host` or `host:port` of further servers that results may be fetched from although they are
    private; the endpoints' own are allowed. Any public host may be fetched from, ports 80, 443."""
    blocked_hosts: tuple[str, ...] = ()
    """Results from these hosts and below them are kept from the policy: benchmarks' own."""
    filter_answers: bool = False
    """Keep results of the endpoints from the policy that hold the question with its answer."""
    corpus: str | None = None
    """Documents of the text search; needed by text_search_tool. The folder of an index (`index
    build`), which all ranks open, or a jsonl or parquet file, which each reads into memory."""
    text_store: StoreSettings | None = None
    """A corpus on a server (Milvus, OpenSearch) in place of corpus; `index upload` writes it."""
    dense: DenseSettings | None = None
    """Search corpus or text_store by vectors, too; none: by words alone."""
    image_index: str | None = None
    """Pictures of the image search; needed by image_search_tool. The folder of an index (`index
    pictures`), which all ranks map, or a jsonl of titles and paths, which each reads."""
    look_alikes: LookAlikeSettings | None = None
    """Where image_index finds nothing for certain, show what looks alike and say so; none: say
    that nothing was found."""
    text_top_k: Count = 3
    """Documents shown for a query."""
    image_top_k: Count = 3
    """Pictures shown for a picture."""
    max_observation_chars: Count = 8192
    """[characters] of text one observation may hold; the rest is cut and the cut is said."""
    min_crop_side: Count = 28
    """[px] a zoom into a region with a shorter side is refused, and the policy reads why."""
    thumbnail_side: Count = 256
    """[px] longest side of the pictures a picture search shows; what is smaller than the model's
    smallest picture (Qwen3-VL: 256 x 256) is only scaled up again."""
    max_result_pixels: Count = 1_048_576
    """[px] all pictures of one tool result together, width x height; larger ones are reduced. A
    thousand pixels are about one token of the model's."""
