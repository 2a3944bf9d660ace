"""Reading single fields of a decoded JSON object, each with its own complaint."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tapo_train.errors import DataError


def decode(line: bytes) -> Any:
    """The JSON value of a line; `DataError` for anything that RFC 8259 or UTF-8 forbids.

    Repeated keys and NaN are refused as well, because both would change values in silence.
    """
    try:
        return json.loads(
            line.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except DataError:
        raise
    except RecursionError as error:
        raise DataError("nested too deeply to be read") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, absurdly long integers
        raise DataError(f"not a JSON object in UTF-8: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise DataError(f"key {twice!r} is there twice")
    return result


def _no_constant(name: str) -> float:
    raise DataError(f"found {name}; want a finite number")


def short(value: Any) -> str:
    """What was found, in few characters: containers by kind, as they may be deep or large."""
    if isinstance(value, (dict, list)):
        kind = "an object" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _path(where: str, key: str) -> str:
    return key if where in ("", "line") else f"{where}.{key}"


def text_in(data: Mapping[str, Any], key: str, where: str = "") -> str:
    """A string under `key`."""
    value = data.get(key)
    if not isinstance(value, str):
        raise DataError(f"{_path(where, key)} is {short(value)}; want text")
    return value


def list_in(data: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """A list under `key`."""
    value = data.get(key)
    if not isinstance(value, list):
        raise DataError(f"{_path(where, key)} is {short(value)}; want a list")
    return value


def flag_in(data: Mapping[str, Any], key: str, where: str) -> bool:
    """A boolean under `key`; true if it is not given."""
    value = data.get(key, True)
    if not isinstance(value, bool):
        raise DataError(f"{_path(where, key)} is {short(value)}; want true or false")
    return value


def finite(value: Any) -> float | None:
    """A JSON number as float; None if it is none, or too large to be one."""
    if type(value) is not int and type(value) is not float:
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def number_in(data: Mapping[str, Any], key: str) -> float | None:
    """A number; None if it is not given."""
    if data.get(key) is None:
        return None
    number = finite(data[key])
    if number is None:
        raise DataError(f"{key} is {short(data[key])}; want a finite number")
    return number


def numbers_of(value: Any, count: int, where: str) -> list[float]:
    """A list of exactly `count` finite numbers."""
    found = [finite(item) for item in value] if isinstance(value, list) else []
    numbers = [number for number in found if number is not None]
    if len(found) != count or len(numbers) != count:
        raise DataError(f"{where} is {short(value)}; want {count} finite numbers")
    return numbers


def correct_in(data: Mapping[str, Any]) -> float:
    """Outcome correctness in [0, 1]; true is 1."""
    value = data.get("correct")
    number = float(value) if isinstance(value, bool) else finite(value)
    if number is None or not 0.0 <= number <= 1.0:
        raise DataError(f"correct is {short(value)}; want true, false or a number in [0, 1]")
    return number
