"""Every link of the built site leads somewhere on it, and nothing of it is loaded from elsewhere."""

from __future__ import annotations

import functools
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.site.html import Page


def fault(site: Path, page: Path, link: str) -> str | None:
    """What is wrong with a link; None for a good one, and for one to elsewhere."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    path = unquote(parts.path)
    folder = site if path.startswith("/") else page.parent
    there = (folder / path.lstrip("/")).resolve() if path else page
    if there.is_dir():
        there /= "index.html"
    if not there.is_file() or site.resolve() not in there.resolve().parents:
        return f"{page.relative_to(site)}: {link} leads nowhere"
    if parts.fragment and there.suffix == ".html" and unquote(parts.fragment) not in read(there).anchors:
        return f"{page.relative_to(site)}: {link}: there is no such anchor"
    return None


@functools.cache
def read(page: Path) -> Page:
    return Page.read(page)


def test_links_and_anchors(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    found = [fault(site, page, link) for page in pages for link in read(page).links]
    assert len(found) > 1000
    assert not [each for each in found if each is not None]


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = [(page, link) for page in sorted(site.rglob("*.html")) for link in read(page).loaded]
    assert len(loaded) > 100
    assert not [(page.name, link) for page, link in loaded if urlsplit(link).netloc]


def test_a_fault_is_found(site: Path, tmp_path: Path) -> None:
    page = tmp_path / "a" / "index.html"
    page.parent.mkdir()
    page.write_text('<h1 id="x">x</h1>')
    assert fault(tmp_path, page, "#x") is None
    assert fault(tmp_path, page, "https://example.org/") is None
    assert fault(tmp_path, page, "../a/#x") is None
    assert "no such anchor" in str(fault(tmp_path, page, "../a/#y"))
    assert "nowhere" in str(fault(tmp_path, page, "../b/"))
    assert "nowhere" in str(fault(tmp_path, page, "../../a/"))
