"""Tables: what a column is called, what it says of a record and how it sorts, said once
for every medium.
"""

import csv
import io
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, TypeVar

from .record import Fact, Quartiles, is_number

F = TypeVar("F")
G = TypeVar("G")

Form = str | Callable[[float], str]  # of a number: a format, or a function
NOTHING = "-"  # what was not measured, or came out as no number
LARGE = 1e5  # from here on a number is told by its magnitude
SIGNS = {  # as LaTeX has them
    "\\": r"\textbackslash{}", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$", "<": "$<$", ">": "$>$",
    "–": "--", "*": "$^{*}$",
}  # fmt: skip
MINUS = re.compile(r"(?<!\w)-(?=[\d.])")  # not the hyphen of a name
POWER = re.compile(r"(?<![\w.])(\d(?:\.\d+)?)e(-?\d+)(?!\w)")  # 1.9e5
SENTENCE = 40  # letters: a longer cell is one


@dataclass(frozen=True)
class Cell:
    """What a table says of one row: what rows are sorted by, if anything; its text; and
    the error of a number.
    """

    value: float | str | None
    text: str = NOTHING
    error: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.error}".rstrip()


EMPTY = Cell(None)


@dataclass(frozen=True)
class Column(Generic[F]):
    """A heading, and what stands below it; `unit` and `note` say what the heading and
    the cells take for granted.
    """

    heading: str
    cell: Callable[[F], Cell]
    right: bool = True
    unit: str = ""
    note: str = ""

    def text(self, row: F) -> str:
        """The cell of a row as text."""
        return str(self.cell(row))

    @property
    def titled(self) -> str:
        """The heading with its unit, for where there is room."""
        return f"{self.heading}, {self.unit}" if self.unit else self.heading


def _column(
    heading: str,
    get: Callable[[F], G | None],
    cell: Callable[[G], Cell],
    right: bool = True,
    **texts: str,
) -> Column[F]:
    """Of what `get` finds in a row; None is nothing."""
    return Column(
        heading,
        lambda row: EMPTY if (found := get(row)) is None else cell(found),
        right,
        **texts,
    )


def words(heading: str, get: Callable[[F], object]) -> Column[F]:
    """Text; None and "" are nothing."""
    return _column(
        heading,
        get,
        lambda found: EMPTY if found == "" else Cell(str(found), str(found)),
        right=False,
    )


def number(
    heading: str,
    get: Callable[[F], float | None],
    form: Form = ".3f",
    *,
    right: bool = True,
    unit: str = "",
) -> Column[F]:
    """A number, by a format or by a function."""

    def cell(value: float) -> Cell:
        return (
            Cell(value, form(value) if callable(form) else written(value, form))
            if is_number(value)
            else EMPTY
        )

    return _column(heading, get, cell, right, unit=unit)


def size(heading: str, get: Callable[[F], float | None]) -> Column[F]:
    """A number of bytes, in a unit of its magnitude."""
    return number(heading, get, in_bytes)


def with_error(
    heading: str,
    get: Callable[[F], tuple[float, float] | None],
    form: str = ".3f",
    unit: str = "",
) -> Column[F]:
    """A mean and its standard error."""

    def cell(found: tuple[float, float]) -> Cell:
        mean, error = found
        return (
            Cell(mean, written(mean, form), f"± {written(error, form)}")
            if is_number(mean)
            else EMPTY
        )

    return _column(heading, get, cell, unit=unit, note="±: one standard error")


def with_quartiles(
    heading: str, get: Callable[[F], Quartiles | None], form: str = ".1f"
) -> Column[F]:
    """A median and its quartiles."""
    note = "[ ]: quartiles of the rounds"
    return _column(
        heading, get, lambda of: _between(of.median, of.low, of.high, form), note=note
    )


def with_interval(
    heading: str, get: Callable[[F], tuple[float, float, float] | None]
) -> Column[F]:
    """A share of the original model's, with the ends of its interval."""
    return _column(
        heading,
        get,
        lambda found: _between(*found, ".2f"),
        note="[ ]: 95 % interval, paired",
    )


def _between(value: float, low: float, high: float, form: str) -> Cell:
    return Cell(
        value, written(value, form), f"[{written(low, form)}, {written(high, form)}]"
    )


def with_delta(
    heading: str, get: Callable[[F], tuple[float, float, float] | None]
) -> Column[F]:
    """A figure with its difference to the original model and its error; nothing for
    the original model itself.
    """

    def cell(found: tuple[float, float, float]) -> Cell:
        value, delta, error = found
        difference = (
            f"({written(delta, '+.3f')} ± {written(error, '.3f')})"
            if is_number(delta)
            else ""
        )
        return (
            Cell(value, written(value, ".3f"), difference)
            if is_number(value)
            else EMPTY
        )

    return _column(
        heading,
        get,
        cell,
        note="( ): difference to the original model ± its standard error",
    )


def inherited(kind: type[F], columns: Iterable[Column[G]]) -> tuple[Column[F], ...]:
    """The columns of a fact as those of a `kind` that extends it."""
    return within(columns, lambda row: row)  # type: ignore[arg-type, return-value]


def within(
    columns: Iterable[Column[G]], get: Callable[[F], G | None]
) -> tuple[Column[F], ...]:
    """The columns of a fact as those of a record that holds it, where it was
    measured.
    """
    return tuple(
        _column(one.heading, get, one.cell, one.right, unit=one.unit, note=one.note)
        for one in columns
    )


def written(value: float, form: str) -> str:
    """By `form`; what rounds to nothing is not below it, and what is no number is
    `-`.
    """
    if not is_number(value):
        return NOTHING
    text = format(value, form)
    nothing = "0" in text and not any(digit in text for digit in "123456789")
    return format(abs(value) * 0, form) if nothing else text


