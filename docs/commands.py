"""Write docs/commands.md from the commands themselves: `python docs/commands.py`."""

from __future__ import annotations

import re
import textwrap
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


def render() -> str:
    """The page, in Markdown."""
    group: Any = typer.main.get_command(commands_of)
    commands = [(name, listed.loaded()) for name, listed in group.commands.items()]
    panels = dict.fromkeys(command.rich_help_panel for _, command in commands)
    parts = [HEAD]
    for panel in panels:
        parts.append(f"## {panel}\n")
        parts += [
            _command(name, command)
            for name, command in commands
            if command.rich_help_panel == panel
        ]
    return "\n".join(parts)


def _command(name: str, command: Any) -> str:
    arguments = [
        param for param in command.params if param.param_type_name == "argument"
    ]
    usage = " ".join(
        ["notall", name, *(param.metavar or param.name.upper() for param in arguments)]
    )
    example = command.epilog.partition("Example:")[2].strip()
    rows = [
        _row(param) for param in command.params if param.param_type_name == "option"
    ]
    table = "\n".join(["| option | default | |", "| --- | --- | --- |", *rows])
    told = "\n\n".join(
        textwrap.fill(one, 120) for one in _plain(command.help).split("\n\n")
    )
    return f"### {usage}\n\n{told}\n\n```text\n{example}\n```\n\n{table}\n"


def _row(param: Any) -> str:
    words = ", ".join(f"`{word}`" for word in param.opts)
    default = (
        ""
        if param.default is None or param.default is False
        else f"`{getattr(param.default, 'value', param.default)}`"
    )
    return (
        f"| {words} | {default} |"
        f" {_plain(param.help or '').replace('|', chr(92) + '|')} |"
    )


def _plain(text: str) -> str:
    """Without the marks that colour it at a terminal."""
    return re.sub(r"\[/?bold\]", "", text).strip()


if __name__ == "__main__":
    (HERE / "commands.md").write_text(render(), encoding="utf-8")
