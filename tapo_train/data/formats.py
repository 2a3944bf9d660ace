"""The forms in which task files are published, one description each.

A file's form is told from the columns of its first row. What a description cannot say is a function
of a row, which gives it the columns that the description reads.
"""

from __future__ import annotations

from collections.abc import Sequence

from tapo_train.data.described import Format, Pictures
from tapo_train.data.fvqa import fvqa_drafts
from tapo_train.data.livevqa import livevqa_drafts
from tapo_train.data.native import native_drafts
from tapo_train.data.rows import Row
from tapo_train.data.sealed import opened

__all__ = ["BY_NAME", "FORMATS", "format_of", "known_columns"]


def _infoseek(row: Row) -> Row:
    """Numbers are judged by a range, which `answer_eval` holds as {"wikidata", "range"}."""
    value = row.fields.get("answer_eval")
    listed = value if isinstance(value, list) else [value]
    first = listed[0] if listed else None
    if isinstance(first, dict):
        bounds = first.get("range")
        if not isinstance(bounds, list) or len(bounds) < 2:
            raise row.wrong("answer_eval", 'texts, or {"range": [low, high]}')
        return Row(row.where, {**row.fields, "answer_eval": [f"{bounds[0]} - {bounds[1]}"]})
    if len(listed) == 2 and all(isinstance(one, int | float) for one in listed):
        return Row(row.where, {**row.fields, "answer_eval": [f"{listed[0]} - {listed[1]}"]})
    return row


def _with_database(row: Row) -> Row:
    """BIRD's hint belongs to the question, as its own prompts have it."""
    evidence = row.optional_text("evidence") if row.fields.get("evidence") else ""
    question = row.text("question") + (f"\nHint: {evidence}" if evidence else "")
    return Row(row.where, {**row.fields, "question": question})


FORMATS: Sequence[Format] = (
    Format(
        name="vision_deepresearch",
        columns=("question", "answer", "image_packed"),
        pictures=Pictures(columns=("image_packed",), packed=True),
        source="vision_deepresearch",
        metric="judge",
    ),
    Format(
        name="mmsearch",
        columns=("sample_id", "query", "query_image", "gt_requery", "gt_answer"),
        id="sample_id",
        question="query",
        answers=("gt_answer", "alternative_gt_answers"),
        pictures=Pictures(columns=("query_image",)),
        source="mmsearch",
        metric="token_f1",
    ),
    Format(
        name="mmsearch_plus",
        columns=("question", "answer", "img_1"),
        pictures=Pictures(columns=("img_1", "img_2", "img_3", "img_4", "img_5")),
        source="mmsearch_plus",
        metric="judge",
        prepare=opened,
    ),
    Format(
        name="infoseek",
        columns=("data_id", "image_id", "question", "answer_eval"),
        id="data_id",
        answers=("answer_eval",),
        pictures=Pictures(columns=("image_id",), endings=(".jpg", ".JPEG", ".jpeg", ".png")),
        source="infoseek",
        metric="infoseek",
        prepare=_infoseek,
        companions=("qtype", "withkb"),
    ),
    Format(
        name="simplevqa",
        columns=("data_id", "image", "language", "question", "answer"),
        id="data_id",
        pictures=Pictures(columns=("image",), text="base64"),
        source="simplevqa",
        metric="judge",
    ),
    Format(
        name="mat_search",
        columns=("id", "question", "answer", "image_path"),
        pictures=Pictures(columns=("image_path",), folder="MAT-Search-image"),
        source="mat_search",
        metric="token_set_f1",
    ),
    Format(
        name="hr_mmsearch",
        columns=("sample_id", "query", "query_image", "ground_truth"),
        id="sample_id",
        question="query",
        answers=("ground_truth",),
        pictures=Pictures(columns=("query_image",)),
        source="hr_mmsearch",
        metric="judge",
    ),
    Format(
        name="livevqa_preview",
        columns=("sample_id", "query", "query_image", "gt_answer"),
        id="sample_id",
        question="query",
        answers=("gt_answer",),
        pictures=Pictures(columns=("query_image",)),
        source="livevqa",
        metric="judge",
    ),
    Format(
        name="browsecomp_vl",
        columns=("prompt", "file_path", "answers", "question_id"),
        id="question_id",
        question="prompt",
        answers=("answers",),
        pictures=Pictures(columns=("file_path",), text="url"),
        source="browsecomp_vl",
        metric="judge",
    ),
    Format(
        name="bird",
        columns=("question_id", "db_id", "question", "SQL"),
        id="question_id",
        answers=("SQL",),
        source="bird",
        metric="execution",
        prepare=_with_database,
    ),
    Format(
        name="spider",
        columns=("db_id", "question", "query"),
        answers=("query",),
        source="spider",
        metric="execution",
    ),
    Format(
        name="text_qa",
        columns=("question", "golden_answers"),
        answers=("golden_answers",),
        source="text_qa",
    ),
    Format(
        name="livevqa",
        columns=("img_path", "level1_qa", "level2_qa"),
        metric="judge",
        known_from="rows",
        pictures=Pictures(folder="News_imgs"),
        drafts=livevqa_drafts,
    ),
    Format(
        name="fvqa",
        columns=("prompt", "reward_model"),
        endings=(".parquet", ".pq"),
        known_from="rows",
        drafts=fvqa_drafts,
    ),
    Format(
        name="native",
        columns=("prompt", "reward_model"),
        endings=(".jsonl", ".json"),
        known_from="rows",
        drafts=native_drafts,
    ),
)
"""Where two fit, the first counts: those with more columns stand before those with fewer."""

BY_NAME = {format.name: format for format in FORMATS}


def format_of(ending: str, columns: Sequence[str]) -> Format | None:
    """The first that knows such a file."""
    fitting = (f for f in FORMATS if ending in f.endings and set(f.columns) <= set(columns))
    return next(fitting, None)


def known_columns() -> str:
    """Every format with its columns, a line each, for a refusal."""
    return "\n".join(f"    {format.name}: {', '.join(format.columns)}" for format in FORMATS)
