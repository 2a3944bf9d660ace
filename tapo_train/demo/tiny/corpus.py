"""The English the tiny tokenizer learns its merges from: everything the world can say."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tapo_train.demo.tiny.tokenizer import without_names
from tapo_train.demo.world.demonstrations import SYSTEM_PROMPT, sample_phrases
from tapo_train.demo.world.houses import make_corpus, make_houses
from tapo_train.demo.world.lexicon import SYLLABLES
from tapo_train.demo.world.questions import make_questions
from tapo_train.tools.crop import ZoomTool
from tapo_train.tools.image_search import ImageIndex, ImageSearchTool
from tapo_train.tools.images import ImageDecoder
from tapo_train.tools.text_search import CorpusIndex, Passage, TextSearchTool
from tapo_train.tools.toolbox import Toolbox

_GENERAL = """\
The quick brown fox jumps over the lazy dog while seven people watch from the bridge. In which
year was the old city founded, and who was its first president? The event in this picture is a
football match between two national teams. According to the news, the minister said on Monday
that the company will open a new factory. How many countries border the river? The question
cannot be answered from the image alone, so a search is needed. Error: there is no such tool;
known tools are listed above. The argument is missing, must be a number, must not be empty.
"""


def tokenizer_texts() -> Iterator[str]:
    """Deterministic texts, invented names removed; numbers of boxes as words of their own."""
    seed = 20_000
    houses = make_houses(seed, counts={"train": 40, "validation": 10, "test": 10})
    questions = make_questions(seed, houses, split="train", count=200)
    texts = [question.text for question in questions]
    texts += [f"{entry.title}: {entry.text}" for entry in make_corpus(seed, houses)]
    texts += [phrase for q in questions for phrase in sample_phrases(q, random.Random(q.id))]
    texts += [SYSTEM_PROMPT, *_signatures()] * 20
    texts += [_GENERAL] * 3
    texts += ["system\n", "user\n", "assistant\n", "<tools>\n</tools>"] * 20
    texts += [form for n in range(0, 1001, 50) for form in (f"{n}", f", {n}")] * 40
    for text in texts:
        yield without_names(text, syllables=SYLLABLES)


def _signatures() -> list[str]:
    """Name, argument names and description of each tool, as the chat template writes them."""
    decoder = ImageDecoder()
    passage = Passage(id="0", title="", text="nothing here")
    tools = (
        ZoomTool(decoder),
        ImageSearchTool(ImageIndex.of([]), decoder),
        TextSearchTool(CorpusIndex([passage])),
    )
    functions = [schema["function"] for schema in Toolbox(tools, deadline_s=1).schemas()]
    return [
        f"\n{f['name']}({', '.join(f['parameters']['properties'])}): {f['description']}"
        for f in functions
    ]
