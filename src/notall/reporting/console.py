"""What people see at the terminal: tables, and progress with the time left."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from rich.console import Console, ConsoleDimensions
from rich.table import Table
from rich.text import Text

from .printable import printable
from .table_layout import Strip, lay_out, listed, width_of

Row = Mapping[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and what a row says in it.

    `beside` is the error or the spread of a number; it goes below the number where the terminal is narrow.
    """

    heading: str
    value: Callable[[Row], str]
    right: bool = True
    beside: Callable[[Row], str] = lambda row: ""

    def text(self, row: Row) -> str:
        return f"{self.value(row)} {self.beside(row)}".rstrip()


def plain(name: str, heading: str | None = None) -> Column:
    return Column(heading or name, lambda row: str(row[name]), right=False)


def number(name: str, heading: str, form: str = ".3f") -> Column:
    return Column(heading, lambda row: _format(row.get(name), form))


def probability(name: str, heading: str) -> Column:
    """A p value; a small one is not rounded to none."""

    def told(row: Row) -> str:
        value = row.get(name)
        return "< 0.001" if value is not None and value < 0.001 else _format(value, ".3f")

    return Column(heading, told)


def with_error(name: str, heading: str, form: str = ".3f") -> Column:
    """A mean and its standard error."""
    return Column(
        heading,
        lambda row: _format(row[name], form),
        beside=lambda row: f"± {_format(row[name + '_se'], form)}",
    )


def with_spread(name: str, heading: str, form: str = ".1f") -> Column:
    """A median and its quartiles."""
    return Column(
        heading,
        lambda row: _format(row[name], form),
        beside=lambda row: f"[{_format(row[name + '_low'], form)}, {_format(row[name + '_high'], form)}]",
    )


def size(name: str, heading: str) -> Column:
    """Bytes, in the unit that suits them."""
    return Column(heading, lambda row: in_bytes(row[name]))


def show(rows: Sequence[Row], columns: Sequence[Column], *, title: str, as_json: bool = False) -> None:
    """Print `rows` as a table on stdout, or whole, as JSON.

    `columns` come in the order of their importance: a narrow terminal leaves out the last ones, and says so. A file or
    a pipe gets all of them.
    """
    if as_json:
        json.dump([dict(row) for row in rows], sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    console = Console()
    strips = [_strip(rows, column, console.encoding) for column in columns]
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


def show_all(tables: Mapping[str, Shown], *, as_json: bool = False) -> None:
    """Print several tables; as JSON, one object with a list of rows by the tables' names."""
    if as_json:
        json.dump({name: [dict(row) for row in table.rows] for name, table in tables.items()}, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    for table in tables.values():
        show(table.rows, table.columns, title=table.title)


def _format(value: Any, form: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return format(value, form)


def in_bytes(value: float | None) -> str:
    """Bytes in the unit that suits them."""
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError
