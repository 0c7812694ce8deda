"""Write docs/commands.md from the commands themselves: `python docs/commands.py`."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import typer

from notall.cli import app as commands_of

HERE = Path(__file__).parent
HEAD = """# Commands

<!-- Written by docs/commands.py: run `make docs`. -->

`MODEL` is `smollm2` (the default model), a hub id, a folder or a `.gguf` file. `notall --install-completion` adds tab
completion to your shell.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 2 | bad input, named in one line with the fix |
| 3 | done, but the budget was missed, or a figure differs; a line reports the result |
| 130 | interrupted; the same command continues where it stopped |

A table fits your terminal. If that is too narrow for all columns, a line below names the others. A file or a pipe
gets every column, within `COLUMNS` if that is set, and `--json` every digit.

Commands show their progress and the time left on stderr; where that is no terminal, a line per minute.
`NO_COLOR=1` turns colours off.
"""


COMMON = 5  # commands that take an option alike: it is described once

OPTIONS_HEAD = ["| option | default | |", "| --- | --- | --- |"]


def render() -> str:
    """The page, in Markdown."""
    group: Any = typer.main.get_command(commands_of)
    commands = [(name, listed.loaded()) for name, listed in group.commands.items()]
    described = Counter(
        _described(option) for _, command in commands for option in _options(command)
    )
    common = {row for row, times in described.items() if times >= COMMON}
    parts = [HEAD, _common_options([command for _, command in commands], common)]
    for panel in dict.fromkeys(command.rich_help_panel for _, command in commands):
        parts.append(f"## {panel}\n")
        parts += [
            _command(name, command, common)
            for name, command in commands
            if command.rich_help_panel == panel
        ]
    return "\n".join(parts)


def _common_options(commands: list[Any], common: set[str]) -> str:
    """What many commands take alike, a table for each group of their help."""
    groups: dict[str, list[str]] = {}
    for command in commands:
        for option in _options(command):
            row = _described(option)
            rows = groups.setdefault(option.rich_help_panel or "Others", [])
            if row in common and not any(row in others for others in groups.values()):
                rows.append(row)
    tables = [
        "\n".join([f"**{name}**\n", "| option | |", "| --- | --- |", *rows]) + "\n"
        for name, rows in groups.items()
        if rows
    ]
    lead = (
        "Many commands take these. Each command names those that it takes, with its"
        " defaults; its own options have a table."
    )
    return "\n".join(["## Common options\n", textwrap.fill(lead, 120) + "\n", *tables])


def _command(name: str, command: Any, common: set[str]) -> str:
    arguments = [
        param for param in command.params if param.param_type_name == "argument"
    ]
    usage = " ".join(
        ["notall", name, *(param.metavar or param.name.upper() for param in arguments)]
    )
    example = command.epilog.partition("Example:")[2].strip()
    paragraphs = _plain(command.help).split("\n\n")
    parts = [
        f"### {usage}",
        *(textwrap.fill(one, 120) for one in paragraphs),
        f"```text\n{example}\n```",
    ]
    options = _options(command)
    own = [option for option in options if _described(option) not in common]
    shared = [option for option in options if _described(option) in common]
    if own:
        parts.append("\n".join([*OPTIONS_HEAD, *map(_row, own)]))
    if shared:
        named = ", ".join(map(_named, shared))
        parts.append(textwrap.fill(f"[Common](#common-options): {named}.", 120))
    return "\n\n".join(parts) + "\n"


def _options(command: Any) -> list[Any]:
    return [param for param in command.params if param.param_type_name == "option"]


def _words(param: Any) -> str:
    return ", ".join(f"`{word}`" for word in param.opts)


def _help(param: Any) -> str:
    return _plain(param.help or "").replace("|", "\\|")


def _default(param: Any) -> str:
    if param.default is None or param.default is False:
        return ""
    return f"`{getattr(param.default, 'value', param.default)}`"


def _row(param: Any) -> str:
    return f"| {_words(param)} | {_default(param)} | {_help(param)} |"


def _described(param: Any) -> str:
    """A row without a default, by which options of several commands are compared."""
    return f"| {_words(param)} | {_help(param)} |"


def _named(param: Any) -> str:
    default = _default(param)
    return f"`{param.opts[0]}`" + (f" ({default})" if default else "")


def _plain(text: str) -> str:
    """Without the marks that colour it at a terminal."""
    return re.sub(r"\[/?bold\]", "", text).strip()


if __name__ == "__main__":
    (HERE / "commands.md").write_text(render(), encoding="utf-8")
