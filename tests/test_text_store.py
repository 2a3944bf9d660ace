"""A corpus on a server (`milvus-lite`, OpenSearch's protocol) beside the embedded index."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_opensearch import FakeOpenSearch
from loopback import threaded
from test_dense_index import Endpoint, endpoint

from tapo_train.build.services import build_embedder, build_store, build_text_index
from tapo_train.build.tools import build_toolbox
from tapo_train.commands import index as command
from tapo_train.errors import ConfigError, DataError, ToolDownError
from tapo_train.recipe.compose import Recipe, load_recipe, recipe_to_show
from tapo_train.recipe.services import DenseSettings, StoreSettings
from tapo_train.tools.base import ToolContext
from tapo_train.tools.corpus_index import CorpusIndex
from tapo_train.tools.dense_index import HybridIndex
from tapo_train.types import Observation, Outcome, Task

__all__ = ["endpoint"]

KEY = "reader:s3cr3t-of-the-store"
ODD = [
    {"id": "zh", "title": "铁塔", "text": "高330米的铁塔"},
    {"id": "th", "title": "", "text": "ประเทศไทย กรุงเทพ"},
    {"id": "half", "title": "\ud83d", "text": "x\ud83dy Über den Föhn"},
    {"id": "car", "title": "car", "text": "The automobile stood in the garage."},
]
QUERIES = ["铁塔", "ประเทศไทย", "the of", "zzzqq unheard", "FOHN", "(x AND", "the founding of"]


@dataclass(frozen=True)
class Server:
    """A server of one engine, whatever runs it."""

    engine: str
    url: str

    def recipe(self, collection: str, *overrides: str, **more: str) -> Recipe:
        fields = {"engine": self.engine, "url": f"'{self.url}'", "collection": collection, **more}
        store = ", ".join(f"{name}: {value}" for name, value in fields.items())
        image = "tools.names=[text_search_tool]"
        overrides = (f"tools.text_store={{{store}}}", "tools.corpus=null", image, *overrides)
        return load_recipe("recipes/demo_cpu.yaml", list(overrides))

    def upload(self, corpus: Path, collection: str, *more: str) -> None:
        words = ["upload", str(corpus), "--engine", self.engine, "--url", self.url]
        command.main([*words, "--collection", collection, *more])


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def milvus_lite(folder: Path) -> Iterator[tuple[Server, subprocess.Popen[bytes]]]:
    """A server of Milvus' protocol, in a process of its own."""
    port, program = free_port(), Path(sys.executable).with_name("milvus-lite")
    words = [program, "server", "--data-dir", folder, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            time.sleep(0.05)
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
        yield Server("milvus", f"http://127.0.0.1:{port}"), process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with milvus_lite(tmp_path_factory.mktemp("milvus")) as (server, _):
        yield server


@pytest.fixture(scope="module")
def opensearch() -> Iterator[FakeOpenSearch]:
    with threaded(FakeOpenSearch()) as server:
        yield server


@pytest.fixture(params=["milvus", "opensearch"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Any = request.getfixturevalue(request.param)
    return found if isinstance(found, Server) else Server("opensearch", found.url)


@pytest.fixture(scope="module")
def corpus(small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's passages and some of other scripts."""
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    path.write_text((small_world / "corpus.jsonl").read_text() + "\n".join(map(json.dumps, ODD)))
    return path


def queries_of(corpus: Path) -> list[str]:
    """Some words of some passages each, and the odd ones."""
    chosen, asked = random.Random(0), list(QUERIES)
    lines = corpus.read_text().splitlines()
    for line in chosen.sample(lines, min(40, len(lines))):
        words = f"{(row := json.loads(line))['title']} {row['text']}".split()
        asked.append(" ".join(chosen.sample(words, min(len(words), chosen.randint(1, 5)))))
    return asked


def found_by(recipe: Recipe, queries: list[str]) -> tuple[str, list[list[str]]]:
    """Digest of a recipe's index, and the ids it finds."""

    async def ask() -> tuple[str, list[list[str]]]:
        index = build_text_index(recipe, None)
        try:
            found = [await index.found(query, top_k=3) for query in queries]
        finally:
            await index.close()
        return index.digest, [[passage.id for passage in one] for one in found]

    return asyncio.run(ask())


def test_a_server_finds_what_the_embedded_index_finds_in_the_same_order(
    server: Server, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.upload(corpus, "words")
    embedded, queries = CorpusIndex.load(corpus), queries_of(corpus)
    said = capsys.readouterr().out
    assert f"{len(embedded)} passages -> {server.engine}:words, digest {embedded.digest} (" in said
    digest, found = found_by(server.recipe("words", digest=embedded.digest), queries)
    assert digest == f"{embedded.digest} in={server.engine}:words"
    assert found == [[p.id for p in embedded.search(query, top_k=3)] for query in queries]
    assert found[:3] == [["zh"], ["th"], found[2]] and found[3] == [] and found[4] == ["half"]


def test_words_and_vectors_are_weighed_as_in_the_embedded_index(
    server: Server,
    corpus: Path,
    endpoint: tuple[str, type[Endpoint]],
    tmp_path: Path,
) -> None:
    url, _ = endpoint
    small = tmp_path / "small.jsonl"
    lines = corpus.read_text().splitlines()
    small.write_text("\n".join([*lines[:20], *lines[-len(ODD) :]]))
    server.upload(small, "both", "--model", "m", "--endpoint", url)
    command.main(["build", str(small), "--out", str(tmp_path / "index")])
    folder = str(tmp_path / "index")
    command.main(["embed", folder, str(small), "--model", "m", "--endpoint", url])
    queries = ["vehicle", "iron ore", "cat", "铁塔 vehicle", *queries_of(small)[-5:]]
    dense = f"tools.dense={{endpoint: '{url}', model: m}}"

    async def embedded() -> list[list[str]]:
        embedder = build_embedder(DenseSettings(endpoint=url, model="m"))
        index = HybridIndex(tmp_path / "index", embedder)
        try:
            found = [await index.found(query, top_k=3) for query in queries]
        finally:
            await index.close()
        return [[passage.id for passage in one] for one in found]

    _, found = found_by(server.recipe("both", dense), queries)
    assert found == asyncio.run(embedded()) and found[0][0] == "car"
    with pytest.raises(DataError, match=r"found vectors of endpoint:m::, wanted those of endpo"):
        found_by(server.recipe("both", dense.replace("m}", "other}")), [])


def test_a_collection_is_refused_until_it_is_whole_and_never_written_twice(
    server: Server, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"found no whole collection of this name; wanted one that"):
        found_by(server.recipe("torn"), [])
    torn = tmp_path / "torn.jsonl"
    torn.write_text("\n".join(corpus.read_text().splitlines()[:300]) + "\n{")
    with pytest.raises(DataError, match=r"torn\.jsonl:301"):
        server.upload(torn, "torn")
    with pytest.raises(DataError, match=r"found no whole collection of this name; wanted one that"):
        found_by(server.recipe("torn"), [])
    torn.write_text(json.dumps(ODD[3]))
    with pytest.raises(DataError, match="found a collection of this name; wanted a new name"):
        server.upload(torn, "torn")
    server.upload(torn, "one")
    assert found_by(server.recipe("one"), ["garage"])[1] == [["car"]]
    with pytest.raises(DataError, match=r"one: found passages of digest .*, wanted 0123"):
        found_by(server.recipe("one", digest="0123"), [])
    torn.write_text("")
    with pytest.raises(DataError, match="no passages"):
        server.upload(torn, "none")


def searched(recipe: Recipe) -> Observation:
    """One call of the tool a recipe makes."""
    box = build_toolbox(recipe)
    task = Task(id="t", question="?", images=(), answers=("x",))
    request = box.read("text_search_tool", {"query": "garage"})
    try:
        return asyncio.run(box.execute(request, ToolContext(images=(), task=task)))
    finally:
        box.close()


@pytest.mark.parametrize(
    "broken",
    [(503, b"overloaded"), (401, b'{"error": "who"}'), (200, b"<html>"), (200, b'{"hits": 3}'),
     (200, b'{"hits": {"hits": [{"_id": "x", "_score": 1}]}}'), (200, b"[]"), (404, b"{}")],
)  # fmt: skip
def test_a_server_that_is_down_or_talks_nonsense_is_an_outage(
    opensearch: FakeOpenSearch, tmp_path: Path, broken: tuple[int, bytes]
) -> None:
    server, name = Server("opensearch", opensearch.url), f"b{abs(hash(broken))}"
    (tmp_path / "c.jsonl").write_text(json.dumps(ODD[3]))
    server.upload(tmp_path / "c.jsonl", name)
    recipe = server.recipe(name)
    box = build_toolbox(recipe)
    opensearch.broken = broken
    task = Task(id="t", question="?", images=(), answers=("x",))
    try:
        request = box.read("text_search_tool", {"query": "garage"})
        seen = asyncio.run(box.execute(request, ToolContext(images=(), task=task)))
    finally:
        opensearch.broken = None
        box.close()
    assert seen.outcome is Outcome.INFRA_ERROR and "OpenSearch: " in seen.text
    assert searched(recipe).text == "1. car: The automobile stood in the garage."


def test_a_milvus_that_is_killed_is_an_outage_and_too_long_a_passage_is_told(
    tmp_path: Path,
) -> None:
    corpus, task = tmp_path / "c.jsonl", Task(id="t", question="?", images=(), answers=("x",))
    with milvus_lite(tmp_path / "data") as (server, process):
        corpus.write_text(json.dumps({"id": "1", "title": "", "text": "word " * 14_000}))
        with pytest.raises(DataError, match=r"passage 0 has 70\d\d\d bytes, wanted at most 65535"):
            server.upload(corpus, "long")
        corpus.write_text(json.dumps(ODD[3]))
        server.upload(corpus, "one")
        box = build_toolbox(server.recipe("one", "tools.deadline_s=5"))
        process.kill()
        process.wait()
        request = box.read("text_search_tool", {"query": "garage"})
        seen = asyncio.run(box.execute(request, ToolContext(images=(), task=task)))
        box.close()
    assert seen.outcome is Outcome.INFRA_ERROR and "Milvus: " in seen.text


def test_nobody_at_the_address_is_told_before_anything_starts() -> None:
    for engine in ("milvus", "opensearch"):
        nobody = Server(engine, f"http://127.0.0.1:{free_port()}")
        with pytest.raises(ToolDownError, match=r"^(Milvus|OpenSearch): "):
            found_by(nobody.recipe("words", "tools.deadline_s=2"), [])


def test_the_key_goes_to_the_server_and_a_strict_replay_goes_nowhere(
    opensearch: FakeOpenSearch,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    server = Server("opensearch", opensearch.url)
    monkeypatch.setenv("STORE_KEY", KEY)
    (tmp_path / "c.jsonl").write_text(json.dumps(ODD[3]))
    server.upload(tmp_path / "c.jsonl", "keyed", "--store-key-variable", "STORE_KEY")
    digest = CorpusIndex.load(tmp_path / "c.jsonl").digest
    keyed = {"digest": digest, "key_variable": "STORE_KEY"}
    recording = f"tools.recording={tmp_path}/recording"
    opensearch.asked.clear()
    recipe = server.recipe("keyed", recording, "tools.replay=record", **keyed)
    recorded = searched(recipe)
    assert {key for _, _, key in opensearch.asked} == {"Basic cmVhZGVyOnMzY3IzdC1vZi10aGUtc3RvcmU="}
    assert (
        KEY
        not in json.dumps(recipe_to_show(recipe))
        + build_toolbox(recipe).versions["text_search_tool"]
    )
    opensearch.asked.clear()
    replayed = searched(server.recipe("keyed", recording, "tools.replay=replay", **keyed))
    assert (replayed.text, replayed.cached) == (recorded.text, True)
    assert opensearch.asked == [] and recorded.outcome is Outcome.OK
    with pytest.raises(ConfigError, match=r"text_store.digest: found nothing, wanted by tools.rep"):
        server.recipe("keyed", recording, "tools.replay=replay")
    with pytest.raises(ConfigError, match="text_store: found it beside text_endpoint"):
        server.recipe("keyed", "tools.text_endpoint='http://h/s'")
    with pytest.raises(ConfigError, match="NOT_SET_HERE', which is empty"):
        settings = StoreSettings(
            engine="milvus", url=server.url, collection="c", key_variable="NOT_SET_HERE"
        )
        build_store(settings, timeout_s=1.0)
