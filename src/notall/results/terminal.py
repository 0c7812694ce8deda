"""Tables and words at the terminal: of whatever width, a number or a heading is never
cut.

rich fits a table by folding any cell; here headings fold first, then errors of numbers
go below them, and then the last columns go.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions
from rich.table import Table as RichTable
from rich.text import Text

from ..encodings import printable
from .bars import progress_bar as progress_bar
from .table import Cell, Column, Table

FRAME = 3  # cells around a column's text: a space on either side, and a line
TURNED = 2  # rows: so few may become columns
# of a heading or a cell: each stays whole, and may have a line of its own
Pieces = tuple[str, ...]


def show(
    tables: Mapping[str, Table],
    *,
    as_json: bool,
    also: Mapping[str, object] | None = None,
    then: Iterable[str] = (),
) -> None:
    """Print tables and `then` lines of words, or as JSON the tables' facts, by their
    names, and `also` what else.
    """
    if as_json:
        found = {name: one.facts for name, one in tables.items()} | dict(also or {})
        print(
            json.dumps(
                found, indent=2, default=lambda fact: fact.model_dump(mode="json")
            )
        )
        return
    for one in tables.values():
        print_table(one)
    for line in then:
        say(line)


def say(line: str) -> None:
    """Print a line of words; the next command, which is copied from the terminal,
    without line breaks.
    """
    console, whole = Console(), line.startswith("Next:") or not sys.stdout.isatty()
    console.print(Text(printable(line, console.encoding)), soft_wrap=whole)


def next_report(folder: Path) -> str:
    """The command that makes a page of a folder, as the next one to type."""
    return f"Next: notall report {folder} -o {folder / 'report.html'}"


def print_table(table: Table) -> None:
    """On stdout. A narrow terminal leaves out the last columns, and says so; a file or
    a pipe gets all of them.

    There a row is a line, unless COLUMNS says how wide the lines may be.
    """
    console, screen = Console(), sys.stdout.isatty()
    strips = _strips(table, console.encoding)
    if not (screen or os.environ.get("COLUMNS")):
        console.size = ConsoleDimensions(
            sum(strip.most for strip in strips) + FRAME * len(strips) + 1, 1
        )
    if screen:
        laid_out = _laid_out(strips, console.width)
        parts = [laid_out] if laid_out else None
    else:
        parts = _in_parts(strips, console.width)
    title = Text(printable(table.title, console.encoding), style="bold")
    console.print(title, soft_wrap=not screen)
    if parts is None:
        console.print(_as_list(strips), soft_wrap=True)
        return
    for part in parts:
        console.print(_drawn(part))
    shown = len(parts[0])
    if screen and len(table.rows) > TURNED and shown < len(strips):
        rest = ", ".join(" ".join(strip.cells[0]) for strip in strips[shown:])
        console.print(Text(f"also measured: {rest}; see --json or a wider terminal"))


def _as_list(strips: Sequence["Strip"]) -> Text:
    """Row after row, each cell on a line behind its heading."""
    columns = []
    for cells, _ in strips:
        heading = (*cells[0][:-1], f"{cells[0][-1]}:")
        columns.append([" ".join((*heading, *cell)) for cell in cells[1:]])
    return Text("\n\n".join("\n".join(row) for row in zip(*columns)))


def _drawn(laid_out: Sequence["Strip"]) -> RichTable:
    """Each piece is on a line of its own; with rules between the rows where that takes
    several lines.
    """
    headings, *rows = zip(*(strip.cells for strip in laid_out))
    drawn = RichTable(show_lines=any(len(cell) > 1 for row in rows for cell in row))
    for heading, strip in zip(headings, laid_out):
        drawn.add_column(
            Text("\n".join(heading)),
            justify="right" if strip.right else "left",
            no_wrap=True,
        )
    for row in rows:
        drawn.add_row(*(Text("\n".join(cell)) for cell in row))
    return drawn


class Strip(NamedTuple):
    """A column as text, its heading first: of a number the pieces are itself and its
    error, of a text its words.
    """

    cells: tuple[Pieces, ...]
    right: bool

    @property
    def least(self) -> int:
        """How narrow it may become."""
        return max(cell_len(piece) for cell in self.cells for piece in cell)

    @property
    def most(self) -> int:
        """How wide it is with every cell in one line."""
        return max(cell_len(" ".join(cell)) for cell in self.cells)


def _strips(table: Table, encoding: str) -> list[Strip]:
    """The columns as the terminal's encoding can write them."""

    def pieces(cell: Cell, right: bool) -> Pieces:
        value = printable(cell.text, encoding)
        error = printable(cell.error, encoding)
        return (
            *([value] if right else value.split(" ")),
            *([error] if error else []),
        )

    def strip(place: int, column: Column[object]) -> Strip:
        heading = pieces(Cell(None, column.heading), False)
        return Strip(
            (heading, *(pieces(row[place], column.right) for row in table.rows)),
            column.right,
        )

    return [strip(place, column) for place, column in enumerate(table.columns)]


