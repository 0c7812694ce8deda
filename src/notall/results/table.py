"""Tables of columns, as Markdown, CSV and LaTeX."""

import csv
import io
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from .columns import (
    EMPTY as EMPTY,
    Cell as Cell,
    Column as Column,
    formatted as formatted,
    in_bytes as in_bytes,
    in_magnitude as in_magnitude,
    inherited as inherited,
    number as number,
    size as size,
    with_delta as with_delta,
    with_error as with_error,
    with_interval as with_interval,
    with_quartiles as with_quartiles,
    within as within,
    words as words,
)
from .record import Fact

F = TypeVar("F")
G = TypeVar("G")

ESCAPES = {  # as LaTeX has them
    "\\": r"\textbackslash{}", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$", "<": "$<$", ">": "$>$",
    "–": "--", "*": "$^{*}$",
}  # fmt: skip
MINUS = re.compile(r"(?<!\w)-(?=[\d.])")  # not the hyphen of a name
POWER = re.compile(r"(?<![\w.])(\d(?:\.\d+)?)e(-?\d+)(?!\w)")  # 1.9e5
LONG_CELL = 40  # letters: a longer cell is one


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
        _side(column, cells)
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


def _side(column: Column[object], cells: Sequence[str]) -> str:
    """How LaTeX aligns a column: sentences are broken into lines."""
    if column.right:
        return "r"
    return r"p{0.4\linewidth}" if max(map(len, cells)) > LONG_CELL else "l"


def escaped(text: str) -> str:
    """Text with LaTeX's own characters escaped, and those of numbers set as
    mathematics.
    """
    text = "".join(ESCAPES.get(character, character) for character in text)
    text = POWER.sub(r"$\1\\times10^{\2}$", text)
    return MINUS.sub("$-$", text)


def _line(cells: Sequence[str]) -> str:
    return rf"{' & '.join(map(escaped, cells))} \\"
