"""The tables of a report: what a cell says, what it sorts by, and the same as CSV with every digit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..records.benchmarks import usual_metric
from ..records.claims import ClaimRecord
from ..records.columns import Column, Row, as_csv, given, number, plain, with_difference, with_error
from ..records.comparison import ASKED, UNREPAIRED, ComparisonRecord, columns_of, with_tasks
from ..records.kinds import KINDS
from ..records.record import CONFIGURED, DELTA_NLL, Record
from .folder import STEPPED
from .rows import name_of, sublayers
from .usable import is_known, is_usable
from .verdict import nats_lost

IN_TABLES = {Path(kind.file).stem: kind for kind in KINDS.values() if kind.columns}
TITLES = {
    "measured": "Before and after",
    "healing": "How the healing went",
    "refits": "What became of each kept sublayer",
    "benchmarks-by-plan": "Benchmarks",
    "battery-by-plan": "What accuracy hides",
    "benchmarks": "Benchmarks, one by one",
    "battery": "What accuracy hides, check by check",
    "times": "Times",
    "drafts": "As a draft model",
    "front": "Skipping beside quantising",
}

BY_PLAN = ("benchmarks", "battery")  # too long to read as they are
CONFIGURATION = tuple(field for column in CONFIGURED for field in column.fields)
USABLE = plain("usable")
Asked = tuple[str, ...]  # a question of a comparison

MOST = 1e300  # that is a number to look at; a whole one may have thousands of digits


@dataclass(frozen=True)
class Cell:
    """`value` is what is sorted by: a number, or else text."""

    text: str
    value: float | str | None


@dataclass(frozen=True)
class Table:
    """`plans` holds, for each row, the plan that it is about, if it is about one."""

    name: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    plans: tuple[int | None, ...]
    csv: str

    @property
    def headings(self) -> tuple[str, ...]:
        return tuple(column.heading for column in self.columns)


def stepped_table(kind: str, records: Sequence[Row]) -> Table:
    """The records that the page steps through, as the command of this kind writes them; of a comparison the best first.

    Where it is known what a plan costs, a column says whether the model is still usable.
    """
    by_command: dict[str, type[Record]] = {kind.commands[0]: kind for kind in STEPPED}
    order = best_first(records) if kind == "compare" else tuple(range(len(records)))
    return _table("results", [records[place] for place in order], by_command[kind], order)


def best_first(records: Sequence[Row]) -> tuple[int, ...]:
    """Places of a comparison's records: by space and count, then by loss, what is repaired beside what is not."""
    lost: dict[Asked, float] = {}
    for record in records:
        lost[_asked(record)] = min(nats_lost(record), lost.get(_asked(record), math.inf))
    spaces = [*dict.fromkeys(record["space"] for record in records)]

    def rank(place: int) -> tuple[Any, ...]:
        record = records[place]
        asked = _asked(record)
        return spaces.index(record["space"]), record["count"], lost[asked], asked, nats_lost(record)

    return tuple(sorted(range(len(records)), key=rank))


def repairs_table(records: Sequence[Row]) -> Table | None:
    """What each choice of a comparison costs, and beside it after each repair; None where nothing is repaired."""
    repairs = [*dict.fromkeys(record["repair"] for record in records if "repair" in record)]
    if not set(repairs) - {UNREPAIRED}:
        return None
    rows: dict[Asked, Row] = {}
    for place in best_first(records):
        record = records[place]
        row = rows.setdefault(_asked(record), {name: record[name] for name in ASKED} | {"place": place})
        row |= {f"{record['repair']} {field}": record[field] for field in DELTA_NLL.fields}
    columns = [plain("criterion"), plain("aim", "by"), plain("space", "among"), plain("count")]
    columns += [with_error(f"{name} delta_nll", "unrepaired" if name == UNREPAIRED else name) for name in repairs]
    return _of_columns("repairs", [*rows.values()], columns, tuple(row.pop("place") for row in rows.values()))


def claims_table(claims: Sequence[Row]) -> Table:
    """The paper's claims, what became of them, and the figures that say so."""
    return _of_columns("claims", claims, ClaimRecord.columns, (None,) * len(claims))


def _asked(record: Row) -> Asked:
    return tuple(str(record[name]) for name in ASKED)


def _judged(record: Row) -> Row:
    return record | {"usable": "yes" if is_usable(record) else "no"} if is_known(record) else record


def other_table(name: str, records: Sequence[Row], plans: Mapping[str, int]) -> Table:
    """What another command wrote; its rows show the plan of their name on the map."""
    kind = IN_TABLES.get(name)
    shown = tuple(plans.get(name_of(record)) if kind and "plan" in record else None for record in records)
    return _table(name, records, kind, shown)


def by_plan_table(name: str, records: Sequence[Row], plans: Mapping[str, int]) -> Table:
    """A row for each configuration, and a column for each task, or check, of all that `name` holds a line each of."""
    rows: dict[str, Row] = {}
    for record in records:
        row = rows.setdefault(name_of(record), {field: record[field] for field in (*CONFIGURATION, "plan")})
        asked, dense = _asked_of(record), record["variant"] == "dense"
        row |= {f"{asked} value": record["value"], f"{asked} delta": None if dense else record["delta"]}
        row[f"{asked} delta_se"] = record["delta_se"]
    columns = [*CONFIGURED, *map(with_difference, dict.fromkeys(map(_asked_of, records)))]
    return _of_columns(f"{name}-by-plan", [*rows.values()], columns, tuple(map(plans.get, rows)))


def _asked_of(record: Row) -> str:
    return record["check"] if "check" in record else f"{record['task']}, {usual_metric(record['metric'])}"


def foreign_table(name: str, records: Sequence[Row]) -> Table:
    """What no command of ours wrote, as it is: its plans and provenance may be anything."""
    return _of_columns(name, records, given(_as_they_are(records), records), (None,) * len(records))


def _of_columns(name: str, rows: Sequence[Row], columns: Sequence[Column], plans: tuple[int | None, ...]) -> Table:
    cells = (tuple(Cell(column.text(row), column.sorted_by(row)) for column in columns) for row in rows)
    return Table(name, tuple(columns), tuple(cells), plans, as_csv(rows, columns))


def _table(name: str, records: Sequence[Row], kind: type[Record] | None, plans: tuple[int | None, ...]) -> Table:
    rows = [with_tasks(_judged(record)) for record in records]
    columns = given(_columns(rows, kind), rows)
    cells = (tuple(Cell(column.text(row), column.sorted_by(row)) for column in columns) for row in rows)
    named = [{"skipped": " ".join(sublayers(row)), **row} if "plan" in row else row for row in rows]
    return Table(name, tuple(columns), tuple(cells), plans, as_csv(named, [plain("skipped"), *columns]))


def _columns(rows: Sequence[Row], kind: type[Record] | None) -> Sequence[Column]:
    if kind is None:
        return _as_they_are(rows)
    columns = list(columns_of(rows) if kind is ComparisonRecord else kind.columns)
    place = columns.index(DELTA_NLL) + 1 if DELTA_NLL in columns else 0
    return [*columns[:place], USABLE, *columns[place:]] if place else columns


def _as_they_are(records: Sequence[Row]) -> list[Column]:
    """Every field but the long ones."""
    keys = dict.fromkeys(key for record in records for key, value in record.items() if not isinstance(value, list))
    keys.pop("provenance", None)
    numeric = {key: all(_is_number(record.get(key)) for record in records) for key in keys}
    return [number(key, key, ".4g") if numeric[key] else plain(key) for key in keys]


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MOST)
