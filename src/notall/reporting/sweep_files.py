"""A sweep as files that people paste: its table as CSV, LaTeX and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..records.columns import as_csv, as_markdown, given, legend
from ..records.latex import as_latex
from ..records.sweep import SweepRecord

TABLE = "table"  # their name, before .csv, .tex and .md


def write_sweep(records: Sequence[SweepRecord], out: Path, model: str) -> None:
    """Write them into `out`. The CSV has every digit and the units of the records' fields."""
    rows = [record.row() for record in records]
    columns = given(SweepRecord.columns, rows)
    windows = records[0].sequences
    caption = (
        f"{model} without its deepest attentions, MLPs or blocks, beside the dense model: quality on {windows} windows "
        f"of text, and times. Fraction: of the layers. NLL and KL in nats a token. {legend(columns)}"
    )
    cells = [[column.text(row) for column in columns] for row in rows]
    headings, right = [column.heading for column in columns], [column.right for column in columns]
    latex = as_latex(headings, cells, caption=caption, label="sweep", right=right)
    texts = {
        "csv": as_csv(rows, columns),
        "tex": latex,
        "md": f"{caption}\n\n{as_markdown(rows, columns)}",
    }
    for suffix, text in texts.items():
        (out / f"{TABLE}.{suffix}").write_text(text, encoding="utf-8")
