"""What a repair and training give back: `python docs/recovered.py` writes
figures/recovered.svg.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import altair as alt

from notall.charts.losses import Titles, tradeoff
from notall.charts.points import Point
from notall.charts.style import framed, save
from notall.experiments.pareto.records import ParetoRecord
from notall.experiments.pareto.run import DENSE_NAME
from notall.results.ledger import read_records

HERE = Path(__file__).parent
RECORD = HERE.parent / "benchmarks/pareto-healed/pareto.jsonl"
COLOURS = {
    "original": "#222222",
    "pruned": "#D55E00",
    "pruned, repaired": "#0072B2",
    "pruned, healed": "#009E73",
}
TITLE = "Quantise to 8 bits first, then prune, repair and train"
TOLD = (
    (
        "SmolLM2-135M-Instruct in llama.cpp, original and without 8 of its 30"
        " attentions or 4 of its 30 blocks."
    ),
    (
        "Bars: standard error of the loss; quartiles of the speedup. Lower right is"
        " better."
    ),
)


def points(records: Sequence[ParetoRecord]) -> list[Point]:
    """A colour for what was done to the weights, a shape a type; the plan is the
    label.
    """
    found = []
    for one in records:
        plan, _, state = one.model.partition(", ")
        colour = (
            "original"
            if plan == DENSE_NAME
            else ", ".join(filter(None, ["pruned", state]))
        )
        speedup = one.times.speedup_decode if one.times else None
        label = "" if plan == DENSE_NAME else plan
        found.append(Point(f"{one.model}, {one.type}", one.delta_nll, one.delta_nll_se, speedup,
                           colour=colour, shape=one.type, label=label))  # fmt: skip
    return found


def drawn(records: Sequence[ParetoRecord]) -> alt.LayerChart:
    return framed(
        tradeoff(points(records), COLOURS, Titles("weights", "type"), dense=False),
        TITLE,
        TOLD,
    )


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        save(drawn(read_records(RECORD, ParetoRecord)), Path(folder) / "recovered")
        shutil.copy(Path(folder) / "recovered.svg", HERE / "figures")
