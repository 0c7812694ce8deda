"""Tables: what a column is called, what it says of a record and how it sorts, said once for every medium.

A column is of a type of fact, from which it takes its figures by attribute: a renamed field is a type error here. The
terminal, a page, Markdown, LaTeX and CSV take the same columns; a medium may leave some out.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from .record import Fact, Quartiles, is_number

F = TypeVar("F")
G = TypeVar("G")

NOTHING = "-"  # what was not measured, or came out as no number
LARGE = 1e5  # from here on a number is told by its magnitude


@dataclass(frozen=True)
class Cell:
    """What a table says of one row; `beside` is the error or spread of a number, below it where room is short.

    `value` is what rows are sorted by, a number or else text; None where there is nothing.
    """

    value: float | str | None
    text: str = NOTHING
    beside: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.beside}".rstrip()


EMPTY = Cell(None)


@dataclass(frozen=True)
class Column(Generic[F]):
    """A heading, and what stands below it; `unit` and `note` say what the heading and the cells take for granted."""

    heading: str
    cell: Callable[[F], Cell]
    right: bool = True
    unit: str = ""
    note: str = ""

    @property
    def titled(self) -> str:
        """The heading with its unit, for where there is room."""
        return f"{self.heading}, {self.unit}" if self.unit else self.heading

    def text(self, row: F) -> str:
        return str(self.cell(row))


def words(heading: str, get: Callable[[F], object]) -> Column[F]:
    """Text; None and "" are nothing."""

    def cell(row: F) -> Cell:
        found = get(row)
        return EMPTY if found is None or found == "" else Cell(str(found), str(found))

    return Column(heading, cell, right=False)


def number(heading: str, get: Callable[[F], float | None], form: str = ".3f", unit: str = "") -> Column[F]:
    return _of_numbers(heading, get, lambda value: written(value, form), unit)


def magnitude(heading: str, get: Callable[[F], float | None]) -> Column[F]:
    """A number that may have many digits."""
    return _of_numbers(heading, get, in_magnitude)


def probability(heading: str, get: Callable[[F], float | None]) -> Column[F]:
    """A p value; a small one is not rounded to none."""
    return _of_numbers(heading, get, lambda value: "< 0.001" if value < 0.001 else f"{value:.3f}")


def size(heading: str, get: Callable[[F], float | None]) -> Column[F]:
    """Bytes, in the unit that suits them."""
    return _of_numbers(heading, get, in_bytes)


def with_error(
    heading: str, get: Callable[[F], tuple[float, float] | None], form: str = ".3f", unit: str = ""
) -> Column[F]:
    """A mean and its standard error."""

    def cell(row: F) -> Cell:
        mean, error = get(row) or (math.nan, math.nan)
        return Cell(mean, written(mean, form), f"± {written(error, form)}") if is_number(mean) else EMPTY

    return Column(heading, cell, unit=unit, note="±: one standard error")


def with_quartiles(heading: str, get: Callable[[F], Quartiles | None], form: str = ".1f") -> Column[F]:
    """A median and its quartiles."""

    def cell(row: F) -> Cell:
        found = get(row)
        if found is None:
            return EMPTY
        beside = f"[{written(found.low, form)}, {written(found.high, form)}]"
        return Cell(found.median, written(found.median, form), beside)

    return Column(heading, cell, note="[ ]: quartiles of the rounds")


def with_difference(
    heading: str, get: Callable[[F], tuple[float, float, float] | None], form: str = ".3f"
) -> Column[F]:
    """A figure with its difference to the dense model and its error; nothing beside the dense model itself."""

    def cell(row: F) -> Cell:
        value, delta, error = get(row) or (math.nan,) * 3
        beside = f"({written(delta, f'+{form}')} ± {written(error, form)})" if is_number(delta) else ""
        return Cell(value, written(value, form), beside) if is_number(value) else EMPTY

    return Column(heading, cell, note="( ): difference to the dense model ± its standard error")


def within(columns: Iterable[Column[G]], get: Callable[[F], G | None]) -> tuple[Column[F], ...]:
    """The columns of a fact as those of a record that holds it, where it was measured."""

    def lifted(column: Column[G]) -> Column[F]:
        def cell(row: F) -> Cell:
            fact = get(row)
            return EMPTY if fact is None else column.cell(fact)

        return Column(column.heading, cell, column.right, column.unit, column.note)

    return tuple(map(lifted, columns))


def inherited(kind: type[F], columns: Iterable[Column[G]]) -> tuple[Column[F], ...]:
    """The columns of a fact as those of a `kind` that extends it."""

    def lifted(column: Column[G]) -> Column[F]:
        cell: Callable[[F], Cell] = column.cell  # type: ignore[assignment]
        return Column(column.heading, cell, column.right, column.unit, column.note)

    return tuple(map(lifted, columns))


def _of_numbers(
    heading: str, get: Callable[[F], float | None], write: Callable[[float], str], unit: str = ""
) -> Column[F]:
    def cell(row: F) -> Cell:
        value = get(row)
        return Cell(value, write(value)) if value is not None and is_number(value) else EMPTY

    return Column(heading, cell, unit=unit)


# --- figures in words -------------------------------------------------------------------------------------------------


def written(value: float, form: str) -> str:
    """By `form`; what rounds to nothing is not below it, and what is no number is `-`."""
    if not is_number(value):
        return NOTHING
    text = format(value, form)
    nothing = "0" in text and not any(digit in text for digit in "123456789")
    return format(abs(value) * 0, form) if nothing else text


def in_bytes(value: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def in_magnitude(value: float) -> str:
    """`1,351.8`, or `2.9e9` instead of a row of digits."""
    if not LARGE <= abs(value) < math.inf:
        return f"{value:,.1f}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}e{int(power)}"


# --- whole tables -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Cells by row and column, whatever they are of; `csv` has every figure with all of its digits."""

    title: str
    columns: tuple[Column[object], ...]  # their headings, units, notes and sides: cells are made already
    rows: tuple[tuple[Cell, ...], ...]
    csv: str = ""

    @property
    def headings(self) -> tuple[str, ...]:
        return tuple(column.heading for column in self.columns)

    @property
    def legend(self) -> str:
        """What the signs in the cells mean; "" where there are none."""
        notes = dict.fromkeys(column.note for column in self.columns if column.note)
        return f"{'; '.join(notes)}." if notes else ""

    def markdown(self) -> str:
        rules = ["---:" if column.right else "---" for column in self.columns]
        cells = ([str(cell).replace("|", r"\|") for cell in row] for row in self.rows)
        lines = [list(self.headings), rules, *cells]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table(title: str, columns: Iterable[Column[F]], rows: Iterable[F], *, every: bool = False) -> Table:
    """`rows` in those of `columns` that a row has something in, or in `every` one."""
    rows, columns = list(rows), list(columns)
    cells = [[column.cell(row) for column in columns] for row in rows]
    shown = [
        place
        for place in range(len(columns))
        if every or not rows or any(line[place].value is not None for line in cells)
    ]
    bare = [_without_cells(columns[place]) for place in shown]
    lines = tuple(tuple(line[place] for place in shown) for line in cells)
    facts = [row for row in rows if isinstance(row, Fact)]
    told = as_csv(facts) if len(facts) == len(rows) else _cells_as_csv(bare, lines)
    return Table(title, tuple(bare), lines, told)


