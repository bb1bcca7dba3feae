"""A page for every command, from click."""

from __future__ import annotations

import inspect

import click

from epfuse.cli.main import main


def pages() -> dict[str, str]:
    """Page -> its text."""
    with click.Context(main, info_name="epfuse") as context:
        names = main.list_commands(context)
        commands = [(name, main.get_command(context, name)) for name in names]
        found = {"reference/cli/index.md": _index(context, commands)}
        for name, command in commands:
            found[f"reference/cli/{name}.md"] = "\n".join([f"# epfuse {name}", "", *_command(command, name, context)])
        return found


def _index(context: click.Context, commands: list[tuple[str, click.Command]]) -> str:
    lines = ["# Command line", "", *_text(context.command), ""]
    lines += ["| command | what it does |", "| --- | --- |"]
    lines += [f"| [`epfuse {name}`]({name}.md) | {main.table[name]} |" for name, _ in commands]
    return "\n".join([*lines, "", "All take `-h` and `--help`. [Exit codes](../exit-codes.md).", ""])


def _command(command: click.Command, name: str, parent: click.Context, level: int = 2) -> list[str]:
    """What ``--help`` says, as Markdown; a group's commands follow it."""
    with click.Context(command, info_name=name, parent=parent) as context:
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        lines = [*_text(command), "", "```text", usage, "```", ""]
        shown = [parameter for parameter in command.get_params(context) if "--help" not in parameter.opts]
        records = [parameter.get_help_record(context) for parameter in shown]
        if any(records):
            lines += ["| option | |", "| --- | --- |"]
            lines += [f"| `{record[0]}` | {_cell(record[1])} |" for record in records if record is not None]
            lines.append("")
        if isinstance(command, click.Group):
            for inner in command.list_commands(context):
                found = command.get_command(context, inner)
                assert found is not None
                lines += [
                    f"{'#' * level} {context.command_path} {inner}",
                    "",
                    *_command(found, inner, context, level + 1),
                ]
    return lines


def _text(command: click.Command) -> list[str]:
    """Help and epilog; a paragraph that click leaves as it is becomes a block."""
    lines = []
    for text in (command.help, command.epilog):
        for paragraph in inspect.cleandoc(text or "").split("\n\n"):
            kept = paragraph.strip("\n").removeprefix("\b\n")
            if kept != paragraph.strip("\n"):
                is_code = any(line.strip().startswith("epfuse ") for line in kept.splitlines())
                lines += ["```sh" if is_code else "```text", inspect.cleandoc(kept), "```", ""]
            else:
                lines += [paragraph, ""]
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
