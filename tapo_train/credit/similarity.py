"""Similarity of two tool calls, in [0, 1], by kind of tool; 1 iff they ask for the same.

A `Similarity` has two parts. `key` reduces a call to what it asks for (a token set, a region of
a root picture, ...) and refuses invalid arguments by returning None; equal keys are the same
action. `space` prepares a list of keys for comparison and returns a function that gives rows of
the similarity matrix against the first few of them, so that nothing is prepared twice and no
large matrix has to exist at once.

The paper (arXiv 2606.05784) does not give the functions; these need no extra model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from tapo_train.credit.boxsim import region_space
from tapo_train.credit.generic import Arguments, exact, generic_key, generic_similarity
from tapo_train.credit.regions import (
    Region,
    iou,
    named_picture,
    registered,
    whole_picture,
    zoom_region,
)
from tapo_train.credit.setsim import Rows, set_space, tfidf_space
from tapo_train.credit.steps import CreditRow, CreditStep
from tapo_train.credit.text import token_set, trigram_set, words
from tapo_train.errors import ConfigError, CreditError

Floats = npt.NDArray[np.float64]
Key = Hashable
KeyFunction = Callable[[Mapping[str, Any], CreditRow, CreditStep], Key | None]
Space = Callable[[Sequence[Any], int], Rows]


@dataclass(frozen=True, slots=True)
class Similarity:
    """How calls of one tool are read and compared."""

    key: KeyFunction
    """(arguments, row, step) -> what the call asks for; None if the arguments are invalid."""
    space: Space
    """(keys, n) -> rows(lo, hi): similarities [hi - lo, n] of keys lo..hi to the first n."""


def pairwise(compare: Callable[[Any, Any], float]) -> Space:
    """The space of a plain function of two keys. Equal keys have 1 without a call."""

    def space(keys: Sequence[Any], references: int) -> Rows:
        def rows(low: int, high: int) -> Floats:
            values = [
                [1.0 if a == b else compare(a, b) for b in keys[:references]]
                for a in keys[low:high]
            ]
            return np.array(values, dtype=np.float64).reshape(high - low, references)

        return rows

    return space


# --- text search -----------------------------------------------------------------------------


def _text_key(
    convert: Callable[[str], Key], arguments: Mapping[str, Any], row: CreditRow, step: CreditStep
) -> Key | None:
    """One query: its converted text. A list of queries: the distinct ones, in order."""
    query = arguments.get("query")
    if isinstance(query, str):
        return convert(query) if query.strip() else None
    if not isinstance(query, (list, tuple)) or not query:
        return None
    if not all(isinstance(part, str) and part.strip() for part in query):
        return None
    # Repeated queries ask nothing new, and their order asks nothing either.
    parts = list(dict.fromkeys(convert(part) for part in query))
    return parts[0] if len(parts) == 1 else _Queries(tuple(sorted(parts, key=sorted)))


class _Queries(NamedTuple):
    """A call with several queries."""

    parts: tuple[Any, ...]
    """Distinct and in a fixed order, so that sums over them are reproducible."""


def _normalised(text: str) -> str:
    """Normalised words joined by blanks; the trimmed, case-folded text if there are none."""
    return " ".join(words(text)) or text.strip().casefold()


def best_match_mean(values: Floats) -> float:
    """Symmetric mean of best matches of a [m, n] similarity matrix of two query lists."""
    best_left = float(values.max(axis=1).mean())
    best_right = float(values.max(axis=0).mean())
    return (best_left + best_right) / 2.0


def _with_lists(single: Space) -> Space:
    """Extend a space of single queries to lists of queries."""

    def space(keys: Sequence[Any], references: int) -> Rows:
        if _Queries not in set(map(type, keys)):
            return single(keys, references)
        parts = [list(key.parts) if isinstance(key, _Queries) else [key] for key in keys]
        flat = list(dict.fromkeys(part for group in parts for part in group))
        position = {part: i for i, part in enumerate(flat)}
        index = [[position[part] for part in group] for group in parts]
        values = single(flat, len(flat))(0, len(flat))

        def rows(low: int, high: int) -> Floats:
            result = [
                [best_match_mean(values[np.ix_(a, b)]) for b in index[:references]]
                for a in index[low:high]
            ]
            return np.array(result, dtype=np.float64).reshape(high - low, references)

        return rows

    return space


def _sequence_ratio(left: str, right: str) -> float:
    """difflib's ratio, made symmetric (it is not: the mean of both orders)."""
    forward = SequenceMatcher(None, left, right, autojunk=False).ratio()
    backward = SequenceMatcher(None, right, left, autojunk=False).ratio()
    return (forward + backward) / 2.0


