"""The inspector's pages in a real browser: what they show, how fast, and that nothing escapes.

Needs Chromium and playwright (extra `dev`); skipped with a message where they are not there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import chromium, needs_chromium, shoot, visit
from inspected_run import HOSTILE, call, four_attempts, view, write_run

from tapo_train.inspector.report import write_report
from tapo_train.inspector.run_pages import write_pages
from tapo_train.inspector.runs import read_run

pytestmark = [needs_chromium, pytest.mark.slow]
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
MOST_BYTES = 150_000
OPEN_S = 3.0
FILTER_MS = 100.0
TRIES = 5
"""The fastest of so many counts: the machine may be busy with something else."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step of four attempts, and one of a thousand with twenty turns each."""
    calls = [call(f"word{i}") for i in range(19)]
    many = [
        view(
            f"t{q}.{n}",
            group=f"q{q}",
            question=f"What is {q}?",
            advantage=1.0 if n < 4 else -1.0,
            accuracy=float(n < 4),
            calls=calls,
            after=[0.0] * 19 if n == 5 else (),
        )
        for q in range(125)
        for n in range(8)
    ]
    run = write_run(tmp_path_factory.mktemp("pages") / "run", [four_attempts(), many])
    write_pages(run, run / "inspect")
    return run / "inspect"


@pytest.fixture
def page(browser: Any, pages: Path) -> Iterator[Any]:
    """A page that fails the test if it complains or asks for anything outside its folder."""
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    yield opened
    opened.close()
    assert not complaints
    assert asked and all(url.startswith(pages.as_uri() + "/") for url in asked)


def test_numbers_and_reasons_on_the_page_are_those_of_the_dump(page: Any, pages: Path) -> None:
    visit(page, pages, "step_000000/q_0000/2", ".turn")
    after = [found.inner_text() for found in page.query_selector_all(".turn .after")]
    assert after == ["±0.000", "±0.000", "−0.500"]
    reasons = [found.inner_text() for found in page.query_selector_all(".reason > p")]
    assert reasons == ["Corrected: successful attempts asked for the same."] * 2
    numbers = page.inner_text(".reason dl")
    assert "similarity\n1.00" in numbers and "transfer\n1.000" in numbers
    page.click(".reason summary")
    assert "attempt 1, turn 1" in page.inner_text(".reason li")
    page.click(".reason li a")
    page.wait_for_selector("h2:has-text('attempt 1')")
    visit(page, pages, "step_000000/q_0000/3", ".turn")
    assert "too far" in page.inner_text(".reason > p")


def test_tokens_are_coloured_by_the_dumped_scores_and_versions(page: Any, pages: Path) -> None:
    visit(page, pages, "step_000000/q_0000/2", ".turn")
    assert page.locator(".versions").all_inner_texts()[:2] == ["weights 2, then 3", "weights 3"]
    for measure, mean, darkest in (
        ("entropy", 0.3125, "0.8750"),
        ("ratio", 0.001, "0.0100"),
        ("mismatch", -0.005, "0.0500"),
        ("surprise", 0.5, "0.5000"),
    ):
        page.select_option("#colour", measure)
        assert page.inner_text("#legend").endswith(f"darkest is {darkest}")
        first = page.locator(".mean").first.inner_text()
        assert float(first.rsplit(" ", 1)[1].replace("−", "-")) == pytest.approx(mean, abs=1e-4)
    page.select_option("#colour", "version")
    assert page.inner_text("#legend").endswith("darkest is 3, the newest")


def test_the_region_that_was_cut_is_drawn_where_it_was_cut(page: Any, pages: Path) -> None:
    visit(page, pages, "step_000000/q_0000/2", ".cut-box")
    box = page.query_selector(".call .cut-box")
    sides = {name: float(box.get_attribute(name)) for name in ("x", "y", "width", "height")}
    assert sides == {"x": 100, "y": 0, "width": 100, "height": 50}


def test_hostile_text_stays_text(page: Any, pages: Path) -> None:
    visit(page, pages, "step_000000/q_0000/3", ".turn")
    assert HOSTILE.strip() in page.inner_text(".attempt")
    assert page.title() != "owned"
    assert page.query_selector("img") is None
    visit(page, pages, "..%2F..%2Fsecret", "[role=alert]")
    assert "there is no page" in page.inner_text("[role=alert]")


