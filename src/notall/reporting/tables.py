"""The tables of a report: what a cell says, what it sorts by, and the same as CSV with every digit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..records.columns import Column, Row, as_csv, given, number, plain
from ..records.comparison import ComparisonRecord, columns_of, with_tasks
from ..records.kinds import KINDS
from ..records.record import Record
from .folder import STEPPED
from .rows import name_of, sublayers

IN_TABLES = {Path(kind.file).stem: kind for kind in KINDS.values() if kind.columns}
TITLES = {
    "measured": "Before and after",
    "healing": "How the healing went",
    "refits": "What became of each kept sublayer",
    "benchmarks": "Benchmarks",
    "battery": "What accuracy hides",
    "times": "Times",
    "front": "Skipping beside quantising",
}

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
    """The records that the page steps through, as the command of this kind writes them."""
    by_command: dict[str, type[Record]] = {kind.commands[0]: kind for kind in STEPPED}
    return _table("results", records, by_command[kind], tuple(range(len(records))))


def other_table(name: str, records: Sequence[Row], plans: Mapping[str, int]) -> Table:
    """What another command wrote; its rows show the plan of their name on the map."""
    kind = IN_TABLES.get(name)
    shown = tuple(plans.get(name_of(record)) if kind and "plan" in record else None for record in records)
    return _table(name, records, kind, shown)


def foreign_table(name: str, records: Sequence[Row]) -> Table:
    """What no command of ours wrote, as it is: its plans and provenance may be anything."""
    columns = given(_as_they_are(records), records)
    cells = (tuple(Cell(column.text(row), column.sorted_by(row)) for column in columns) for row in records)
    return Table(name, tuple(columns), tuple(cells), (None,) * len(records), as_csv(records, columns))


def _table(name: str, records: Sequence[Row], kind: type[Record] | None, plans: tuple[int | None, ...]) -> Table:
    rows = [with_tasks(record) for record in records]
    columns = given(_columns(rows, kind), rows)
    cells = (tuple(Cell(column.text(row), column.sorted_by(row)) for column in columns) for row in rows)
    named = [{"skipped": " ".join(sublayers(row)), **row} if "plan" in row else row for row in rows]
    return Table(name, tuple(columns), tuple(cells), plans, as_csv(named, [plain("skipped"), *columns]))


def _columns(rows: Sequence[Row], kind: type[Record] | None) -> Sequence[Column]:
    if kind is ComparisonRecord:
        return columns_of(rows)
    return kind.columns if kind else _as_they_are(rows)


def _as_they_are(records: Sequence[Row]) -> list[Column]:
    """Every field but the long ones."""
    keys = dict.fromkeys(key for record in records for key, value in record.items() if not isinstance(value, list))
    keys.pop("provenance", None)
    numeric = {key: all(_is_number(record.get(key)) for record in records) for key in keys}
    return [number(key, key, ".4g") if numeric[key] else plain(key) for key in keys]


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MOST)