def _text(convert: Callable[[str], Key], space: Space) -> Similarity:
    return Similarity(partial(_text_key, convert), _with_lists(space))


# --- pictures --------------------------------------------------------------------------------


def _image_search_key(arguments: Mapping[str, Any], row: CreditRow, step: CreditStep) -> Key | None:
    """A tuple of regions: the one indexed, or without an index all pictures of the question."""
    if not row.images or not step.num_images:
        return None
    named = named_picture(arguments)
    if named is None:
        return tuple([whole_picture(ref) for ref in row.images[: max(row.num_input_images, 1)]])
    index = registered(named, row, step)
    # The number by which a picture was called is not part of what was asked for.
    return None if index is None else (whole_picture(row.images[index]),)


def _image_search_similarity(
    compare: Callable[[Region, Region], float], left: tuple[Region, ...], right: tuple[Region, ...]
) -> float:
    # A call without an index looks at the first picture; two of them are the same action only
    # if the whole context is, because results of older frameworks are stored per question.
    if len(left) > 1 and len(right) > 1:
        return float(left == right)
    return compare(left[0], right[0])


def _region_iou(left: Region, right: Region) -> float:
    return iou(left.box, right.box) if left.root == right.root else 0.0


# --- registry --------------------------------------------------------------------------------


def registry(box_unit: Literal["thousandths", "pixels"] = "thousandths") -> dict[str, Similarity]:
    """Every similarity that ships with the program, by name."""
    pixels = box_unit == "pixels"
    zoom = partial(zoom_region, pixels=pixels)
    image = partial(_image_search_similarity, _region_iou)
    image_exact = partial(_image_search_similarity, exact)
    return {
        "text_jaccard": _text(token_set, partial(set_space, measure="jaccard")),
        "text_dice": _text(token_set, partial(set_space, measure="dice")),
        "text_trigram": _text(trigram_set, partial(set_space, measure="jaccard")),
        "text_ratio": _text(_normalised, pairwise(_sequence_ratio)),
        "text_tfidf": _text(token_set, tfidf_space),
        "zoom_iou": Similarity(zoom, region_space),
        "zoom_giou": Similarity(zoom, partial(region_space, generalized=True)),
        "zoom_iou_same_index": Similarity(
            partial(zoom_region, pixels=pixels, keep_index=True),
            partial(region_space, same_index=True),
        ),
        "image_iou": Similarity(_image_search_key, pairwise(image)),
        "image_exact": Similarity(_image_search_key, pairwise(image_exact)),
        "generic": Similarity(generic_key, pairwise(generic_similarity)),
        "exact": Similarity(generic_key, pairwise(exact)),
    }


DEFAULT_KINDS: Mapping[str, str] = {
    "image_zoom_in_tool": "zoom_iou",
    "text_search_tool": "text_jaccard",
    "image_search_tool": "image_iou",
}
"""Similarity by tool name; every other tool has "generic"."""


def _checked(function: Callable[[Any, Any], float], path: str) -> Space:
    def compare(left: Arguments, right: Arguments) -> float:
        value = float(function(left.parsed(), right.parsed()))
        if not 0.0 <= value <= 1.0:
            raise CreditError(f"similarity {path} returned {value}; want a number in [0, 1]")
        return value

    return pairwise(compare)


def load(name: str, known: Mapping[str, Similarity]) -> Similarity:
    """A registered similarity, or the object at the import path `package.module:attribute`.

    The object is a `Similarity`, or a function of two argument dictionaries with a value in
    [0, 1]. Raises `ConfigError` if there is no such name, module or attribute.
    """
    if name in known:
        return known[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"credit.similarity: {name!r} is unknown; want one of {sorted(known)} "
            "or an import path package.module:attribute"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"credit.similarity: cannot import {name!r}: {error}") from error
    if isinstance(found, Similarity):
        return found
    if not callable(found):
        raise ConfigError(f"credit.similarity: {name!r} is {found!r}; want a function")
    return Similarity(generic_key, _checked(found, name))
