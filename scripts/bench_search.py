"""The text index beside bm25s in memory and SQLite's FTS5: building, opening, asking, finding.

    python scripts/bench_search.py --passages 100000 --folder /tmp/bench_search

An invented corpus: words by Zipf-Mandelbrot, topics, 62 words a passage on average. As in a natural
language stop words take the most frequent ranks; the most frequent other word is in some 5 % of the
passages. Queries are 4 to 8 words of one passage, every second one with three stop words in front.
recall@3 is against exhaustive BM25 over the same words with the same k1 and b and exact lengths,
which is what bm25s computes here; a passage counts as found when its exact score reaches the third
best. Each figure is of a process of its own; seconds are CPU time where it says so.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 300_000
TOPICS = 20_000
STOP_RANKS = 92
"""Ranks of the vocabulary that stop words take."""
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstv" for vowel in "aeiou"]
STOP_WORDS = ["the", "of", "is", "in", "and", "to", "was", "a"]
RANKS = 4
CALLERS = 8
FEWER = 60
"""Queries that FTS5 is asked."""


def words_of(count: int) -> list[str]:
    base = len(SYLLABLES)
    return [
        "".join(SYLLABLES[number // base**place % base] for place in range(4))
        for number in np.random.default_rng(1).permutation(base**4)[:count]
    ]


def write_corpus(path: Path, passages: int, queries: int) -> list[str]:
    """The corpus, and queries for it."""
    rng, words = np.random.default_rng(2), words_of(VOCABULARY)
    weights = 1 / (np.arange(VOCABULARY) + STOP_RANKS + 2.7) ** 1.07
    cumulated = np.cumsum(weights / weights.sum())
    topics = np.searchsorted(cumulated, rng.random((TOPICS, 40)))
    asked_of = set(rng.choice(passages, queries, replace=False).tolist())
    asked: list[str] = []
    with path.open("w") as file:
        for number in range(passages):
            length = int(rng.integers(25, 100))
            common = np.searchsorted(cumulated, rng.random(length))
            about = rng.choice(topics[rng.integers(TOPICS)], length)
            chosen = np.where(rng.random(length) < 0.4, about, common)
            text = [words[place] for place in chosen]
            for place in range(0, length, 4):
                text[place] = STOP_WORDS[int(rng.integers(len(STOP_WORDS)))]
            file.write(json.dumps({"id": str(number), "title": "", "text": " ".join(text)}) + "\n")
            if number in asked_of:
                content = [word for word in text if word not in STOP_WORDS]
                drawn = rng.choice(content, int(rng.integers(4, 9))).tolist()
                asked.append(" ".join(STOP_WORDS[:3] * (len(asked) % 2) + drawn))
    return asked


def build(corpus: Path, folder: Path) -> dict[str, float]:
    """`index build` in a process of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "tapo_train", "index", "build", str(corpus)]
    started = time.monotonic()
    process = subprocess.Popen([*command, "--out", str(folder)])
    peak, ended = 0.0, 0
    while not ended:
        peak = max(peak, peak_mb(process.pid))
        time.sleep(0.05)
        ended, status, used = os.wait4(process.pid, os.WNOHANG)
    if status:
        raise SystemExit(f"index build ended with {status}")
    return {
        "build_s": time.monotonic() - started,
        "build_cpu_s": used.ru_utime + used.ru_stime,
        "build_peak_mb": peak,
        "disk_mb": sum(file.stat().st_size for file in folder.iterdir()) / 1e6,
    }


def peak_mb(process: int | str) -> float:
    """Of a living process; ru_maxrss would hold its parent's, too."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM")), 0.0)


def asked_ms(search: Callable[[str], Any], queries: list[str], callers: int) -> dict[str, float]:
    def one(query: str) -> float:
        started = time.perf_counter()
        search(query)
        return 1e3 * (time.perf_counter() - started)

    for query in queries[:50]:
        search(query)
    started = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        took = list(pool.map(one, queries))
    seconds = time.perf_counter() - started
    p50, p95 = np.quantile(took, [0.5, 0.95])
    found = {"p50_ms": float(p50), "p95_ms": float(p95), "per_s": len(queries) / seconds}
    return {f"{name}_{callers}": value for name, value in found.items()}


def memory_mb() -> dict[str, float]:
    """What only this process holds, and its share of what several map."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kb = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    own = kb["Private_Clean"] + kb["Private_Dirty"]
    return {"anonymous_mb": kb["Anonymous"] / 1e3, "own_mb": own / 1e3, "pss_mb": kb["Pss"] / 1e3}


def ours(folder: Path, queries: list[str]) -> dict[str, Any]:
    from tapo_train.tools.corpus_index import CorpusIndex

    before = memory_mb()["anonymous_mb"]
    started = time.perf_counter()
    index = CorpusIndex.load(folder)
    opened_s = time.perf_counter() - started
    alone = asked_ms(lambda query: index.search(query, top_k=3), queries, 1)
    together = asked_ms(lambda query: index.search(query, top_k=3), queries, CALLERS)
    grown = memory_mb()["anonymous_mb"] - before
    found = [[int(p.id) for p in index.search(query, top_k=3)] for query in queries]
    return {"open_s": opened_s, **alone, **together, "anonymous_mb": grown, "found": found}