def in_bytes(value: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def in_magnitude(value: float) -> str:
    """`1,351.8`, or `2.9e9` instead of a row of digits."""
    if not LARGE <= abs(value) < math.inf:
        return f"{value:,.1f}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}e{int(power)}"


@dataclass(frozen=True)
class Table:
    """Cells by row and column; `facts` are the rows where all of them are facts, `csv`
    has every digit.
    """

    title: str
    columns: tuple[Column[object], ...]
    rows: tuple[tuple[Cell, ...], ...]
    csv: str = ""
    facts: tuple[Fact, ...] = ()

    @property
    def headings(self) -> tuple[str, ...]:
        """Of the columns, without units."""
        return tuple(column.heading for column in self.columns)

    @property
    def legend(self) -> str:
        """What the signs in the cells mean; "" where there are none."""
        notes = dict.fromkeys(column.note for column in self.columns if column.note)
        return f"{'; '.join(notes)}." if notes else ""

    def markdown(self) -> str:
        """As a table of GitHub's Markdown."""
        rules = ["---:" if column.right else "---" for column in self.columns]
        cells = ([str(cell).replace("|", r"\|") for cell in row] for row in self.rows)
        return "".join(
            f"| {' | '.join(line)} |\n" for line in (self.headings, rules, *cells)
        )


def table(title: str, columns: Iterable[Column[G]], rows: Iterable[G]) -> Table:
    """`rows` in those of `columns` that a row has something in; without rows in all."""
    rows = list(rows)
    filled = [(column, [column.cell(row) for row in rows]) for column in columns]
    shown = [
        one
        for one in filled
        if not rows or any(cell.value is not None for cell in one[1])
    ]
    heads: tuple[Column[object], ...] = tuple(  # whose cells are made already
        Column(column.heading, lambda _: EMPTY, column.right, column.unit, column.note)
        for column, _ in shown
    )
    lines = tuple(tuple(found[row] for _, found in shown) for row in range(len(rows)))
    facts = tuple(row for row in rows if isinstance(row, Fact))
    if len(facts) == len(rows):
        return Table(title, heads, lines, as_csv(facts), facts)
    sorted_by = [
        {column.heading: cell.value for column, cell in zip(heads, line)}
        for line in lines
    ]
    return Table(title, heads, lines, csv_of(sorted_by))


def pivot(
    title: str,
    about: Iterable[Column[F]],
    figures: Iterable[tuple[F, str, Cell]],
    key: Callable[[F], Hashable],
) -> tuple[Table, list[F]]:
    """Cells under headings, behind columns `about` their row: a table of a row a `key`,
    and each key's first row.
    """
    rows: dict[Hashable, tuple[F, dict[str, Cell]]] = {}
    for row, heading, found in figures:
        rows.setdefault(key(row), (row, {}))[1][heading] = found

    def column(heading: str) -> Column[tuple[F, dict[str, Cell]]]:
        return Column(heading, lambda line: line[1].get(heading, EMPTY))

    headings = dict.fromkeys(heading for _, cells in rows.values() for heading in cells)
    leading: tuple[Column[tuple[F, dict[str, Cell]]], ...] = within(
        about, lambda line: line[0]
    )
    return table(title, [*leading, *map(column, headings)], rows.values()), [
        row for row, _ in rows.values()
    ]


def as_csv(facts: Iterable[Fact]) -> str:
    """Every figure of the facts, by its name and with every digit."""
    return csv_of(
        [
            {name: value for name, value in fact.figures().items() if value is not None}
            for fact in facts
        ]
    )


def csv_of(lines: Sequence[Mapping[str, object]]) -> str:
    """Lines of values by name, some of which may be absent."""
    out = io.StringIO()
    writer = csv.DictWriter(
        out,
        list(dict.fromkeys(name for line in lines for name in line)),
        lineterminator="\n",
    )
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def as_latex(table: Table, *, caption: str, label: str) -> str:
    """With sentences broken into lines, rows that begin alike together, and what is
    wide across a page's columns.
    """
    rows = [[str(cell) for cell in row] for row in table.rows]
    wide = len(table.headings) > 6  # more is made to fit across the page
    kind = "table*" if wide else "table"
    sides = [
        (
            "r"
            if column.right
            else r"p{0.4\linewidth}"
            if max(map(len, cells)) > SENTENCE
            else "l"
        )
        for column, cells in zip(table.columns, zip(table.headings, *rows))
    ]
    groups = [
        [_line(row) for row in group]
        for _, group in groupby(rows, key=lambda row: row[0])
    ]
    apart = [r"\addlinespace"] if len({row[0] for row in rows}) < len(rows) else []
    lines = [
        rf"% \usepackage{{booktabs{',graphicx' if wide else ''}}}",
        rf"\begin{{{kind}}}",
        r"\centering",
        rf"\caption{{{escaped(caption)}}}",
        rf"\label{{tab:{label}}}",
        *([r"\resizebox{\textwidth}{!}{%"] if wide else []),
        rf"\begin{{tabular}}{{{''.join(sides)}}}",
        r"\toprule",
        _line(table.headings),
        r"\midrule",
        *(
            line
            for place, group in enumerate(groups)
            for line in (*(apart if place else []), *group)
        ),
        r"\bottomrule",
        rf"\end{{tabular}}{'}' if wide else ''}",
        rf"\end{{{kind}}}",
    ]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text with LaTeX's own signs escaped, and those of numbers set as mathematics."""
    return MINUS.sub(
        "$-$",
        POWER.sub(
            r"$\1\\times10^{\2}$", "".join(SIGNS.get(sign, sign) for sign in text)
        ),
    )


def _line(cells: Sequence[str]) -> str:
    return rf"{' & '.join(map(escaped, cells))} \\"
