"""What MkDocs calls while it builds the site (`mkdocs.yml`)."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from tools.site import api, command_line, errors, planner, root_pages, tables


def on_config(config: Any) -> Any:
    """The navigation, with the generated pages in their places."""
    made = {"reference/api/": api.pages(), "reference/cli/": command_line.pages()}
    config["nav"] = [_place(item, made) for item in config["nav"]]
    return config


def on_files(files: Files, config: Any) -> Files:
    """The files of docs/, and the generated pages."""
    made = root_pages.pages() | api.pages() | command_line.pages() | errors.pages() | tables.pages() | planner.pages()
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """A page with the sections that it includes, with links that work on the site, and with its drawings marked."""
    return drawn(root_pages.on_site(root_pages.included(markdown), page.file.src_uri))


def drawn(markdown: str) -> str:
    """Fences without a language as blocks of the class ``drawing``, whose lines are not wrapped (`assets/site.css`)."""
    return root_pages.FENCE.sub(lambda fence: re.sub(r"\A(```+)\n", r"\1{ .text .drawing }\n", fence[0]), markdown)


def _place(item: Any, made: dict[str, dict[str, str]]) -> Any:
    """One entry of the navigation."""
    if isinstance(item, str):
        return item
    ((title, value),) = item.items()
    if isinstance(value, list):
        return {title: [_place(each, made) for each in value]}
    if value in made:
        return {title: [{short(page): page} if "." in short(page) else page for page in made[value]]}
    return item


def short(page: str) -> str:
    """A generated page's name in the navigation, if it is that of a module."""
    return page.rpartition("/")[2].removesuffix(".md").removeprefix("epfuse.")


def on_post_page(output: str, **_: Any) -> str:
    """Pictures are loaded when they come into view, and a date alone in a table's cell stays on one line."""
    output = re.sub(r"<td>(\d{4}-\d\d-\d\d)</td>", r'<td class="date">\1</td>', output)
    return re.sub(r"<img (?![^>]*loading=)", '<img loading="lazy" ', output)
