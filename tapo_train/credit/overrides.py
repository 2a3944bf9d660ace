"""`credit.x=y` on the command line, typed by the fields of `TapoOptions`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

from tapo_train.credit.options import TapoOptions
from tapo_train.errors import ConfigError

_HINTS = get_type_hints(TapoOptions)
_FLAGS = {"true": True, "false": False}


def parse_options(overrides: Sequence[str]) -> TapoOptions:
    """Options from `credit.name=value` and, for tables, `credit.name.key=value`.

    Raises `ConfigError` on an unknown key (naming the nearest), a value of the wrong type or
    out of range.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.startswith("credit."):
            raise ConfigError(f"found {override!r}; want credit.name=value")
        name, dot, key = path.removeprefix("credit.").partition(".")
        is_table = get_origin(_hint(name, path)) is Mapping
        if is_table != bool(dot and key):
            wanted = f"credit.{name}.TOOL=value" if is_table else f"credit.{name}=value"
            raise ConfigError(f"found {override!r}; want {wanted}")
        if is_table:
            table = values.setdefault(name, dict(getattr(TapoOptions(), name)))
            table[key] = _value(get_args(_HINTS[name])[1], text, path)
        else:
            values[name] = _value(_HINTS[name], text, path)
    return TapoOptions(**values)


def _hint(name: str, path: str) -> Any:
    if name not in _HINTS:
        known = [f"credit.{item.name}" for item in fields(TapoOptions)]
        close = difflib.get_close_matches(path, known, n=1, cutoff=0.0)
        raise ConfigError(f"{path}: unknown key; did you mean {close[0]}?")
    return _HINTS[name]


def _value(hint: Any, text: str, path: str) -> Any:
    """The text as the type of its field; ranges and choices are checked by the options."""
    if hint is bool:
        if text.lower() not in _FLAGS:
            raise ConfigError(f"{path} is {text!r}; want true or false")
        return _FLAGS[text.lower()]
    if get_origin(hint) is tuple:
        return tuple(part.strip() for part in text.strip("[]()").split(",") if part.strip())
    if type(None) in get_args(hint) and text.lower() in ("none", "null"):
        return None
    if hint is float or float in get_args(hint):
        return parse_number(text, path)
    return text


def parse_number(text: str, path: str) -> float:
    """A float, or a `ConfigError` that names the path."""
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{path} is {text!r}; want a number") from None
