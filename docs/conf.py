"""The documentation as a site: `make docs`; needs no network.

Docstrings here are Markdown, as in the pages; what reStructuredText would read otherwise is
escaped before it sees them.
"""

from __future__ import annotations

import re
from typing import Any

project = "tapo_train"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["examples", "evidence/records"]
html_theme = "furo"
html_title = "tapo_train"
html_copy_source = False
html_show_sphinx = False
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "undoc-members": False}
autodoc_typehints = "signature"

_CODE = re.compile(r"(`[^`\n]*`)")


def _escaped(line: str) -> str:
    """Code stays code; signs that would begin emphasis, references or substitutions are signs."""
    if line.startswith("    ") or line.rstrip().endswith("::"):
        return line
    parts = _CODE.split(line)
    return "".join(
        f"`{part}`" if _CODE.fullmatch(part) else re.sub(r"([*|\\_])", r"\\\1", part)
        for part in parts
    )


def _markdown(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A picture made of letters is a block of its own; everything else is text with `code`."""
    shown: list[str] = []
    for number, line in enumerate(lines):
        starts = line.startswith("    ") and number and not lines[number - 1].strip()
        inside_list = any(re.match(r"\w+:$", before) for before in lines[:number])
        if starts and not inside_list and (not shown or shown[-1] == ""):
            shown += ["::", ""]
        shown.append(_escaped(line))
    lines[:] = shown
    if what == "attribute":
        _attributes[name], lines[:] = shown, [""]


_attributes: dict[str, list[str]] = {}
"""Napoleon takes what stands before a colon there for a type, so it does not see them."""


def _back(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what == "attribute":
        lines[:] = _attributes.pop(name)


def setup(app: Any) -> None:
    """Before and after napoleon, which runs at 500."""
    app.connect("autodoc-process-docstring", _markdown, priority=400)
    app.connect("autodoc-process-docstring", _back, priority=600)
