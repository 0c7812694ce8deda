"""A comparison of criteria as files that people open: its table, its plans, and the front as a figure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..records.columns import Column, Row, as_csv, as_markdown, given, legend, plain
from ..records.comparison import UNREPAIRED, ComparisonRecord, columns_of, with_tasks
from ..records.latex import as_latex
from ..records.plan import Plan
from ..records.ranges import in_ranges
from ..records.record import VARIANTS
from .extras import FIGURES, installed
from .rows import way_of
from .tables import best_first

PLANS = "plans"
LONG = 80  # letters of a file's name
SETS = {"mlp": "MLPs", "portable": "portable sublayers"}

PASTED = ("criterion", "aim", "repair", "delta_nll", "kl", "top1_agreement", "behind", "speedup_decode", "forwards")
TOLD = (
    "By: the objective that a criterion goes by, if by one. NLL and KL in nats a token; behind the best: NLL beyond "
    "that of the best row that is repaired alike, paired by window. Forward passes: over the text that is chosen by."
)
TIMED_ONCE = (
    "Plans that leave equal parameters, weights and KV cache take equal time, so one of them was timed, and the others "
    "show its times."
)


def write_comparison(records: Sequence[ComparisonRecord], out: Path, title: str, made: str) -> None:
    """The table, `out/table.md`, .tex and .csv, each plan in `out/plans`, and with the extra `report` the front.

    `title` stands over the table, and `made` says how and on what it was measured. Raises `UsageError` as plots do.
    """
    rows = [record.row() for record in records]
    note = f"\n{TIMED_ONCE}\n" if timed_once(records) else ""
    heading = f"# {title}\n\n{made}\n\n"
    (out / "table.md").write_text(heading + comparison_table(rows) + note, encoding="utf-8")
    (out / "table.tex").write_text("\n".join(_latex(rows, f"{title}. {made}")), encoding="utf-8")
    (out / "table.csv").write_text(as_csv(rows, columns_of(rows)), encoding="utf-8")
    (out / PLANS).mkdir(exist_ok=True)
    for record in records:
        shape = record.provenance.what.get("fingerprint") if record.provenance else None
        way = way_of(record.row() | {"repair": UNREPAIRED})
        plan = Plan(record.plan.attention, record.plan.mlp, fingerprint=shape, note=way)
        plan.save(plan_file(out, record.row()))
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

    "On the text it chose by" is the objective's rise there, "without sharing" how many forward passes the
    evaluations would be without shared states.
    """
    columns, groups = _grouped(records)
    parts = [f"{legend(columns)}\n"]
    parts += [
        f"### {_counted(count, space)}\n\n{as_markdown(ranked, columns)}" for (space, count), ranked in groups.items()
    ]
    return "\n".join(parts)


def plan_file(folder: Path, record: Row) -> Path:
    """Where the plan of a choice is, in the folder of a comparison."""
    named = f"{record['criterion']}-{record['aim']}-{record['space']}-{record['count']}"
    short = re.sub("[^A-Za-z0-9.-]+", "-", named)
    if len(short) > LONG:
        short = f"{short[:LONG]}-{hashlib.sha256(named.encode()).hexdigest()[:8]}"
    return folder / PLANS / f"{short}.json"


def _grouped(records: Sequence[Row]) -> tuple[list[Column], dict[tuple[str, int], list[Row]]]:
    """The columns, and by space and count the rows, what loses least first."""
    ranked = [records[place] for place in best_first(records)]
    rows = [_without_unused(with_tasks(record)) | {"layers": layers_in(record["plan"])} for record in ranked]
    columns = [
        column
        for column in given([*columns_of(rows), plain("layers", "skips")], rows)
        if column.fields[0] not in ("space", "count")
    ]
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["space"], row["count"]), []).append(row)
    return columns, groups


def _without_unused(row: Row) -> Row:
    """A row that names no objective and no text where its criterion goes by none."""
    unused = [("aim", row["evaluations"] <= 1), ("calibration_tokens", not row["evaluations"])]
    return row | {name: None for name, is_unused in unused if is_unused}


def layers_in(plan: Row) -> str:
    """Which layers a plan skips something of, such as `attention 6, 7; MLP 3`."""
    return "; ".join(f"{VARIANTS[kind]} {in_ranges(layers)}" for kind, layers in plan.items() if layers)


def _counted(count: int, space: str) -> str:
    return f"{count} {SETS.get(space, f'{space}s' if count != 1 else space)}"


def _latex(records: Sequence[Row], caption: str) -> Iterator[str]:
    """A table for each space and count, of what a paper says; the other columns are in the CSV."""
    columns, groups = _grouped(records)
    shown = [column for column in columns if column.fields[0] in PASTED or "value" in column.fields[0].split()]
    headings, right = [column.heading for column in shown], [column.right for column in shown]
    for (space, count), rows in groups.items():
        told = f"{caption} {_counted(count, space)} skipped. {TOLD} {legend(shown)}"
        cells = [[column.text(row) for column in shown] for row in rows]
        yield as_latex(headings, cells, caption=told, label=f"{space}-{count}", right=right)
