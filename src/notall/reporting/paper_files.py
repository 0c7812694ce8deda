"""What `notall paper` leaves for people, read again: its claims, and its tables where the records are not kept."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import dropwhile, islice, takewhile
from pathlib import Path

from pydantic import ValidationError

from ..errors import UsageError, shortened
from ..records.benchmarks import BatteryRecord, BenchmarkRecord, TimesRecord
from ..records.columns import Row
from ..records.record import Record

PAPER: tuple[type[Record], ...] = (BenchmarkRecord, BatteryRecord, TimesRecord)
STORY = "paper.md"
CLAIM = ("claim", "verdict", "here")  # the headings of one of its tables
TITLE = re.compile(r"# The evaluation of arXiv \S+ on (.+)\n\n(.+)")
BETWEEN = re.compile(r"(?<!\\)\|")
UNTOLD: Row = {"plan": {"attention": [], "mlp": []}, "values": None}  # what a table of figures leaves out


def read_claims(folder: Path) -> tuple[Row, ...]:
    """The claims and what became of them, once the evaluation has come to its end. Raises `UsageError` for no text."""
    story = _text(folder / STORY)
    title = TITLE.match(story)
    about = {"provenance": {"model": title[1], "measured": title[2]} if title else {}}
    rows = dropwhile(CLAIM.__ne__, map(_cells, story.splitlines()))
    table = takewhile(bool, rows)  # a line that is no row ends it
    return tuple(dict(zip(CLAIM, row)) | about for row in islice(table, 2, None) if len(row) == len(CLAIM))


def read_tables(folder: Path) -> dict[str, tuple[Row, ...]]:
    """By name the rows of those tables that are there. Raises `UsageError` for a damaged one."""
    files = {Path(kind.file).stem: kind for kind in PAPER}
    found = {name: tuple(_rows(folder / f"{name}.csv", kind)) for name, kind in files.items()}
    return {name: rows for name, rows in found.items() if rows}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else ""
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"cannot read {shortened(file)}: write it again with notall paper, or move it away") from None


def _cells(line: str) -> tuple[str, ...]:
    """Of a row of a table; of any other line none."""
    return tuple(cell.strip().replace(r"\|", "|") for cell in BETWEEN.split(line)[1:-1])


def _rows(file: Path, kind: type[Record]) -> Iterator[Row]:
    untold = {name: value for name, value in UNTOLD.items() if name in kind.model_fields}
    rows = csv.DictReader(_text(file).splitlines())
    try:
        for row in rows:
            record = kind.model_validate(untold | {name: value or None for name, value in row.items()}, strict=False)
            yield {name: value for name, value in record.row().items() if name not in untold}
    except (ValidationError, csv.Error):
        where = f"line {rows.line_num} of {shortened(file)}"
        raise UsageError(f"{where} is no row of notall paper: write it again, or move it away") from None
