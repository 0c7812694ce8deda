"""The picture beside the paper's Figure 1, in its axes: `python docs/cosines.py` writes
figures/cosines.svg.
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import altair as alt

from notall.charts.style import COLOURS, LIGHT, save, titled

HERE = Path(__file__).parent
RECORD = HERE.parent / "benchmarks/paper/similarity.csv"
TITLE = "Features resemble the previous layer's, except at both ends"
TOLD = (
    "SmolLM2-135M-Instruct: cosine of a block's output and its input, mean over the"
    " tokens of a text ± one error"
)


def drawn(record: Path) -> alt.LayerChart:
    """Cosines by layer, from 0 to 1."""
    with record.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "block"]
    points = [
        {
            "layer": int(row["layer"]),
            "at": float(row["cosine"]),
            "off": float(row["cosine_se"]),
        }
        for row in rows
    ]
    points = [
        {**one, "low": one["at"] - one["off"], "high": one["at"] + one["off"]}
        for one in points
    ]
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
        y=alt.Y(
            "at:Q",
            title="cosine similarity with the previous layer's features",
            scale=alt.Scale(domain=[0, 1]),
        ),
    )
    bars = base.mark_rule(color=COLOURS["block"]).encode(y=alt.Y("low:Q"), y2="high:Q")
    line = base.mark_line(
        color=COLOURS["block"],
        point={"filled": True, "size": 45, "color": COLOURS["block"]},
    )
    chart = alt.layer(bars, line).properties(
        width=640, height=300, title=titled(TITLE, TOLD), padding=16
    )
    return chart.configure(**LIGHT)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        save(drawn(RECORD), Path(folder) / "cosines")
        shutil.copy(Path(folder) / "cosines.svg", HERE / "figures")
