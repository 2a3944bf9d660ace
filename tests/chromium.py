"""A real browser for tests of pages; Debian's Chromium, driven by playwright."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)"
)
COLOURS_OF_A_PICTURE = 96


@contextmanager
def chromium() -> Iterator[Any]:
    """A started browser."""
    sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield started
        started.close()


def visit(page: Any, pages: Path, where: str, wanted: str) -> None:
    """Open a deep link and wait for what it shows."""
    page.goto(f"{pages.as_uri()}/index.html#/{where}")
    page.wait_for_selector(wanted)


def shoot(page: Any, out: Path) -> None:
    """What the page shows as a small PNG."""
    shown = Image.open(io.BytesIO(page.screenshot()), formats=["PNG"]).convert("RGB")
    shown.quantize(COLOURS_OF_A_PICTURE, dither=Image.Dither.NONE).save(out, optimize=True)
