"""FVQA (lmms-lab/FVQA, MMSearch-R1): parquet with embedded pictures.

Columns: prompt list<struct{role, content}>, images list<struct{bytes, path}>,
reward_model struct{ground_truth: str, candidate_answers: JSON text of a list, style},
data_source, and in the full files data_id and category. Accepted answers are the
ground truth, then the candidates, as in that system's training reward. The pickled
image-search caches published beside it are not read: a pickle can run code.

Files like it are read too: candidates as a list column or blank, answers in the shapes that
`Row.answers` reads, numbers as data_id, messages in the shapes of `prompt.py`, pictures under
`image`, no pictures at all.
"""

from __future__ import annotations

from typing import Any

from tapo_train.data.drafts import Draft, Source
from tapo_train.data.pictures import PICTURE_KEYS, picture_entries
from tapo_train.data.prompt import question_of
from tapo_train.data.rows import Row, parse_json

__all__ = ["fvqa_drafts"]

_USED = ("prompt", "reward_model", *PICTURE_KEYS, "data_source", "data_id")


def fvqa_drafts(row: Row, source: Source) -> list[Draft]:
    """The task of a row; without data_id it is named `<file stem>_<row>`."""
    field, entries = picture_entries(row)
    pictures = tuple(
        source.from_entry(row, field, number, entry) for number, entry in enumerate(entries)
    )
    has_id = row.fields.get("data_id") is not None
    draft = Draft(
        id=row.identifier("data_id") if has_id else source.row_name,
        question=question_of(row, num_images=len(pictures), intake=source.intake),
        pictures=pictures,
        answers=_answers(row.inner("reward_model")),
        source=row.optional_text("data_source"),
        metadata={
            key: value
            for key, value in row.fields.items()
            if key not in _USED and value is not None
        },
    )
    return [draft]


def _answers(reward_model: Row) -> tuple[str, ...]:
    truth = reward_model.answers("ground_truth")
    value = reward_model.fields.get("candidate_answers")
    if isinstance(value, str) and value.strip():
        value = parse_json(value, where=f"{reward_model.where}: candidate_answers")
    if value in (None, []) or (isinstance(value, str) and not value.strip()):
        return truth
    candidates = Row(reward_model.where, {"candidate_answers": [truth[0], *_listed(value)]})
    return tuple(dict.fromkeys((*truth, *candidates.answers("candidate_answers"))))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