def test_a_thousand_attempts_open_and_filter_at_once(page: Any, pages: Path) -> None:
    opened, filtered = [], []
    for _ in range(TRIES):
        page.goto("about:blank")
        visit(page, pages, "step_000001", ".question")
        opened.append(page.evaluate("performance.now()") / 1000)
        filtered.append(
            page.evaluate(
                """async () => {
                    const box = document.querySelector("select"), start = performance.now();
                    box.value = "corrected";
                    box.dispatchEvent(new Event("change", { bubbles: true }));
                    await new Promise(requestAnimationFrame);
                    document.body.getBoundingClientRect();
                    return performance.now() - start;
                }"""
            )
        )
        assert page.inner_text("[role=status]") == "500 attempts of 125 questions"
    print(f"opened in {min(opened):.2f} s, filtered in {min(filtered):.0f} ms")
    assert min(opened) < OPEN_S
    while page.query_selector("#more"):
        page.click("#more")
    assert len(page.query_selector_all(".question")) == 125
    assert min(filtered) < FILTER_MS


def test_filters_narrow_together(page: Any, pages: Path) -> None:
    visit(page, pages, "step_000000", ".question")
    status = page.locator("[role=status]")
    page.select_option("select >> nth=0", "wrong")
    assert status.inner_text() == "2 attempts of 1 question"
    page.select_option("select >> nth=1", "image_zoom_in_tool")
    assert status.inner_text() == "1 attempt of 1 question"
    page.fill("#search", "nothing like it")
    assert status.inner_text() == "0 attempts of 0 questions"


def test_everything_is_reached_by_keyboard(page: Any, pages: Path) -> None:
    visit(page, pages, "", "table")
    page.keyboard.press("Tab")
    names = set()
    for _ in range(12):
        names.add(page.evaluate("document.activeElement.textContent"))
        page.keyboard.press("Tab")
    assert {"step 1", "step 2", "light / dark"} <= names
    visit(page, pages, "step_000000", ".question")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("Escape")
    visit(page, pages, "step_000000/q_0000/0", "#next")
    page.keyboard.press("j")
    page.wait_for_selector("h2:has-text('attempt 2')")
    page.keyboard.press("k")
    page.wait_for_selector("h2:has-text('attempt 1')")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("where", ["", "step_000000", "step_000000/q_0000", "step_000000/q_0000/2"])
def test_axe_finds_nothing_to_mend(browser: Any, pages: Path, where: str, theme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe…")
    opened = browser.new_page(color_scheme=theme, bypass_csp=True)
    visit(opened, pages, where, "h1")
    found = axe.Axe().run(opened)
    opened.close()
    assert not found.response["violations"], found.generate_report()


def test_a_phone_needs_no_sideways_scrolling(browser: Any, pages: Path) -> None:
    opened = browser.new_page(viewport={"width": 390, "height": 800})
    for where in ("", "step_000000", "step_000000/q_0000/2"):
        visit(opened, pages, where, "h1")
        assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    opened.close()


def test_the_pictures_of_the_docs_can_be_taken_and_are_small(
    browser: Any, pages: Path, tmp_path: Path
) -> None:
    """TAPO_SCREENSHOTS_OF=runs/demo writes docs/pictures from step 20 of the demo."""
    run = os.environ.get("TAPO_SCREENSHOTS_OF")
    out, step, attempt = (PICTURES, 20, 0) if run else (tmp_path, 1, 2)
    if run:
        pages = tmp_path / "pages"
        write_pages(Path(run), pages, first=step, last=step)
    report = tmp_path / "report.html"
    write_report([read_run(Path(run) if run else pages.parent)], report)
    opened = browser.new_page(viewport={"width": 1000, "height": 900}, color_scheme="light")
    question = f"step_{step - 1:06d}/q_0000"
    visit(opened, pages, f"{question}/{attempt}", ".is-corrected")
    opened.locator(".turn").first.scroll_into_view_if_needed()
    opened.locator(".reason summary").first.click()
    shoot(opened, out / "attempt.png")
    opened.select_option("#colour", "entropy")
    opened.locator("#legend").scroll_into_view_if_needed()
    shoot(opened, out / "tokens.png")
    visit(opened, pages, question, ".side-by-side")
    shoot(opened, out / "question.png")
    visit(opened, pages, f"step_{step - 1:06d}", ".question")
    shoot(opened, out / "questions.png")
    opened.goto(report.as_uri())
    opened.locator("img").first.scroll_into_view_if_needed()
    shoot(opened, out / "report.png")
    opened.close()
    taken = ("attempt", "tokens", "question", "questions", "report")
    sizes = {name: (out / f"{name}.png").stat().st_size for name in taken}
    assert all(1000 < size <= MOST_BYTES for size in sizes.values()), sizes
    named = set(re.findall(r"\]\(pictures/(\w+)\.png\)", _docs()))
    assert named <= set(taken)
    assert all((PICTURES / f"{name}.png").stat().st_size <= MOST_BYTES for name in named)


def _docs() -> str:
    return "".join(path.read_text(encoding="utf-8") for path in PICTURES.parent.glob("*.md"))
