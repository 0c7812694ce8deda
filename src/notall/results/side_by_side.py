"""Texts that come in one after the other, each in a column of its own, as far as they are there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..results.printable import printable

Write = Callable[[str, str], None]  # a column's name, and more of its text


@contextmanager
def side_by_side(names: Sequence[str]) -> Iterator[Write]:
    """Columns with these names, which grow at a terminal as they are written to; elsewhere all comes at the end."""
    console, written = Console(), dict.fromkeys(names, "")
    live = Live(console=console, auto_refresh=False, vertical_overflow="visible") if sys.stdout.isatty() else None

    def write(name: str, text: str) -> None:
        written[name] += text
        if live:
            live.update(_columns(written, console), refresh=True)

    with live or nullcontext():
        yield write
    if not live:
        for name, text in written.items():
            console.print(Text(f"{name}:\n{_lines(text, console)}\n"), soft_wrap=True)


def _columns(written: dict[str, str], console: Console) -> Table:
    table = Table(expand=True)
    for name in written:
        table.add_column(name, ratio=1)
    table.add_row(*(Text(_lines(text, console)) for text in written.values()))
    return table


def _lines(text: str, console: Console) -> str:
    """What a model says keeps its lines, and steers no terminal."""
    return "\n".join(printable(line, console.encoding) for line in text.strip("\n").split("\n"))
