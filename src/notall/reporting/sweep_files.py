"""A sweep as files that people paste: its table as CSV, LaTeX and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..records.columns import as_csv, as_markdown, given, legend
from ..records.latex import as_latex
from ..records.provenance import place_of, windows_of
from ..records.sweep import SweepRecord

TABLE = "table"  # their name, before .csv, .tex and .md


def write_sweep(records: Sequence[SweepRecord], out: Path, model: str) -> None:
    """Write them into `out`. The CSV has every digit and the units of the records' fields."""
    rows = [record.row() for record in records]
    columns = given(SweepRecord.columns, rows)
    caption = (
        f"{model} without its deepest attentions, MLPs or blocks, beside the dense model: quality on {_text(records)}. "
        f"Fraction: of the layers; where nothing is said, the last layer is skipped too. NLL and KL in nats a token. "
        f"{legend(columns)} {_times(records)}"
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


def _text(records: Sequence[SweepRecord]) -> str:
    about = records[0].provenance
    return windows_of(about.what) if about and "length" in about.what else f"{records[0].sequences} windows of text"


def _times(records: Sequence[SweepRecord]) -> str:
    """How and where, as far as that was written down."""
    about = records[0].provenance
    if about is None:
        return ""
    timed = about.what.get("timed") or {}
    asked = "{prompt_tokens} prompt tokens, {new_tokens} new ones, {rounds} rounds".format_map(timed) if timed else ""
    where = f"{about.what.get('dtype')} on {place_of(about.where.get('machine'), versions=False)}"
    return f"Times of {asked}; {where}." if asked else f"{where}."
