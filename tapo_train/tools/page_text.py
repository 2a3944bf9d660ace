"""Text from outside: HTML to words, and characters that are not for reading taken out.

Control *tokens* need nothing here: observations are tokenised with special tokens split off,
so `<|im_end|>` in a page stays characters (`rollout/chat.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser

CUT = " [cut]"

_UNREADABLE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, save tab and newline
    "\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"  # direction marks, invisible operators
    "\ud800-\udfff"  # halves of characters: legal in JSON, in no file
    "\ufdd0-\ufdef\ufff9-\ufffb\ufffe\uffff"
    "\U000e0000-\U000e0fff"  # tags: letters that nobody sees
    "]"
)
_LOOKED_AT = 8
"""Times as many characters as are shown; pages of several megabytes would hold up other tools."""
_SPACES = re.compile(r"[^\S\n]+")
_LINE_ENDS = re.compile(r" ?\n ?")
_BLANK_LINES = re.compile(r"\n{3,}")
_HIDDEN = frozenset(
    {"script", "style", "noscript", "template", "svg", "math", "iframe", "object", "head"}
)
_BLOCKS = frozenset(
    {
        *("p", "div", "br", "li", "ul", "ol", "tr", "table", "section", "article", "header"),
        *("footer", "main", "nav", "aside", "blockquote", "pre", "hr", "title", "dt", "dd"),
        *("h1", "h2", "h3", "h4", "h5", "h6", "figcaption", "form", "option", "caption"),
    }
)


def readable(text: str, *, max_chars: int) -> str:
    """`text` without unreadable characters and runs of blanks, cut at `max_chars`.

    The cut is said, in up to 6 further characters. What comes out can be written to any file. Of a
    long text no more is looked at than is likely to be shown.
    """
    looked_at = max_chars * _LOOKED_AT
    is_longer, text = len(text) > looked_at, text[:looked_at]
    text = _UNREADABLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = _LINE_ENDS.sub("\n", _SPACES.sub(" ", text))
    text = _BLANK_LINES.sub("\n\n", text).strip()
    is_cut = is_longer or len(text) > max_chars
    return text[:max_chars].rstrip() + CUT if is_cut else text


def defused(text: str) -> str:
    """`text` that can open and close no section of a prompt."""
    return text.replace("<", "\u2039").replace(">", "\u203a")


def numbered(passages: Sequence[str], *, max_chars: int) -> str:
    """The passages on lines of their own, with their ranks, in `max_chars` together.

    Long ones are cut, and say so, to equal shares of what the short ones leave: the first one
    must not hide the others.
    """
    room = max_chars - sum(len(f"{rank}. \n") for rank in range(1, len(passages) + 1)) + 1
    share, left = max(0, room), len(passages)
    for length in sorted(map(len, passages)):
        share = max(0, room) // left
        if length > share:
            break
        room, left = room - length, left - 1
    else:
        share = max(map(len, passages), default=0)
    return "\n".join(
        f"{rank}. {text if len(text) <= share else text[:share].rstrip() + CUT}"
        for rank, text in enumerate(passages, start=1)
    )


def html_to_text(html: str, *, max_chars: int) -> str:
    """The words of a page in the order of its source, blocks on lines of their own.

    No nesting is remembered, so depth costs nothing. Damaged markup gives what was read of
    it. Python's parser is quadratic for some hostile inputs: run it where it can be
    killed (`sandbox.py`).
    """
    page = _Page()
    try:
        page.feed(html)
        page.close()
    except AssertionError:
        # What the parser raises for unknown declarations such as `<![x`.
        pass
    return readable("".join(page.words), max_chars=max_chars)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.words: list[str] = []
        self._hidden: str | None = None
        """The outermost open element whose text nobody sees."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._hidden is None and tag in _HIDDEN:
            self._hidden = tag
        elif tag == "body":
            self._hidden = None  # whatever the head left open
        if tag in _BLOCKS:
            self.words.append("\n")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:
            self.words.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._hidden:
            self._hidden = None
        if tag in _BLOCKS:
            self.words.append("\n")

    def handle_data(self, data: str) -> None:
        if self._hidden is None:
            self.words.append(data)
