"""Vectors beside words: embedders, what they are refused for, and both searches together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from loopback import Answering, served_by, url_of

from tapo_train.build.services import build_embedder
from tapo_train.commands import index as command
from tapo_train.errors import ConfigError, DataError, ToolDownError
from tapo_train.recipe.compose import load_recipe
from tapo_train.recipe.services import DenseSettings
from tapo_train.tools import embedders
from tapo_train.tools.corpus import Passage
from tapo_train.tools.corpus_index import CorpusIndex
from tapo_train.tools.dense_index import HybridIndex, fused
from tapo_train.tools.embedders import FolderEmbedder

PASSAGES = [
    ("car", "The automobile stood in the garage."),
    ("cat", "A feline slept on the mat."),
    ("iron", "Velor is a metal of the north."),
]
MEANINGS = [("car", "automobile", "vehicle"), ("cat", "feline", "pet"), ("metal", "iron", "ore")]


def meaning(text: str) -> list[float]:
    """Words of one meaning have one vector."""
    counts = [float(sum(text.lower().count(word) for word in words)) for words in MEANINGS]
    return [*counts, 0.1]


class Endpoint(Answering):
    """Embeddings in OpenAI's form, in another order than asked."""

    asked: ClassVar[list[Any]]
    answer: ClassVar[list[bytes]]

    def do_POST(self) -> None:
        body = json.loads(self.body())
        self.asked.append((self.path, body, self.headers["authorization"]))
        rows = [{"index": n, "embedding": meaning(t)} for n, t in enumerate(body["input"])]
        self.say(self.answer[0] if self.answer else {"data": rows[::-1]})


@pytest.fixture
def endpoint() -> Iterator[tuple[str, type[Endpoint]]]:
    handler = type("Handler", (Endpoint,), {"asked": [], "answer": []})
    with served_by(handler) as server:
        yield f"{url_of(server)}/v1", handler


@pytest.fixture
def built(tmp_path: Path) -> tuple[Path, Path]:
    """Corpus and index."""
    corpus = tmp_path / "corpus.jsonl"
    lines = (json.dumps({"id": t, "title": t, "text": text}) for t, text in PASSAGES)
    corpus.write_text("\n".join(lines))
    command.main(["build", str(corpus), "--out", str(tmp_path / "index")])
    return corpus, tmp_path / "index"


def settings(url: str, **more: Any) -> DenseSettings:
    return DenseSettings(endpoint=url, model="m", query_prefix="query: ", **more)


def found(folder: Path, dense: DenseSettings, query: str, **weights: float) -> list[str]:
    async def search() -> list[str]:
        index = HybridIndex(folder, build_embedder(dense), **weights)
        try:
            return [passage.id for passage in await index.found(query, top_k=2)]
        finally:
            await index.close()

    return asyncio.run(search())


def embed(corpus: Path, folder: Path, url: str) -> None:
    endpoint = ["--model", "m", "--endpoint", url, "--query-prefix", "query: "]
    command.main(["embed", str(folder), str(corpus), *endpoint, "--key-variable", "EMBED_KEY"])


