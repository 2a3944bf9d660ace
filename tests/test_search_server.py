"""Search-R1's `/retrieve`: foreign clients of our server, and our tool at a foreign server."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import HTTPServer, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pytest
from loopback import Answering, threaded, url_of

from tapo_train.build.remote_tools import build_remote_tools
from tapo_train.errors import ConfigError, ToolDownError
from tapo_train.recipe.compose import load_recipe
from tapo_train.tools import search_server
from tapo_train.tools.base import ToolContext
from tapo_train.tools.corpus import Passage
from tapo_train.tools.corpus_index import CorpusIndex
from tapo_train.tools.search_answer import FoundText, retrieved_texts
from tapo_train.tools.search_server import SearchServer
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Observation, Task

PASSAGES = [
    Passage(id="p0", title="Tavore", text="the metal of Tavore is iron."),
    Passage(id="p1", title="Tavore", text="the beast of Tavore is bear.\nSecond line."),
    Passage(id="p2", title="", text="lore of rivers and 铁塔"),
    Passage(id="p3", title="Miko", text="Tavore is the ally of Miko, they say, and so do others."),
]


@contextmanager
def running(server: HTTPServer) -> Iterator[str]:
    """Its address."""
    with threaded(server):
        yield f"{url_of(server)}/retrieve"


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    with running(SearchServer(CorpusIndex(PASSAGES), host="127.0.0.1", port=0)) as url:
        yield url


def posted(url: str, body: bytes) -> tuple[int, Any]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def foreign_search(url: str, queries: list[str], topk: int) -> list[str]:
    """As the generation loop of Search-R1 calls its retriever and shows what it found."""
    payload = {"queries": queries, "topk": topk, "return_scores": True}
    _, answer = posted(url, json.dumps(payload).encode())
    shown = []
    for result in answer["result"]:
        reference = ""
        for place, item in enumerate(result):
            content = item["document"]["contents"]
            title, text = content.split("\n")[0], "\n".join(content.split("\n")[1:])
            reference += f"Doc {place + 1}(Title: {title}) {text}\n"
        shown.append(reference)
    return shown


def test_a_foreign_client_gets_what_our_tool_gets(served: str) -> None:
    beast = 'Doc 1(Title: "Tavore") the beast of Tavore is bear.\nSecond line.\n'
    metal = 'Doc 2(Title: "Tavore") the metal of Tavore is iron.\n'
    assert foreign_search(served, ["Tavore beast", "铁塔", "unheard"], 2) == [
        beast + metal,
        'Doc 1(Title: "") lore of rivers and 铁塔\n',
        "",
    ]
    scores = [score for _, score in CorpusIndex(PASSAGES).ranked("Tavore beast", top_k=3)]
    _, answer = posted(served, b'{"queries": ["Tavore beast"], "return_scores": true}')
    assert [hit["score"] for hit in answer["result"][0]] == pytest.approx(scores), "three, if none"
    _, answer = posted(served, b'{"queries": ["beast"], "topk": null, "other": 1}')
    contents = '"Tavore"\nthe beast of Tavore is bear.\nSecond line.'
    assert answer == {"result": [[{"id": "p1", "contents": contents}]]}


@pytest.mark.parametrize(
    ("body", "status", "complaint"),
    [
        (b"{", 400, "body: Invalid JSON"),
        (b"[" * 5000, 400, "body: Invalid JSON"),
        (b"\xff", 400, "body: "),
        (b'{"topk": 1}', 400, "queries: Field required"),
        (b'{"queries": "q"}', 400, "queries: "),
        (b'{"queries": ["q", 1]}', 400, "queries.1: "),
        (b'{"queries": ["q"], "topk": 0}', 400, "topk: "),
        (b'{"queries": ["q"], "topk": 101}', 400, "topk: "),
        (json.dumps({"queries": ["q"] * 257}).encode(), 400, "queries: "),
    ],
)
def test_a_request_of_another_form_is_told_so(
    served: str, body: bytes, status: int, complaint: str
) -> None:
    found, answer = posted(served, body)
    assert (found, answer["detail"][: len(complaint)]) == (status, complaint)
    assert posted(served, json.dumps({"queries": ["q"] * 256, "topk": 100}).encode())[0] == 200


def said_to(url: str, *parts: bytes) -> bytes:
    """All a server says on one connection."""
    with socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0]))) as link:
        link.settimeout(30)
        for part in parts:
            link.sendall(part)
        link.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: link.recv(65536), b""))


def test_sizes_are_bounded_and_a_connection_is_used_again(served: str) -> None:
    body = b'{"queries": ["beast"]}'
    head = b"POST /%s HTTP/1.1\r\nContent-Length: %d\r\n\r\n"
    both = said_to(
        served, head % (b"other", len(body)), body, head % (b"retrieve", len(body)), body
    )
    assert both.startswith(b"HTTP/1.1 404 ") and both.count(b"HTTP/1.1 200 ") == 1
    for wrong, status in (
        (head % (b"retrieve", (1 << 20) + 1), b"413"),
        (head % (b"retrieve", 10**30), b"413"),
        (b"POST /retrieve HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"411"),
        (b"POST /retrieve HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"411"),
    ):
        said = said_to(served, wrong)
        assert said.startswith(b"HTTP/1.1 " + status) and said.count(b"HTTP/1.1") == 1
    assert said_to(served, b"GET /retrieve HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 501 ")


def test_connections_beyond_the_bound_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_server, "MAX_CONNECTIONS", 1)
    head = b"POST /retrieve HTTP/1.1\r\nContent-Length: 15\r\n\r\n"
    server = SearchServer(CorpusIndex(PASSAGES), host="127.0.0.1", port=0)
    with running(server) as url, socket.create_connection(server.server_address) as first:
        first.sendall(head)
        first.settimeout(30)
        with suppress(ConnectionError):
            assert said_to(url) == b""
        first.sendall(b'{"queries": []}')
        said = b""
        while not said.endswith(b'\r\n\r\n{"result": []}'):
            said += (more := first.recv(65536))
            assert more, said


def test_a_seat_is_free_again_when_its_connection_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_server, "MAX_CONNECTIONS", 1)
    body = b'{"queries": []}'
    once = b"POST /retrieve HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body)
    with running(SearchServer(CorpusIndex(PASSAGES), host="127.0.0.1", port=0)) as url:
        for _ in range(3):
            # The thread of the one before may need a moment to end.
            said = b""
            for _ in range(200):
                with suppress(ConnectionError):
                    said = said_to(url, once, body)
                if said:
                    break
                time.sleep(0.01)
            assert said.endswith(b'{"result": []}')


FOREIGN = {"q iron": [("1", '"Iron"\nFe is <b>a</b> metal'), ("2", "bare line")]}


class ForeignRetriever(Answering):
    """Written from the published form of Search-R1's server only."""

    asked: ClassVar[list[dict[str, Any]]]
    bare = False

    def do_POST(self) -> None:
        asked = json.loads(self.body())
        self.asked.append(asked)
        result: list[list[Any]] = []
        for query in asked["queries"]:
            documents = [{"id": i, "contents": c} for i, c in FOREIGN.get(query, [])]
            documents = documents[: asked["topk"]]
            scored = [{"document": document, "score": 0.5} for document in documents]
            result.append(documents if self.bare else scored)
        data = json.dumps({"result": result}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(data)


def searched(url: str, query: str) -> Observation:
    """Through the tool that a recipe makes."""
    form = "tools.text_endpoint_form=retrieve"
    overrides = [f"tools.text_endpoint={url}", form, "tools.corpus=null", "tools.text_top_k=2"]
    tools = build_remote_tools(load_recipe("recipes/demo_cpu.yaml", overrides), Counter())
    tool = tools["text_search_tool"]
    assert tool.version.startswith(f"2 retrieve={url} top_k=2 ")
    box = Toolbox([tool], deadline_s=30)
    request = box.read("text_search_tool", {"query": query})
    task = Task(id="t", question="?", images=(), answers=("x",))
    try:
        return asyncio.run(box.execute(request, ToolContext(images=(), task=task)))
    finally:
        box.close()


@pytest.mark.parametrize("is_bare", [False, True])
def test_our_tool_works_against_a_foreign_retriever(is_bare: bool) -> None:
    handler = type("Handler", (ForeignRetriever,), {"bare": is_bare, "asked": []})
    with running(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as url:
        assert searched(url, "q iron").text == "1. Iron: Fe is <b>a</b> metal\n2. bare line"
        assert searched(url, "unheard").text == "No results were found."
    assert handler.asked[0] == {"queries": ["q iron"], "topk": 2, "return_scores": True}


def test_our_tool_shows_the_same_from_our_server_as_from_the_index(served: str) -> None:
    index = CorpusIndex(PASSAGES)
    best = [passage.shown() for passage in index.search("Tavore beast", top_k=2)]
    wanted = f"1. {best[0]}\n2. {best[1]}".replace("\nSecond", " Second")
    assert searched(served, "Tavore beast").text.replace("\nSecond", " Second") == wanted


def test_documents_are_read_for_what_they_say_and_another_form_is_an_endpoint_that_is_down() -> (
    None
):
    documents = [
        {"document": {"id": "1", "title": "T", "text": "body", "url": "u"}, "score": 1},
        {"document": {"contents": '"A"\nb', "title": None}},
        {"document": {"contents": '"A"\nb', "title": "Given"}},
        {"document": "only text"},
    ]
    read = retrieved_texts(json.dumps({"result": [documents]}).encode())
    assert read == [
        FoundText(title="T", text="body", html="", url="u"),
        FoundText(title="A", text="b", html="", url=""),
        FoundText(title="Given", text='"A"\nb', html="", url=""),
        FoundText(title="", text="only text", html="", url=""),
    ]
    for nothing in ('{"result": []}', '{"result": [[]]}', '{"result": null}', '{"result": [null]}'):
        assert retrieved_texts(nothing.encode()) == []
    for other in ("{}", '{"results": []}', '{"result": [[], []]}', '{"result": [[1]]}',
                  '{"result": "x"}', '{"result": [[{"document": {"id": "1"}}]]}'):  # fmt: skip
        with pytest.raises(ToolDownError):
            retrieved_texts(other.encode())


def test_a_form_without_an_endpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match="text_endpoint_form: found retrieve without"):
        load_recipe("recipes/demo_cpu.yaml", ["tools.text_endpoint_form=retrieve"])


TRAINER = Path(__file__).resolve().parent.parent / "docs" / "examples" / "search_r1_trainer.py"


def invented(folder: Path) -> tuple[Path, Path]:
    """A corpus of 64 facts, and questions of which most words lead astray."""
    chosen, facts, asked = random.Random(0), [], []
    for house, kind in product(product(("ta", "ve", "mi", "ko"), ("vor", "las", "nim", "ras")),
                               ("metal", "beast", "river", "colour")):  # fmt: skip
        name, value = "".join(house), f"v{chosen.randrange(64)}"
        facts.append({"id": "", "title": name, "text": f"the {kind} of {name} is {value}."})
        question = f"please tell me which {kind} the house {name} has in the old chronicle"
        asked.append({"question": question, "answer": value})
    text = "please tell me which house the old chronicle has in it."
    facts += [{"id": "", "title": "chronicle", "text": text}] * 20
    corpus, questions = folder / "c.jsonl", folder / "q.jsonl"
    corpus.write_text("\n".join(map(json.dumps, facts)))
    questions.write_text("\n".join(map(json.dumps, chosen.sample(asked, 24))))
    return corpus, questions


def test_a_foreign_trainer_learns_against_the_command_until_it_is_told_to_stop(
    tmp_path: Path,
) -> None:
    assert set(re.findall(r"^(?:import|from) ([\w.]+)", TRAINER.read_text(), re.M)) == {
        *("json", "sys", "urllib.request", "zlib", "torch"),
    }, "nothing of ours"
    corpus, questions = invented(tmp_path)
    folder, command = tmp_path / "i", [sys.executable, "-m", "tapo_train"]
    subprocess.run([*command, "index", "build", corpus, "--out", folder], check=True, timeout=120)
    serving = subprocess.Popen(
        [*command, "serve-search", folder, "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert serving.stdout is not None
        said = serving.stdout.readline()
        assert said.startswith("serving 84 passages on http://127.0.0.1:")
        trained = subprocess.run(
            [sys.executable, "-I", TRAINER, said.split()[-1], questions],
            env={"OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=150,
            check=True,
        )
        os.kill(serving.pid, signal.SIGTERM)
        assert serving.communicate(timeout=60)[0] == "stopped\n" and serving.returncode == 0
    finally:
        serving.kill()
        serving.wait()
    right = [float(line.split()[-1]) for line in trained.stdout.splitlines()]
    assert len(right) == 25 and right[0] < 0.1 and min(right[-3:]) > 0.85, trained.stdout
