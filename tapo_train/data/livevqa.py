"""LiveVQA's news benchmark: benchmark.json and a folder of news photographs.

Each item holds a level-1 question (about what is seen) and a level-2 question
(which needs a search), each with options, the letter of the right one and a list
of accepted answers. They become two tasks. The policy is not shown the options:
the question is answered freely, as in the search systems' evaluations. Accepted
are the list's entries and the text of the right option without its letter.

Deviation: the official score is a judge model's; here it is exact match.
"""

from __future__ import annotations

import re

from tapo_train.data.drafts import Draft, Source
from tapo_train.data.rows import Row

__all__ = ["livevqa_drafts"]

_LEVELS = ("level1_qa", "level2_qa")
_OPTION = re.compile(r"\s*([A-Z])\s*[.):]\s*(.*\S)\s*", re.DOTALL)


def livevqa_drafts(row: Row, source: Source) -> list[Draft]:
    """Two tasks per item, `<id>/level1` and `<id>/level2`."""
    picture = source.from_path(row, row.text("img_path"))
    return [_draft(row, level, picture) for level in _LEVELS]


def _draft(row: Row, level: str, picture: int) -> Draft:
    qa = row.inner(level)
    options = _options(qa)
    letter = qa.text("Ground_Truth").strip()
    if letter not in options:
        raise qa.wrong("Ground_Truth", f"the letter of one of the options {sorted(options)}")
    return Draft(
        id=f"{row.identifier('id')}/{level.removesuffix('_qa')}",
        question=qa.text("question"),
        pictures=(picture,),
        answers=tuple(dict.fromkeys((*qa.answers("Ground_Truth_List"), options[letter]))),
        source=f"livevqa/{level.removesuffix('_qa')}",
        metadata={
            "question_type": qa.optional_text("question_type"),
            "publisher": row.optional_text("source"),
            "time": row.optional_text("time"),
        },
    )


def _options(qa: Row) -> dict[str, str]:
    """Letter -> text of every option; `C. Boston` or `C) Boston`."""
    options: dict[str, str] = {}
    for option in qa.texts("options"):
        match = _OPTION.fullmatch(option)
        if match is None or match[1] in options:
            raise qa.wrong("options", "texts like 'A. Boston', each letter once")
        options[match[1]] = match[2]
    return options
