"""Tables as LaTeX, to be pasted into a paper as they are."""

import re
from collections.abc import Sequence
from itertools import groupby

from .table import Table

SIGNS = {
    "\\": r"\textbackslash{}", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$", "<": "$<$", ">": "$>$",
    "–": "--", "*": "$^{*}$",
}  # fmt: skip
MINUS = re.compile(r"(?<!\w)-(?=[\d.])")  # not the hyphen of a name
POWER = re.compile(r"(?<![\w.])(\d(?:\.\d+)?)e(-?\d+)(?!\w)")  # 1.9e5
SENTENCE = 40  # letters: a longer cell is one


def as_latex(table: Table, *, caption: str, label: str) -> str:
    """With sentences broken into lines, rows that begin alike together, and what is wide across a page's columns."""
    rows = [[str(cell) for cell in row] for row in table.rows]
    wide = len(table.headings) > 6  # more is made to fit across the page
    kind = "table*" if wide else "table"
    sides = [
        "r" if column.right else r"p{0.4\linewidth}" if max(map(len, cells)) > SENTENCE else "l"
        for column, cells in zip(table.columns, zip(table.headings, *rows))
    ]
    groups = [[_line(row) for row in group] for _, group in groupby(rows, key=lambda row: row[0])]
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
        *(line for place, group in enumerate(groups) for line in (*(apart if place else []), *group)),
        r"\bottomrule",
        rf"\end{{tabular}}{'}' if wide else ''}",
        rf"\end{{{kind}}}",
    ]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text with LaTeX's own signs escaped, and those of numbers set as mathematics."""
    signs = "".join(SIGNS.get(sign, sign) for sign in text)
    return MINUS.sub("$-$", POWER.sub(r"$\1\\times10^{\2}$", signs))


def _line(cells: Sequence[str]) -> str:
    return rf"{' & '.join(map(escaped, cells))} \\"
