"""Questions in other words than the passage they ask for: by words, by vectors, by both.

`python scripts/bench_paraphrases.py --model DIR` indexes `docs/*.md` and embeds it with a
sentence-transformers folder; `--world DIR` adds facts of a demo's world. A question counts as
answered if the passage it was written for is among the first three. A question whose passage is no
longer there is left out, and said. The controls ask for the same passages by words of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tapo_train.tools.corpus import Passage, read_passages
from tapo_train.tools.corpus_index import CorpusIndex, build_index
from tapo_train.tools.dense_index import HybridIndex, embed_index
from tapo_train.tools.embedders import FolderEmbedder

DOCS = Path(__file__).resolve().parent.parent / "docs"
TOP = 3
WAYS = {
    "words": None,
    "vectors": (1.0, 0.0),
    "vectors 1, words 0.5": (1.0, 0.5),
    "1 and 1": (1.0, 1.0),
}
"""Weights of vectors and words; None: the index of words alone."""

QUESTIONS = (
    ("how large can a downloaded file get before it is cut off", "gzip alone is"),
    ("can a harmful photo crash the trainer", "in a process of their own (`tools/sandbox.py`)"),
    ("stop the agent from reaching machines inside our company", "are refused however they are"),
    ("repeat an experiment later with no internet", "answers from there alone: the HTTP client"),
    ("my job got interrupted, how do I pick up from there", "Give the same command again"),
    ("does saving pause the optimisation", "written by a thread while training goes on"),
    ("the file of saved parameters is corrupted", "goes back to the last good"),
    ("change the step size halfway through an experiment", "a changed learning rate, beta"),
    ("what to do when the cluster asks us to quit", "at a border of a step, on all ranks"),
    ("the program is frozen and nothing happens any more", "all ranks dump the Python stacks of"),
    ("the network is too big for my graphics card", "cannot fit is refused with the field"),
    ("why not compress the momentum buffers to one byte", "There is no 8-bit AdamW"),
    ("how much space do the vocabulary scores need", "would take 30 GB for its logits"),
    ("the answers all become identical over time", "attempts become copies"),
    ("the agent gave up looking things up", "guessing pays as well"),
    ("it learned to format but not to be correct", "the form is learned, the task is not"),
    ("collecting experience is the bottleneck", "let the next questions begin before"),
    ("combine several computers", "the same line on each of the four"),
    ("queue system killed my job because the hour was over", "A job that is cut off by its time"),
    ("let half of the cards only generate", "Or some devices only sample"),
    ("avoid learning from questions used in the exam", "what training files share with test"),
    ("a dataset that must not leak is protected by a password", "Put its canary into"),
    ("skip questions that are trivial for the current agent", "`data.mixture` keeps questions"),
    ("is one agent significantly better than the other", "McNemar's exact p"),
    ("check whether it made the answer up", "an observation holds the answer's words"),
    ("score a model that somebody else hosts", "It gets the tools in the request and may"),
    ("build training examples from what went well", "keeps attempts that are right and of"),
    ("protect the sampling machines from strangers", "a middleware stands in front of every"),
    ("what if a generation machine dies", "its requests are asked again elsewhere"),
    ("send a link to what one episode did to a colleague", "has an address of its own"),
    (
        "draw the curves of several experiments together",
        "The report holds the recipes' differences",
    ),
    ("does it work without an account for the online charts", "no account and no network never"),
    ("limit how much money is spent on paid lookups", "is never exceeded: a price is taken"),
    ("too many simultaneous calls annoy my server", "hold on each rank: with 8 ranks"),
    ("write my own function the agent can use", "is a tool. Put this into `my_tools.py`"),
    ("searching in Asian languages", "are written without the blanks that would"),
    ("find where a snapshot comes from though it was trimmed", "is found by what it shows"),
    ("make the fetched article shorter before the agent sees it", "With `summary` an OpenAI"),
    ("where do passwords for paid services belong", "Keys come from the environment alone"),
    ("a game that keeps its state between moves", "Each trajectory has an instance of"),
    ("read-only questions to a relational database", "an authorizer lets a query"),
    ("add support for an architecture that is not on the list", "A family is a frozen"),
    ("does a reasoning model keep its earlier thoughts", "Here a conversation only grows"),
    ("cluster of equal lookups in good episodes", "The calls of successful attempts are"),
    ("which clip shows a moment, with start and end", "compares intervals"),
)
"""(question, words that only its passage holds)"""


FACTS = {
    "rival": "who is the enemy of {}",
    "seat": "where does the house {} reside",
    "trade": "what goods does {} deal in",
    "founder": "who established {}",
    "metal": "which ore does {} stand for",
    "ally": "who is the friend of {}",
    "beast": "which animal belongs to {}",
}
"""What a world's documents tell of its houses, and how else one may ask for it."""
FACT = re.compile(r"the (\w+) of (\w+) is ")
NUM_FACTS = 100

