"""What people see at the terminal: tables, and progress with the time left."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

Row = Mapping[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading and how a row is written in it."""

    heading: str
    text: Callable[[Row], str]
    right: bool = True


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
    return Column(heading, lambda row: f"{_format(row[name], form)} ± {_format(row[name + '_se'], form)}")


def with_spread(name: str, heading: str, form: str = ".1f") -> Column:
    """A median and its quartiles."""
    return Column(
        heading,
        lambda row: (
            f"{_format(row[name], form)} [{_format(row[name + '_low'], form)}, {_format(row[name + '_high'], form)}]"
        ),
    )


def size(name: str, heading: str) -> Column:
    """Bytes, in the unit that suits them."""
    return Column(heading, lambda row: in_bytes(row[name]))


def show(rows: Sequence[Row], columns: Sequence[Column], *, title: str, as_json: bool = False) -> None:
    """Print `rows` as a table on stdout, or whole, as JSON."""
    if as_json:
        json.dump([dict(row) for row in rows], sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column.heading, justify="right" if column.right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(column.text(row) for column in columns))
    console = Console()
    if not console.is_terminal:  # a file or a pipe: as wide as the table is
        console = Console(width=1000)
    console.print(table)


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


@contextmanager
def progress_bar() -> Iterator[Callable[[float, float, str], None]]:
    """A bar with the time left on stderr; nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def report(done: float, total: float, doing: str) -> None:
            bar.update(task, completed=done, total=total, description=doing)

        yield report


def tracked(items: Sequence[Item], doing: str, progress: Callable[[float, float, str], None]) -> Iterator[Item]:
    """`items`, with progress told as they are used up."""
    for number, item in enumerate(items):
        progress(number, len(items), doing)
        yield item


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
