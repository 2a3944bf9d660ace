"""Benchmarks whose authors publish their texts encrypted, so that no model is trained on them.

MMSearch-Plus: base64 over the text XORed with the SHA-256 of a canary, repeated. A row is opened in
memory, its task is marked, and whatever writes tasks refuses a marked one. The canary is in the
environment variable that the authors' own script reads.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Iterable
from itertools import cycle

from tapo_train.data.rows import Row
from tapo_train.errors import DataError
from tapo_train.types import Task

__all__ = ["SEALED", "opened", "require_open"]

SEALED = "sealed"
"""Key of `Task.metadata` that marks a task whose text is never written plain."""
CANARY_VARIABLE = "MMSEARCH_PLUS"


def opened(row: Row) -> Row:
    """The row with its question and answers readable.

    Raises:
        DataError: there is no canary, or it is not the one.
    """
    canary = os.environ.get(CANARY_VARIABLE, "")
    if not canary:
        raise DataError(
            f"{row.where}: the text of this benchmark is encrypted; wanted its canary in the "
            f"environment variable {CANARY_VARIABLE} (the data set's page tells it)"
        )
    answers = row.fields.get("answer")
    listed = answers if isinstance(answers, list) else [answers]
    fields = {
        **row.fields,
        "question": _plain(row, row.text("question"), canary),
        "answer": [_plain(row, text, canary) for text in listed if text],
        SEALED: True,
    }
    return Row(row.where, {key: value for key, value in fields.items() if key not in _CLOSED})


_CLOSED = ("video_url", "arxiv_id")
"""Encrypted as well, and not needed."""


def _plain(row: Row, text: object, canary: str) -> str:
    try:
        data = base64.b64decode(str(text), validate=True)
        key = cycle(hashlib.sha256(canary.encode()).digest())
        return bytes(byte ^ own for byte, own in zip(data, key, strict=False)).decode()
    except (binascii.Error, ValueError) as error:
        raise DataError(
            f"{row.where}: a text cannot be decrypted ({error}); wanted the benchmark's canary in "
            f"{CANARY_VARIABLE}"
        ) from error


def require_open(tasks: Iterable[Task], *, doing: str) -> None:
    """Raises DataError if a task is sealed, and `doing` would write it or train on it."""
    for task in tasks:
        if task.metadata.get(SEALED):
            raise DataError(
                f"task {task.id}: its authors publish it encrypted; wanted no {doing} of it"
            )
