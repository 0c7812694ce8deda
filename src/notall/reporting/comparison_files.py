"""A comparison of criteria as files that people open: a table in Markdown, and the front as a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..records.columns import Row, as_markdown, given, legend
from ..records.comparison import ComparisonRecord, columns_of, with_tasks
from .extras import FIGURES, installed

TIMED_ONCE = (
    "Plans that leave equal parameters, weights and KV cache take equal time, so one of them was timed, and the others "
    "show its times."
)


def write_comparison(records: Sequence[ComparisonRecord], out: Path, title: str) -> None:
    """The table, `out/table.md`, and with the extra `report` the front, `out/front.png`, .svg and .html.

    Raises `UsageError` as plots do.
    """
    rows = [record.row() for record in records]
    note = f"\n{TIMED_ONCE}\n" if timed_once(records) else ""
    (out / "table.md").write_text(comparison_table(rows) + note, encoding="utf-8")
    if not installed(*FIGURES):
        return
    from . import plots

    plots.save(plots.front_chart(rows, title), out / "front")


def timed_once(records: Sequence[ComparisonRecord]) -> bool:
    """Whether plans of different sublayers show the same measurement of time."""
    timed = [record for record in records if record.times]
    of_size = {(record.params, record.weight_bytes, record.kv_bytes_per_token) for record in timed}
    return len({record.plan for record in timed}) > len(of_size)


def comparison_table(records: Sequence[Row]) -> str:
    """The comparison in Markdown, a part for each space and count, what loses least first.

    "On its own text" is what the objective rises by on the calibration text, "run in full" how many forward passes the
    evaluations would be without shared states.
    """
    rows = [with_tasks(record) for record in records]
    columns = [column for column in given(columns_of(rows), rows) if column.fields[0] not in ("space", "count")]
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["space"], row["count"]), []).append(row)
    parts = [f"{legend(columns)}\n"]
    for (space, count), group in groups.items():
        ranked = sorted(group, key=lambda row: math.inf if row["delta_nll"] is None else row["delta_nll"])
        parts.append(f"### {count} of {space}\n\n{as_markdown(ranked, columns)}")
    return "\n".join(parts)
