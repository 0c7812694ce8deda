"""Tables and words at the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Console, ConsoleDimensions
from rich.table import Table as RichTable
from rich.text import Text

from .printable import printable
from .record import Fact
from .table import Cell, Column, Table
from .table_layout import Strip, lay_out, listed, width_of

Tables = dict[str, tuple[Table, Sequence[Fact]]]  # by their names in JSON, with the facts that they are of


def show(
    tables: Mapping[str, tuple[Table, Sequence[Fact]]], *, as_json: bool, also: Mapping[str, Any] | None = None
) -> None:
    """Print tables, or as JSON the facts that they are of: one object by the tables' names, and what is said `also`."""
    if not as_json:
        for table, _ in tables.values():
            print_table(table)
        return
    found = {name: as_plain(facts) for name, (_, facts) in tables.items()}
    print_json(found | {name: as_plain(one) for name, one in (also or {}).items()})


def as_plain(value: Any) -> Any:
    """Facts as JSON has them: what is no number is null."""
    if isinstance(value, Fact):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(name): as_plain(one) for name, one in value.items()}
    return [as_plain(one) for one in value] if isinstance(value, list | tuple) else value


def print_json(value: Any) -> None:
    json.dump(as_plain(value), sys.stdout, indent=2)
    sys.stdout.write("\n")


def print_table(table: Table) -> None:
    """On stdout. Columns come by importance: a narrow terminal leaves out the last ones, and says so.

    A file or a pipe gets all of them.
    """
    console = Console()
    strips = [_strip(column, place, table, console.encoding) for place, column in enumerate(table.columns)]
    screen = sys.stdout.isatty()
    if not screen:
        console.size = ConsoleDimensions(width_of(strips), 1)
    layout = lay_out(strips, console.width)
    console.print(Text(printable(table.title, console.encoding), style="bold"), soft_wrap=not screen)
    if layout is None:
        console.print(Text("\n".join(listed(strips))), soft_wrap=True)
        return
    console.print(_table(layout.strips))
    if layout.left_out:
        console.print(Text(f"also measured: {', '.join(layout.left_out)}; see --json or a wider terminal"))


def _strip(column: Column[object], place: int, table: Table, encoding: str) -> Strip:
    """A column as the terminal's encoding can write it."""

    def pieces(cell: Cell) -> tuple[str, ...]:
        value, beside = printable(cell.text, encoding), printable(cell.beside, encoding)
        whole = (value,) if column.right else value.split(" ")
        return (*whole, beside) if beside else tuple(whole)

    cells = tuple(pieces(row[place]) for row in table.rows)
    return Strip(tuple(printable(column.heading, encoding).split(" ")), cells, column.right)


def say(line: str, *, whole: bool = False) -> None:
    """Print a line of words below a table; `whole`: what is copied from the terminal, without line breaks."""
    console = Console()
    console.print(Text(printable(line, console.encoding)), soft_wrap=whole or not sys.stdout.isatty())


def _table(strips: Sequence[Strip]) -> RichTable:
    """Each piece on a line of its own; with rules between the rows where that takes several lines."""
    table = RichTable(show_lines=any(len(cell) > 1 for strip in strips for cell in strip.cells))
    for strip in strips:
        justify: Literal["left", "right"] = "right" if strip.right else "left"
        table.add_column(Text("\n".join(strip.heading)), justify=justify, no_wrap=True)
    for cells in zip(*(strip.cells for strip in strips)):
        table.add_row(*(Text("\n".join(cell)) for cell in cells))
    return table
