"""Tables as LaTeX, to be pasted into a paper as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .table import Table

SIGNS = {
    "\\": r"\textbackslash{}", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$", "<": "$<$", ">": "$>$",
    "–": "--", "*": "$^{*}$",
}  # fmt: skip
MINUS = re.compile(r"(?<!\w)-(?=[\d.])")  # not the hyphen of a name
POWER = re.compile(r"(?<![\w.])(\d(?:\.\d+)?)e(-?\d+)(?!\w)")  # 1.9e5
SENTENCE = 40  # letters: a longer cell is one
WIDE = 6  # columns: a table of more is made to fit across the page


def as_latex(table: Table, *, caption: str, label: str) -> str:
    """A table with a caption and a label, its columns of figures aligned to the right.

    Rows that begin alike stand together, with some room to the next. What is wide spans both columns of a page.
    """
    headings, rows = table.headings, [[str(cell) for cell in row] for row in table.rows]
    wide = len(headings) > WIDE
    kind = "table*" if wide else "table"
    sides = [_column(column.right, cells) for column, cells in zip(table.columns, zip(headings, *rows))]
    return "\n".join(
        [
            rf"% \usepackage{{booktabs{',graphicx' if wide else ''}}}",
            rf"\begin{{{kind}}}",
            r"\centering",
            rf"\caption{{{escaped(caption)}}}",
            rf"\label{{tab:{label}}}",
            *([r"\resizebox{\textwidth}{!}{%"] if wide else []),
            rf"\begin{{tabular}}{{{''.join(sides)}}}",
            r"\toprule",
            _line(headings),
            r"\midrule",
            *_grouped(rows),
            r"\bottomrule",
            rf"\end{{tabular}}{'}' if wide else ''}",
            rf"\end{{{kind}}}",
            "",
        ]
    )


def _column(right: bool, cells: Sequence[str]) -> str:
    """How a column is set: sentences are broken into lines."""
    return "r" if right else r"p{0.4\linewidth}" if max(map(len, cells)) > SENTENCE else "l"


def _grouped(rows: Sequence[Sequence[str]]) -> list[str]:
    """Their lines, with room where the first cell changes, if some begin alike."""
    apart = len({row[0] for row in rows}) < len(rows)
    lines: list[str] = []
    for place, row in enumerate(rows):
        if apart and place and row[0] != rows[place - 1][0]:
            lines.append(r"\addlinespace")
        lines.append(_line(row))
    return lines


def escaped(text: str) -> str:
    """Text with LaTeX's own signs escaped, and those of numbers set as mathematics."""
    signs = "".join(SIGNS.get(sign, sign) for sign in text)
    return MINUS.sub("$-$", POWER.sub(r"$\1\\times10^{\2}$", signs))


def _line(cells: Sequence[str]) -> str:
    return rf"{' & '.join(map(escaped, cells))} \\"
