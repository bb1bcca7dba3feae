"""Pages that are made from the code have all of it."""

from __future__ import annotations

import click
import pytest
from tools.site import api, command_line, errors, hooks, root_pages

import epfuse
from epfuse.cli.main import COMMANDS, main
from epfuse.environment import VARIABLES
from epfuse.errors import EpfuseError
from epfuse.integrations.switches import SWITCHES


def test_every_public_name_has_a_page() -> None:
    pages = api.pages()
    for name in epfuse.__all__:
        assert f"::: epfuse.{name}\n" in pages[f"reference/api/{name}.md"]
        assert f"[`{name}`]({name}.md)" in pages["reference/api/index.md"]


def test_every_command_and_option_is_there() -> None:
    pages = command_line.pages()
    assert {f"reference/cli/{name}.md" for name in (*COMMANDS, "index")} == set(pages)
    with click.Context(main, info_name="epfuse") as context:
        for name in COMMANDS:
            command = main.get_command(context, name)
            inner = command.commands.values() if isinstance(command, click.Group) else ()
            for each in (command, *inner):
                assert each is not None
                for parameter in each.params:
                    if isinstance(parameter, click.Option) and not parameter.hidden and "--help" not in parameter.opts:
                        assert parameter.opts[0] in pages[f"reference/cli/{name}.md"]


def test_every_error_has_a_cause_and_a_fix() -> None:
    kinds = errors.kinds()
    assert {EpfuseError, epfuse.EpfuseError} <= set(kinds)
    assert len(kinds) > 20
    page = errors.pages()["reference/errors.md"]
    for kind in kinds:
        assert all(errors.cause_and_fix(kind))
        assert f"## {kind.__name__} " in page


def test_an_error_without_a_fix_is_refused() -> None:
    class Silent(EpfuseError):
        """Says nothing of what mends it."""

    with pytest.raises(ValueError, match="0 paragraphs 'Fix:'"):
        errors.cause_and_fix(Silent)


def test_every_variable_and_exit_code_is_there() -> None:
    pages = errors.pages()
    assert all(f"| `{name}` |" in pages["reference/environment.md"] for name in (*VARIABLES, *SWITCHES))
    assert all(f"| {code} |" in pages["reference/exit-codes.md"] for code in (0, 1, 2, 70, 75, 130))


def test_a_section_of_a_file() -> None:
    found = root_pages.section("CONTRIBUTING.md", "add-a-gpu")
    assert found.startswith("## Add a GPU\n")
    assert found.count("\n## ") == 0
    with pytest.raises(ValueError, match="0 sections"):
        root_pages.section("CONTRIBUTING.md", "nothing")


@pytest.mark.parametrize(
    ("text", "page", "expected"),
    [
        ("[a](policy.md#tuned)", "numerics.md", "[a](policy.md#tuned)"),
        ("[a](../DESIGN.md#letters)", "numerics.md", "[a](design.md#letters)"),
        ("[a](docs/policy.md)", "design.md", "[a](policy.md)"),
        ("[a](../../CONTRIBUTING.md)", "howto/x.md", "[a](../contributing.md)"),
        ("[a](//docs/policy.md)", "start/x.md", "[a](../policy.md)"),
        ("[a](../tests/data/README.md)", "profiling.md", "a"),
        ("[a](docs/records)", "release.md", "a"),
        ("[a](https://example.org/x)", "profiling.md", "[a](https://example.org/x)"),
        ("```\n[a](../DESIGN.md)\n```", "numerics.md", "```\n[a](../DESIGN.md)\n```"),
    ],
)
def test_links_on_the_site(text: str, page: str, expected: str) -> None:
    assert root_pages.on_site(text, page) == expected


def test_a_date_in_a_table_does_not_break() -> None:
    row = "<tr><td>2026-11-24</td><td>on 2026-11-24</td></tr>"
    assert hooks.on_post_page(row) == '<tr><td class="date">2026-11-24</td><td>on 2026-11-24</td></tr>'


def test_a_fence_without_a_language_is_a_drawing() -> None:
    page = "```\na -> b\n```\n\n```sh\nls\n```\n\n```\nc\n```\n"
    marked = "```{ .text .drawing }"
    assert hooks.drawn(page) == f"{marked}\na -> b\n```\n\n```sh\nls\n```\n\n{marked}\nc\n```\n"
