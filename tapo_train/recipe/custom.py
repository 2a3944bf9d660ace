"""A part that the recipe names by import path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from tapo_train.recipe.values import STRICT

_PATH = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Custom:
    """A part of your own. The run executes the code of its module; see docs/extending.md."""

    path: Annotated[str, Field(pattern=_PATH)]
    """`package.module:name` of a function, which is called with `arguments` besides, or of a class,
    which is made with them and whose instance is called."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments, checked against the signature and its types at the start."""
    name: Literal["custom"] = "custom"


def _from_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not re.match(_PATH, value):
        raise ValueError(f"found {value!r}, wanted package.module:name of a part of your own")
    return Custom(path=value)


CustomOrPath = Annotated[Custom, BeforeValidator(_from_text)]
"""A part without arguments may be written as its path alone."""
