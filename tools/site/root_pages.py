"""The Markdown files beside README.md as pages, their sections inside other pages, and links between them all."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    "DESIGN.md": "design.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASE.md": "release.md",
    "CHANGELOG.md": "changelog.md",
}
"""File of the repository -> page of the site."""
ON_SITE = PAGES | {"README.md": "index.md"}
"""Where a link to a file beside README.md leads."""
ELSEWHERE = ("Add an activation", "Add a weight format", "Add a GPU")
"""Sections of CONTRIBUTING.md that have a page of their own."""
PICTURES = {"design.md": ("## Dataflow\n", "![What each step of a call reads and hands on](docs/pictures/layer.svg)")}
"""Page -> heading below which a picture stands on the site, and the picture."""
INCLUDE = re.compile(r"^<!-- include: (?P<file>[\w./-]+)#(?P<section>[\w-]+) -->$", re.MULTILINE)
FENCE = re.compile(r"^(```+).*?^\1\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?P<text>!?\[(?:[^\]\[]|\[[^\]]*\])*\])\((?P<target>[^)\s]+)\)")


def pages() -> dict[str, str]:
    """Page of the site -> its text, of every file that is one as it stands."""
    found = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in PAGES.items()}
    for title in ELSEWHERE:
        found["contributing.md"] = found["contributing.md"].replace(section("CONTRIBUTING.md", slug(title)), "")
    for page, (heading, picture) in PICTURES.items():
        found[page] = found[page].replace(heading, f"{heading}\n{picture}\n")
    return found


def slug(title: str) -> str:
    """A heading's anchor, as GitHub and MkDocs make it."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def section(name: str, anchor: str) -> str:
    """A section of a Markdown file with its heading.

    Raises:
        ValueError: the file has no such section, or several.
    """
    text = (ROOT / name).read_text(encoding="utf-8")
    hidden = FENCE.sub(lambda fence: re.sub(r"^#", " ", fence[0], flags=re.MULTILINE), text)
    headings = list(re.finditer(r"^(#+) (.+)$", hidden, re.MULTILINE))
    found = [index for index, heading in enumerate(headings) if slug(heading[2]) == anchor]
    if len(found) != 1:
        raise ValueError(f"{name} has {len(found)} sections {anchor!r}; a page includes it")
    first = headings[found[0]]
    later = (heading.start() for heading in headings[found[0] + 1 :] if len(heading[1]) <= len(first[1]))
    return text[first.start() : next(later, len(text))]


def included(markdown: str) -> str:
    """The page with ``<!-- include: FILE#SECTION -->`` replaced by that section, without its heading."""

    def text(found: re.Match[str]) -> str:
        _, _, body = section(found["file"], found["section"]).partition("\n")
        return rebased(body.strip(), found["file"])

    return INCLUDE.sub(text, markdown)


def rebased(markdown: str, name: str) -> str:
    """Links of a repository's file ``name`` as links from the repository's root, marked by a leading ``//``."""
    folder = posixpath.dirname(name)

    def link(found: re.Match[str]) -> str:
        target = found["target"]
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        return f"{found['text']}(//{posixpath.normpath(posixpath.join(folder, target))})"

    return _outside_code(LINK, link, markdown)


def on_site(markdown: str, page: str) -> str:
    """Links to files as links to pages; what the site does not have becomes plain text.

    Args:
        markdown: a page's text.
        page: its path on the site.
    """
    origin = {site: name for name, site in PAGES.items()}.get(page, f"docs/{page}")

    def link(found: re.Match[str]) -> str:
        target, _, anchor = found["target"].partition("#")
        if re.match(r"[a-z]+:", target) or not target:
            return found[0]
        inside = target[2:] if target.startswith("//") else None
        name = inside or posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        there = ON_SITE.get(name, name.removeprefix("docs/") if name.startswith("docs/") else None)
        if there is None or (ROOT / name).is_dir():
            return found["text"][1:-1] if (ROOT / name).exists() else found[0]
        relative = posixpath.relpath(there, posixpath.dirname(page) or ".")
        return f"{found['text']}({relative}{'#' * bool(anchor)}{anchor})"

    return _outside_code(LINK, link, markdown)


def _outside_code(pattern: re.Pattern[str], replace: object, markdown: str) -> str:
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [pattern.sub(replace, markdown[end : fence.start()]), fence[0]]  # type: ignore[call-overload]
        end = fence.end()
    return "".join([*parts, pattern.sub(replace, markdown[end:])])  # type: ignore[call-overload]