def test_a_passage_is_found_by_its_meaning_and_by_its_words(
    endpoint: tuple[str, type[Endpoint]],
    built: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, handler = endpoint
    monkeypatch.setenv("EMBED_KEY", "k3y-of-the-embedder")
    embed(*built, url)
    path, body, key = handler.asked[0]
    assert (path, key) == ("/v1/embeddings", "Bearer k3y-of-the-embedder")
    assert body == {"model": "m", "input": [f"{t}: {text}" for t, text in PASSAGES]}
    folder = built[1]
    assert CorpusIndex.load(folder).search("vehicle", top_k=2) == []
    assert found(folder, settings(url), "vehicle")[0] == "car"
    assert handler.asked[-1][1]["input"] == ["query: vehicle"]
    # Words say cat, meaning says car: the weights decide.
    assert found(folder, settings(url), "vehicle on the mat")[0] == "car"
    by_words = found(folder, settings(url), "vehicle on the mat", dense_weight=0.1)
    assert by_words[0] == "cat"


def test_weighed_scores_are_brought_to_one_and_ties_come_in_order() -> None:
    near, told = [(7, 0.9), (1, 0.5), (3, 0.1)], [(3, 12.0), (7, 2.0)]
    # 7: 1 + 0, 1: 0.5, 3: 0 + 0.5
    assert fused([near, told], (1.0, 0.5)) == [7, 1, 3]
    assert fused([near, told], (1.0, 0.6)) == [7, 3, 1]
    assert fused([[], [(2, 3.0)]], (1.0, 0.5)) == [2]
    assert fused([[], []], (1.0, 0.5)) == []


def test_a_number_leads_to_its_passage() -> None:
    rows = [Passage(id=str(n), title="", text=f"word{n} same") for n in range(5)]
    index = CorpusIndex(rows)
    assert [index.passage(n) for n in range(5)] == rows
    assert [n for n, _ in index.numbered("same word3", top_k=3)] == [3, 0, 1]


def test_vectors_of_another_embedder_or_corpus_are_refused(
    endpoint: tuple[str, type[Endpoint]],
    built: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, _ = endpoint
    corpus, folder = built
    monkeypatch.setenv("EMBED_KEY", "k3y-of-the-embedder")
    with pytest.raises(DataError, match="wanted python -m tapo_train index embed"):
        HybridIndex(folder, build_embedder(settings(url)))
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text().replace("feline", "tiger"))
    with pytest.raises(DataError, match=r"found other passages than corpus.jsonl gave it"):
        embed(other, folder, url)
    other.write_text(corpus.read_text() + '\n{"id": "4", "title": "", "text": "more"}')
    with pytest.raises(DataError, match="more passages than it has"):
        embed(other, folder, url)
    assert not list(folder.glob("dense*"))
    embed(corpus, folder, url)
    with pytest.raises(DataError, match="found vectors of endpoint:m::query: , wanted those of"):
        HybridIndex(folder, build_embedder(settings(url, passage_prefix="passage: ")))
    other.write_text('{"id": "4", "title": "", "text": "more"}')
    command.main(["add", str(folder), str(other)])
    with pytest.raises(DataError, match="found vectors of other passages"):
        HybridIndex(folder, build_embedder(settings(url)))


@pytest.mark.parametrize(
    "answer",
    [
        b"{}",
        b'{"data": []}',
        b'{"data": [{"embedding": [1]}]}',
        b'{"data": [{"index": 1, "embedding": [1, 2]}]}',
        b'{"data": [{"index": 0, "embedding": [1, null]}]}',
        b'{"data": [{"index": 0, "embedding": [1, NaN]}]}',
        b'{"data": [{"index": 0, "embedding": "text"}]}',
    ],
)
def test_an_endpoint_that_answers_otherwise_is_down(
    endpoint: tuple[str, type[Endpoint]], answer: bytes
) -> None:
    url, handler = endpoint
    handler.answer.append(answer)

    async def ask() -> None:
        embedder = build_embedder(settings(url))
        try:
            await embedder.embed(["x"], is_query=True)
        finally:
            await embedder.close()

    with pytest.raises(ToolDownError, match="another form"):
        asyncio.run(ask())


MODES = {
    "pooling_mode_mean_tokens": lambda hidden: hidden.mean(axis=0),
    "pooling_mode_cls_token": lambda hidden: hidden[0],
}


class TinyBert:
    """A random sentence-transformers folder, and what its model says of a text."""

    def __init__(self, folder: Path) -> None:
        import torch
        import transformers

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "car", "mat", "query", ":"]
        (folder / "vocab.txt").write_text("\n".join(words))
        self.folder = folder
        self.tokenizer = transformers.BertTokenizerFast(vocab_file=str(folder / "vocab.txt"))
        self.tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=10,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
        self.model = transformers.BertModel(config).eval()
        self.model.save_pretrained(folder)

    def pools(self, mode: str) -> None:
        """Write what the folder says of its pooling."""
        (self.folder / "1_Pooling").mkdir(exist_ok=True)
        pooling = {"word_embedding_dimension": 16, mode: True}
        (self.folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))

    def hidden(self, text: str) -> np.ndarray:
        """[T, 16]"""
        import torch

        with torch.inference_mode():
            states = self.model(**self.tokenizer(text, return_tensors="pt")).last_hidden_state
        return states[0].numpy()


def test_a_folder_of_sentence_transformers_is_pooled_as_it_says(tmp_path: Path) -> None:
    """Against the mean and the first token, computed by hand from the model's own output."""
    bert = TinyBert(tmp_path)
    with pytest.raises(DataError, match="wanted a sentence-transformers folder"):
        FolderEmbedder(tmp_path)
    for mode, by_hand in MODES.items():
        bert.pools(mode)
        embedder = FolderEmbedder(tmp_path, query_prefix="query: ")
        asked = asyncio.run(embedder.embed(["cat", "car mat cat"], is_query=True))
        for text, vector in zip(("query: cat", "query: car mat cat"), asked, strict=True):
            wanted = by_hand(bert.hidden(text))
            assert np.allclose(vector, wanted / np.linalg.norm(wanted), atol=1e-5)
    bert.pools("pooling_mode_max_tokens")
    with pytest.raises(DataError, match="wanted mean or first token"):
        FolderEmbedder(tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_a_text_longer_than_the_model_reads_counts_to_its_end(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of three words and two marks, each by hand; the mean is one over all their tokens."""
    monkeypatch.setattr(embedders, "_TOGETHER", 2)
    bert = TinyBert(tmp_path)
    bert.pools(mode)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    texts = {
        "cat": ["cat"],
        "car mat cat mat cat cat car": ["car mat cat", "mat cat cat", "car"],
        "mat car": ["mat car"],
    }
    found = asyncio.run(FolderEmbedder(tmp_path).embed(list(texts), is_query=False))
    for vector, pieces in zip(found, texts.values(), strict=True):
        hidden = [bert.hidden(piece) for piece in pieces]
        weights = [len(one) if mode == "pooling_mode_mean_tokens" else 1 for one in hidden]
        wanted = sum(MODES[mode](one) * w for one, w in zip(hidden, weights, strict=True))
        assert np.allclose(vector, wanted / np.linalg.norm(wanted), atol=1e-5)


def test_a_recipe_names_one_embedder() -> None:
    for dense in ("{}", "{folder: f, endpoint: 'http://h/v1'}"):
        with pytest.raises(ConfigError, match=r"tools.dense: found both or neither"):
            load_recipe("recipes/demo_cpu.yaml", [f"tools.dense={dense}"])
