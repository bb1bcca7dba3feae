"""Every page, opened in Chromium: no error, every picture there, nothing from elsewhere, readable narrow and wide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDTHS = (1600, 400)
TALL = 1000
SHARES = 8
"""The pages are opened in so many tests: a process that has nothing else to do can take one."""
PATIENCE = 120_000  # ms: a busy machine is no fault of a page
LEFT = "net::ERR_ABORTED"
"""What becomes of a request, such as for the search's worker, that is under way when the next page is opened."""
MISSING = """async () => {
  for (const image of document.images) image.loading = 'eager';
  await Promise.all([...document.images].map(image => image.decode().catch(() => null)));
  return [...document.images].filter(image => !image.naturalWidth).map(image => image.src);
}"""
WIDE = """() => document.documentElement.scrollWidth - document.documentElement.clientWidth"""
CUT = """() => [...document.querySelectorAll('article table, article pre, article img, article svg')]
  .filter(part => part.getBoundingClientRect().right > innerWidth + 1)
  .filter(part => {
    for (let around = part.parentElement; around; around = around.parentElement)
      if (['auto', 'scroll'].includes(getComputedStyle(around).overflowX)) return false;
    return !['auto', 'scroll'].includes(getComputedStyle(part).overflowX);
  }).map(part => part.outerHTML.slice(0, 80))"""


class Watched:
    """A page of the browser, and what went wrong in it since it was opened.

    What costs is to change the browser's width: the next page begins at the width that the last one ended at.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        page.set_default_timeout(PATIENCE)
        self.found: list[str] = []
        self.host = ""
        self.widths = list(WIDTHS)
        page.on("console", lambda message: self.note(message.type == "error", f"console: {message.text}"))
        page.on("pageerror", lambda error: self.note(True, f"script: {error}"))
        page.on("requestfailed", lambda request: self.note(request.failure != LEFT, f"not loaded: {request.url}"))
        page.on("request", lambda request: self.note(is_foreign(request.url, self.host), f"elsewhere: {request.url}"))
        page.on("response", lambda answer: self.note(answer.status >= 400, f"{answer.status}: {answer.url}"))

    def note(self, is_bad: bool, said: str) -> None:
        if is_bad:
            self.found.append(said)

    def faults(self, url: str) -> list[str]:
        """What is wrong with the page at ``url``."""
        self.found, self.host = [], urlsplit(url).netloc
        for visit, width in enumerate(self.widths):
            if self.page.viewport_size != (size := {"width": width, "height": TALL}):
                self.page.set_viewport_size(size)
            if visit == 0:
                self.page.goto(url, wait_until="load")
                self.found += [f"no picture: {source}" for source in self.page.evaluate(MISSING)]
            beyond = self.page.evaluate(WIDE)
            self.note(beyond > 0, f"{beyond} px too wide at {width}")
            self.found += [f"cut off at {width}: {part}" for part in self.page.evaluate(CUT)]
        self.widths.reverse()
        return self.found


def is_foreign(url: str, host: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme not in ("data", "blob") and parts.netloc != host


@pytest.mark.parametrize("share", range(SHARES))
def test_every_page(browser: Browser, address: str, site: Path, share: int) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 50
    assert faults_of(browser, address, site, pages[share::SHARES], "light") == {}


def test_pages_in_the_dark(browser: Browser, address: str, site: Path) -> None:
    pages = [site / page / "index.html" for page in ("", "planner", "performance", "design", "reference/cli/plan")]
    assert faults_of(browser, address, site, pages, "dark") == {}


def faults_of(
    browser: Browser, address: str, site: Path, pages: list[Path], scheme: Literal["light", "dark"]
) -> dict[str, list[str]]:
    """Pages with faults -> these.

    The search has no words in it, which each page would spend a fifth of its time on; `test_search_finds_a_word` reads
    them.
    """
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert index["docs"]
    bad = {}
    with browser.new_context(color_scheme=scheme) as context:
        page = context.new_page()
        page.route("**/search_index.json", lambda route: route.fulfill(json={**index, "docs": []}))
        watched = Watched(page)
        for file in pages:
            url = address + file.relative_to(site).as_posix().removesuffix("index.html")
            if found := watched.faults(url):
                bad[url] = found
    return bad


def test_a_bad_page_is_found(browser: Browser, address: str) -> None:
    with browser.new_context() as context, context.new_page() as page:
        page.route(
            "**/bad/",
            lambda route: route.fulfill(
                content_type="text/html",
                body="<article><img src='/nowhere.png'><table><tr><td style='min-width:900px'>x</table></article>"
                "<script src='http://example.invalid/x.js'></script><script>console.error('no')</script>",
            ),
        )
        found = " ".join(Watched(page).faults(f"{address}bad/"))
    said = ("404", "no picture", "elsewhere", "not loaded", "console: no", "too wide at 400", "cut off at 400")
    assert [each for each in said if each not in found] == []


def test_search_finds_a_word(browser: Browser, address: str) -> None:
    with browser.new_context() as context, context.new_page() as page:
        page.goto(address)
        page.locator(".md-search__input").press_sequentially("interleaved")
        page.locator(".md-search-result__link").first.wait_for(timeout=30_000)