def pivot(
    title: str, about: Iterable[Column[F]], figures: Iterable[tuple[F, str, Cell]], key: Callable[[F], Hashable]
) -> tuple[Table, list[F]]:
    """Cells, each of a row and under a heading: a table of a row for each `key`, and the first row with that key.

    Columns that are `about` a row stand before those of the headings.
    """
    rows: dict[Hashable, tuple[F, dict[str, Cell]]] = {}
    for row, heading, found in figures:
        rows.setdefault(key(row), (row, {}))[1][heading] = found

    def column(heading: str) -> Column[tuple[F, dict[str, Cell]]]:
        return Column(heading, lambda line: line[1].get(heading, EMPTY))

    headings = dict.fromkeys(heading for _, cells in rows.values() for heading in cells)
    leading: tuple[Column[tuple[F, dict[str, Cell]]], ...] = within(about, lambda line: line[0])
    return table(title, [*leading, *map(column, headings)], rows.values()), [row for row, _ in rows.values()]


def _without_cells(column: Column[F]) -> Column[object]:
    return Column(column.heading, lambda _: EMPTY, column.right, column.unit, column.note)


def _cells_as_csv(columns: Sequence[Column[object]], rows: Sequence[Sequence[Cell]]) -> str:
    """What rows are sorted by, of rows that are no facts."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([[column.heading for column in columns], *([cell.value for cell in row] for row in rows)])
    return out.getvalue()


def as_csv(facts: Sequence[Fact], *, without: Iterable[str] = ()) -> str:
    """Every figure of the facts, by its name and with every digit."""
    lines = [{name: value for name, value in fact.figures().items() if name not in without} for fact in facts]
    names = dict.fromkeys(name for line in lines for name, value in line.items() if value is not None)
    out = io.StringIO()
    writer = csv.DictWriter(out, [*names], lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()