def _in_parts(strips: Sequence[Strip], width: int) -> list[list[Strip]] | None:
    """All columns, in tables of `width` cells below each other, which each begin with
    what names the rows.

    None where a list is all that fits.
    """
    parts, named = list[list[Strip]](), strips[: _naming(strips)]
    while part := _laid_out(strips, width):
        parts.append(part)
        if len(part) == len(strips) or _is_short(strips):
            return parts
        if len(part) == len(named):
            return None
        strips = [*named, *strips[len(part) :]]
    return None


def _is_short(strips: Sequence[Strip]) -> bool:
    return len(strips[0].cells) - 1 <= TURNED


def _naming(strips: Sequence[Strip]) -> int:
    """How many columns name the rows: to the first with numbers, which comes along."""
    return next(
        (place for place, strip in enumerate(strips, 1) if strip.right and place > 1), 2
    )


def _laid_out(strips: Sequence[Strip], width: int) -> list[Strip] | None:
    """The table in `width` cells, its headings in several lines, then its cells; None
    where a list is all that fits.

    Then few rows become columns; of more the last columns go, but not the first, nor
    the first with numbers after it.
    """
    turns = _is_short(strips)
    fewest = len(strips) if turns else _naming(strips)
    rows = len(strips[0].cells)
    for count in range(len(strips), fewest - 1, -1):
        for first in (0, 1, rows):  # the first row whose cells stand in one line
            shown = [_in_lines_until(first, one) for one in strips[:count]]
            if fitting := _fitted(shown, width):
                return fitting
    if not turns:
        return None
    columns = zip(*(strip.cells for strip in strips))  # one for each row
    turned = [Strip(cells, place > 0) for place, cells in enumerate(columns)]
    return _fitted(turned, width, by_words=True)


def _in_lines_until(first: int, strip: Strip) -> Strip:
    """The pieces of the cells before `first` may have lines of their own, and those of
    all others stand in one.
    """
    whole = [(" ".join(cell),) for cell in strip.cells[first:]]
    return Strip((*strip.cells[:first], *whole), strip.right)


def _fitted(
    strips: Sequence[Strip], width: int, *, by_words: bool = False
) -> list[Strip] | None:
    """The strips in `width` cells, the widest narrowed first; None where they don't
    fit.

    Columns of numbers have two widths, with errors in the line and below it; `by_words`
    they hold text, too.
    """
    least = [strip.least for strip in strips]
    widths = [strip.most for strip in strips]
    room = width - FRAME * len(strips) - 1
    if sum(least) > room:
        return None
    while sum(widths) > room:
        wide = [place for place in range(len(strips)) if widths[place] > least[place]]
        widest = max(wide, key=widths.__getitem__)
        if strips[widest].right and not by_words:
            widths[widest] = least[widest]
        else:
            widths[widest] -= 1
    return [
        Strip(tuple(_filled(cell, wide) for cell in one.cells), one.right)
        for one, wide in zip(strips, widths)
    ]


def _filled(pieces: Pieces, width: int) -> Pieces:
    """With as many pieces on a line as `width` takes."""
    lines = [pieces[0]]
    for piece in pieces[1:]:
        if cell_len(lines[-1]) + 1 + cell_len(piece) <= width:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    return tuple(lines)
