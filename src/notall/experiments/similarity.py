"""How similar each layer's features are to the previous layer's: the paper's Fig. 1, as records and as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..extras import FIGURES, installed
from ..plan import KIND_NAMES
from ..results.facts import COSINE, SIMILARITY, Similarity
from ..results.latex import as_latex
from ..results.record import Record
from ..results.table import as_csv, pivot
from .shown import Figure, Section

HOW_TO_READ = "1 − cosine similarity. Low: little of the input is changed"


class SimilarityRecord(Record, Similarity):
    """One block or sublayer of a run."""

    file = "similarity.jsonl"
    commands = ("sweep", "paper")
    key_fields = ("layer", "kind")

    record: Literal["similarity"] = "similarity"


def write_similarity(rows: Sequence[Similarity], path: Path, model: str, text: str = "") -> list[Path]:
    """`path`.csv and .tex, and with the extra `report` .png, .svg and .html; what was written.

    `text` says what it was measured on. Raises `UsageError` where a figure cannot be written.
    """
    on = f" on {text}" if text else ""
    caption = (
        f"Cosine similarity of the residual stream of {model} before and after each block, attention and MLP{on}: mean "
        "over tokens ± standard error over windows."
    )
    figures = [(row, KIND_NAMES[row.kind], COSINE.cell(row)) for row in sorted(rows, key=lambda row: row.layer)]
    lines, _ = pivot("similarity", SIMILARITY[:1], figures, lambda row: row.layer)
    texts = {".csv": as_csv(rows), ".tex": as_latex(lines, caption=caption, label="similarity")}
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in texts.items():
        path.with_name(path.name + suffix).write_text(content, encoding="utf-8")
    drawn: list[str] = []
    if installed(*FIGURES):
        from ..charts.layers import similarity
        from ..charts.style import framed, save

        save(framed(similarity(rows), f"Change by depth, {model}", HOW_TO_READ), path)
        drawn = [".png", ".svg", ".html"]
    return [path.with_name(path.name + suffix) for suffix in (*texts, *drawn)]


def similarity_section(rows: Sequence[Similarity]) -> Section:
    """What a page shows of them."""
    from ..charts.layers import similarity
    from ..charts.style import on_page

    figure = Figure(on_page(similarity(rows), 340), "change by depth", csv=as_csv(rows), note=f"{HOW_TO_READ}.")
    return Section("similarity", "Similarity by depth", (figure,))