Asked = list[tuple[str, str]]
"""Question, and id of its passage."""


def of_docs(passages: Sequence[Passage]) -> dict[str, Asked]:
    """The questions of this file, and five words of each passage they are for."""
    asked: Asked = []
    own: Asked = []
    rng = random.Random(0)
    for question, words in QUESTIONS:
        holders = [one for one in passages if words in " ".join(one.text.split())]
        if len(holders) == 1:
            asked.append((question, holders[0].id))
            longer = sorted(set(re.findall(r"[A-Za-z]{5,}", holders[0].text)))
            own.append((" ".join(rng.sample(longer, min(5, len(longer)))), holders[0].id))
        else:
            print(f"left out: {words!r} is in {len(holders)} passages")
    return {"other words": asked, "five of its words": own}


def of_world(passages: Sequence[Passage]) -> dict[str, Asked]:
    """Facts of a world, asked for by their words and in others."""
    told = [(FACT.search(one.text), one.id) for one in passages]
    facts = [(found[1], found[2], name) for found, name in told if found and found[1] in FACTS]
    chosen = random.Random(0).sample(facts, NUM_FACTS)
    return {
        "other words": [(FACTS[key].format(house), name) for key, house, name in chosen],
        "its words": [(f"{key} of {house}", name) for key, house, name in chosen],
    }


async def answered(index: CorpusIndex | HybridIndex, asked: Asked) -> set[str]:
    """The questions whose passage is among the first."""
    hits = set()
    for question, passage in asked:
        found = await index.found(question, top_k=TOP)
        hits |= {question} if passage in {one.id for one in found} else set()
    return hits


async def trial(
    source: Path,
    embedder: FolderEmbedder,
    questions: Callable[[Sequence[Passage]], dict[str, Asked]],
) -> None:
    """Build, embed, ask, and say what came of it."""
    passages = list(read_passages([source]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "index"
        build_index(folder, [source])
        begun, cpu = time.perf_counter(), time.process_time()
        await embed_index(folder, [source], embedder)
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
        characters = sum(len(one.shown()) for one in passages) / len(passages)
        print(
            f"{source.name}: {len(passages)} passages of {characters:.0f} characters; for 1,000 of "
            f"them {1000 * wall / len(passages):.1f} s, {1000 * cpu / len(passages):.1f} CPU-s"
        )
        for kind, asked in questions(passages).items():
            hits = {
                way: await answered(
                    CorpusIndex.load(folder)
                    if weights is None
                    else HybridIndex(
                        folder, embedder, dense_weight=weights[0], words_weight=weights[1]
                    ),
                    asked,
                )
                for way, weights in WAYS.items()
            }
            row = ", ".join(f"{way} {len(found)}" for way, found in hits.items())
            print(f"  {kind}: of {len(asked)} among the first {TOP}: {row}")


async def main() -> int:
    """The documentation, and a world if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--world", type=Path, help="folder that `tapo_train world` wrote")
    arguments = parser.parse_args()
    embedder = FolderEmbedder(arguments.model)
    await trial(DOCS, embedder, of_docs)
    if arguments.world:
        await trial(arguments.world / "corpus.jsonl", embedder, of_world)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
