"""Where the pictures of a row stand, in the words of those who publish such files.

A picture under a name that nobody reads would make a text question of a picture question, and
nothing would be said: every known name is read, or the row is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tapo_train.data.rows import Row

__all__ = ["PICTURE_KEYS", "picture_entries"]

PICTURE_KEYS = ("image", "images", "image_path", "image_paths")
"""Read. `images` is verl's, EasyR1's and ms-swift's word, `image_path` MAT's."""

_SAME_BY_OTHER_NAMES = (
    *("img", "imgs", "img_path", "img_paths", "image_file", "image_files", "image_name"),
    *("image_url", "image_urls", "picture", "pictures", "photo", "photos"),
)
"""Not read. Beside pictures they say where these come from; alone they are the pictures."""
_OTHER_MEDIA = ("video", "videos", "audio", "audios")


def picture_entries(row: Row) -> tuple[str, list[Any]]:
    """(field, what stands there) of a row's pictures; a single one counts as a list of one.

    Raises:
        DataError: under two names, or under one that is not read; videos, sounds.
    """
    held = {key: row.fields[key] for key in PICTURE_KEYS if _holds(row, key)}
    if len(held) > 1:
        raise row.wrong(list(held)[1], f"the pictures under {next(iter(held))!r} alone")
    for key in _OTHER_MEDIA + (() if held else _SAME_BY_OTHER_NAMES):
        if _holds(row, key):
            raise row.wrong(key, f"pictures, under one of {list(PICTURE_KEYS)}")
    for key, value in held.items():
        return key, value if isinstance(value, list) else [value]
    return PICTURE_KEYS[0], []


def _holds(row: Row, key: str) -> bool:
    return row.fields.get(key) not in (None, [])


def path_of(row: Row, field: str, entry: Any) -> str:
    """The path in an entry: a text, or the `path` of an object without embedded bytes."""
    if isinstance(entry, Mapping) and entry.get("bytes") is None:
        entry = entry.get("path")
    if not isinstance(entry, str) or not entry:
        raise row.wrong(field, "a path or a list of paths")
    return entry
