"""Tables at the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, ConsoleDimensions
from rich.table import Table
from rich.text import Text

from ..records.columns import Column, Row, given
from .printable import printable
from .table_layout import Strip, lay_out, listed, width_of


def show(rows: Sequence[Row], columns: Sequence[Column], *, title: str, as_json: bool = False) -> None:
    """Print `rows` as a table on stdout, or whole, as JSON.

    `columns` come in the order of their importance: a narrow terminal leaves out the last ones, and says so. A file or
    a pipe gets all of them, but for those that no row has anything in.
    """
    if as_json:
        json.dump(list(rows), sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    console = Console()
    strips = [_strip(rows, column, console.encoding) for column in given(columns, rows)]
    screen = sys.stdout.isatty()
    if not screen:
        console.size = ConsoleDimensions(width_of(strips), 1)
    layout = lay_out(strips, console.width)
    console.print(Text(printable(title, console.encoding), style="bold"), soft_wrap=not screen)
    if layout is None:
        console.print(Text("\n".join(listed(strips))), soft_wrap=True)
        return
    console.print(_table(layout.strips))
    if layout.left_out:
        console.print(Text(f"also measured: {', '.join(layout.left_out)}; see --json or a wider terminal"))


def _strip(rows: Sequence[Row], column: Column, encoding: str) -> Strip:
    """A column as the terminal's encoding can write it."""

    def pieces(row: Row) -> tuple[str, ...]:
        value, beside = printable(column.value(row), encoding), printable(column.beside(row), encoding)
        whole = (value,) if column.right else value.split(" ")
        return (*whole, beside) if beside else tuple(whole)

    return Strip(tuple(printable(column.heading, encoding).split(" ")), tuple(map(pieces, rows)), column.right)


def _table(strips: Sequence[Strip]) -> Table:
    """Each piece on a line of its own; with rules between the rows where that takes several lines."""
    table = Table(show_lines=any(len(cell) > 1 for strip in strips for cell in strip.cells))
    for strip in strips:
        justify: Literal["left", "right"] = "right" if strip.right else "left"
        table.add_column(Text("\n".join(strip.heading)), justify=justify, no_wrap=True)
    for cells in zip(*(strip.cells for strip in strips)):
        table.add_row(*(Text("\n".join(cell)) for cell in cells))
    return table


@dataclass(frozen=True)
class Shown:
    """A table to show: its rows, its columns, its title."""

    rows: Sequence[Row]
    columns: Sequence[Column]
    title: str


def say(line: str, *, whole: bool = False) -> None:
    """Print a line of words below a table; `whole`: what is copied from the terminal, without line breaks."""
    console = Console()
    console.print(Text(printable(line, console.encoding)), soft_wrap=whole or not sys.stdout.isatty())


def show_all(tables: Mapping[str, Shown], *, as_json: bool = False, also: Mapping[str, object] | None = None) -> None:
    """Print several tables; as JSON, one object with a list of rows by the tables' names, and what is said `also`."""
    if as_json:
        found = {name: list(table.rows) for name, table in tables.items()}
        json.dump({**found, **(also or {})}, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    for table in tables.values():
        show(table.rows, table.columns, title=table.title)
