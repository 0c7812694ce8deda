"""Tables as LaTeX, to be pasted into a paper as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence

SIGNS = {
    "\\": r"\textbackslash{}", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$", "<": "$<$", ">": "$>$",
    "–": "--", "*": "$^{*}$",
}  # fmt: skip
MINUS = re.compile(r"(?<!\w)-(?=[\d.])")  # not the hyphen of a name


def as_latex(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str, label: str, right: Sequence[bool]
) -> str:
    """A table with a caption and a label; `right` says of each column whether it is aligned to the right."""
    lines = [_line(headings), r"\midrule", *map(_line, rows)]
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escaped(caption)}}}",
            rf"\label{{tab:{label}}}",
            rf"\begin{{tabular}}{{{''.join('lr'[is_right] for is_right in right)}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def escaped(text: str) -> str:
    """Text with LaTeX's own signs escaped, and those of numbers set as mathematics."""
    return MINUS.sub("$-$", "".join(SIGNS.get(sign, sign) for sign in text))


def _line(cells: Sequence[str]) -> str:
    return rf"{' & '.join(map(escaped, cells))} \\"
