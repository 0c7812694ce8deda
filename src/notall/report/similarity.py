"""Similarity by depth: its files, and its part of a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..extras import FIGURES, installed
from ..files import write_whole
from ..plan import KIND_NAMES
from ..results.facts import COSINE, SIMILARITY, Similarity
from ..results.table import as_csv, as_latex, pivot
from .parts import Figure, Section

SIMILARITY_READS = "1 − cosine similarity. Low: little of the input is changed"


def write_similarity(
    rows: Sequence[Similarity], path: Path, model: str, text: str = ""
) -> list[Path]:
    """Write `path`.csv and .tex, and with the extra `report` .png, .svg and .html;
    returns what was written. `text` is what it was measured on.
    """
    on = f" on {text}" if text else ""
    caption = (
        f"Cosine similarity of the residual stream of {model} before and after each"
        f" block, attention and MLP{on}: mean over tokens ± standard error over windows."
    )
    entries = [
        (row, KIND_NAMES[row.kind], COSINE.cell(row))
        for row in sorted(rows, key=lambda row: row.layer)
    ]
    by_layer, _ = pivot("similarity", SIMILARITY[:1], entries, lambda row: row.layer)
    texts = {
        ".csv": as_csv(rows),
        ".tex": as_latex(by_layer, caption=caption, label="similarity"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in texts.items():
        write_whole(path.with_name(path.name + suffix), content)
    drawn = [".png", ".svg", ".html"] if installed(*FIGURES) else []
    if drawn:
        from ..charts.layers import similarity
        from ..charts.style import framed, save

        title = f"Change by depth, {model}"
        save(framed(similarity(rows), title, SIMILARITY_READS), path)
    return [path.with_name(path.name + suffix) for suffix in (*texts, *drawn)]


def similarity_section(rows: Sequence[Similarity]) -> Section:
    """The figure of the change by depth, after the paper's Fig. 1."""
    from ..charts.layers import similarity
    from ..charts.style import on_page

    figure = Figure(
        on_page(similarity(rows), 340),
        "change by depth",
        csv=as_csv(rows),
        note=f"{SIMILARITY_READS}.",
    )
    return Section("similarity", "Similarity by depth", (figure,))