def one_rank(folder: Path, queries: list[str]) -> dict[str, float]:
    """One of several processes that open the index at the same time."""
    from tapo_train.tools.corpus_index import CorpusIndex

    before = memory_mb()
    started = time.perf_counter()
    index = CorpusIndex.load(folder)
    opened_s = time.perf_counter() - started
    for query in queries:
        index.search(query, top_k=3)
    return {"open_s": opened_s, "grown_mb": memory_mb()["anonymous_mb"] - before["anonymous_mb"]}


def analysed(corpus: Path) -> Iterator[list[str]]:
    """The words of each passage, as the index has them."""
    from tapo_train.tools.corpus_index import analyser

    words = analyser()
    with corpus.open() as file:
        for line in file:
            yield words.analyze(json.loads(line)["text"])


def asked_words(queries: list[str]) -> dict[str, list[str]]:
    """The words each query looks for."""
    from tapo_train.tools.corpus_index import words_asked

    return {query: words_asked(query) for query in queries}


def exhaustive(corpus: Path, queries: list[str]) -> dict[str, Any]:
    """bm25s over the same words: its cost, and every passage's exact score."""
    import bm25s

    started = time.process_time()
    # Numbers, since a million lists of strings are 5 GB.
    vocabulary: dict[str, int] = {}
    numbers = [
        np.array([vocabulary.setdefault(word, len(vocabulary)) for word in words], np.int32)
        for words in analysed(corpus)
    ]
    bm25 = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    bm25.index((numbers, vocabulary), show_progress=False)
    built = {"build_cpu_s": time.process_time() - started}
    passages = len(numbers)
    del numbers
    words = asked_words(queries)

    def best(query: str, count: int) -> dict[int, float]:
        scores = bm25.get_scores([word for word in words[query] if word in vocabulary])
        places = np.argpartition(-scores, count)[:count]
        places = places[np.lexsort((places, -scores[places]))]
        return {int(place): float(scores[place]) for place in places if scores[place] > 0}

    exact = [best(query, min(100, passages - 1)) for query in queries]
    peak = peak_mb("self")
    costs = built
    for callers in (1, CALLERS):
        costs |= asked_ms(lambda query: best(query, 3), queries, callers)
    return {**costs, "peak_mb": peak, "anonymous_mb": memory_mb()["anonymous_mb"], "exact": exact}


def full_text(corpus: Path, queries: list[str]) -> dict[str, Any]:
    """SQLite's FTS5 over the same words."""
    path = corpus.with_suffix(".sqlite")
    path.unlink(missing_ok=True)
    started = time.process_time()
    base = sqlite3.connect(path)
    base.execute("CREATE VIRTUAL TABLE passages USING fts5(words, content='')")
    rows = ((number, " ".join(words)) for number, words in enumerate(analysed(corpus)))
    with base:
        base.executemany("INSERT INTO passages(rowid, words) VALUES (?, ?)", rows)
    base.close()
    costs: dict[str, Any] = {"build_cpu_s": time.process_time() - started}
    costs["disk_mb"] = path.stat().st_size / 1e6
    words, of_this_thread = asked_words(queries), threading.local()

    def search(query: str) -> list[int]:
        if not hasattr(of_this_thread, "base"):
            of_this_thread.base = sqlite3.connect(path)
        wanted = " OR ".join(f'"{word}"' for word in words[query])
        found = "SELECT rowid FROM passages WHERE passages MATCH ? ORDER BY rank LIMIT 3"
        return [row[0] for row in of_this_thread.base.execute(found, (wanted,))]

    for callers in (1, CALLERS):
        costs |= asked_ms(search, queries, callers)
    return costs | {"found": [search(query) for query in queries]}


def recall(found: list[list[int]], exact: list[dict[int, float]]) -> dict[str, float]:
    hits = wanted = first = 0
    for ids, scores in zip(found, exact, strict=True):
        best = sorted(scores.values(), reverse=True)[:3]
        wanted += len(best)
        hits += sum(scores.get(name, 0.0) >= best[-1] - 1e-5 for name in ids)
        first += scores.get(ids[0], 0.0) >= best[0] - 1e-5
    return {"recall_at_3": hits / wanted, "best_first": first / len(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--alone", action="store_true", help="without bm25s and SQLite")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    corpus, index = arguments.folder / "corpus.jsonl", arguments.folder / "index"
    queries = write_corpus(corpus, arguments.passages, arguments.queries)
    result: dict[str, Any] = {"passages": arguments.passages, "index": build(corpus, index)}
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        result["index"] |= pool.apply(ours, (index, queries))
    with context.Pool(RANKS) as pool:
        ranks = pool.starmap(one_rank, [(index, queries)] * RANKS, chunksize=1)
    result["ranks"] = {
        "open_s": max(rank["open_s"] for rank in ranks),
        "grown_mb": max(rank["grown_mb"] for rank in ranks),
    }
    found = result["index"].pop("found")
    print(json.dumps(result, indent=1), flush=True)
    if arguments.alone:
        return
    with context.Pool(1) as pool:
        result["bm25s"] = pool.apply(exhaustive, (corpus, queries))
    exact = result["bm25s"].pop("exact")
    result["index"] |= recall(found, exact)
    print(json.dumps(result, indent=1), flush=True)
    with context.Pool(1) as pool:
        # Each of its queries takes a hundred times as long.
        result["fts5"] = pool.apply(full_text, (corpus, queries[:FEWER]))
    result["fts5"] |= recall(result["fts5"].pop("found"), exact[:FEWER])
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
