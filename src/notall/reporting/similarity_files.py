"""Similarity by depth as files that people open and paste: the figure, and its table as CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..records.columns import Row, as_csv, with_error
from ..records.latex import as_latex
from ..records.similarity import SimilarityRecord
from .extras import FIGURES, installed

KINDS = ("block", "attention", "mlp")
HEADINGS = ("layer", "block", "attention", "MLP")
COSINE = with_error("cosine", "cosine", ".4f")


def write_similarity(rows: Sequence[Row], path: Path, model: str, text: str = "") -> list[Path]:
    """`path`.csv and .tex, and with the extra `report` .png, .svg and .html; what was written.

    `text` says what it was measured on. Raises `UsageError` as plots do.
    """
    on = f" on {text}" if text else ""
    caption = (
        f"Cosine similarity of the residual stream of {model} before and after each block, attention and MLP{on}: mean "
        "over tokens ± standard error over windows."
    )
    cells = {(row["layer"], row["kind"]): COSINE.text(row) for row in rows}
    layers = sorted({layer for layer, _ in cells})
    lines = [[str(layer), *(cells.get((layer, kind), "") for kind in KINDS)] for layer in layers]
    texts = {
        ".csv": as_csv(rows, SimilarityRecord.columns),
        ".tex": as_latex(HEADINGS, lines, caption=caption, label="similarity", right=[True] * len(HEADINGS)),
    }
    for suffix, content in texts.items():
        path.with_name(path.name + suffix).write_text(content, encoding="utf-8")
    drawn: list[str] = []
    if installed(*FIGURES):
        from . import plots

        plots.save(plots.similarity_chart(rows, f"Change by depth, {model}"), path)
        drawn = [".png", ".svg", ".html"]
    return [path.with_name(path.name + suffix) for suffix in (*texts, *drawn)]
