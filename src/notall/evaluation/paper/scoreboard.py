"""The paper's tables from the records: benchmarks and times, by variant and fraction skipped, in three formats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ...measuring.statistics import mean_and_error, sign_flip_p_value
from ...records.benchmarks import BatteryRecord, BenchmarkRecord, TimesRecord, usual_metric
from ...records.columns import Row, as_csv
from ...records.latex import as_latex
from ...records.record import CONFIGURED, TIMES, VARIANTS, Configured, Record
from ..tasks import stock_name

ConfigurationKey = tuple[str, float, bool]  # variant, fraction, keep_last

HEADINGS = {
    "arc_challenge": "ARC-C",
    "hellaswag": "HellaSwag",
    "mmlu": "MMLU",
    "truthfulqa_mc2": "TruthfulQA",
    "winogrande": "Winogrande",
    "gsm8k": "GSM8K",
}
DENSE = ("dense", "0%")
SIGNIFICANT = 0.05
ROUNDING = 1e-6  # probabilities of choices may add up to a little more than 1


def heading_of(task: str) -> str:
    """What the leaderboard calls a task, or else the harness."""
    return HEADINGS.get(stock_name(task), stock_name(task))


def key_of(record: Configured) -> ConfigurationKey:
    return record.variant, record.fraction, record.keep_last


class Scoreboard:
    """Benchmark records by configuration and column; a column is a task, or task and metric where it has several."""

    def __init__(self, records: Iterable[BenchmarkRecord]) -> None:
        records = list(records)
        self.cells: dict[ConfigurationKey, dict[str, BenchmarkRecord]] = {}
        metrics: dict[str, set[str]] = {}
        for record in records:
            metrics.setdefault(record.task, set()).add(record.metric)
        for record in records:
            task: str = record.task
            name = heading_of(task)
            column = name if len(metrics[record.task]) == 1 else f"{name}, {usual_metric(record.metric)}"
            self.cells.setdefault(key_of(record), {})[column] = record
        self.columns = list(dict.fromkeys(column for row in self.cells.values() for column in row))

    @property
    def shared(self) -> list[str]:
        """The columns that every configuration has, as shares of 0 to 1: what an average is taken over."""
        return [
            column
            for column in self.columns
            if all(column in row and _is_share(row[column]) for row in self.cells.values())
        ]

    def average(self, key: ConfigurationKey) -> float:
        return mean_and_error([self._value(key, column) for column in self.shared])[0]

    def _value(self, key: ConfigurationKey, column: str) -> float:
        value = self.cells[key][column].value
        assert value is not None  # of a shared column
        return value

    def difference(self, key: ConfigurationKey, other: ConfigurationKey) -> tuple[float, float, float]:
        """The average of `key` less that of `other`, its standard error and p value, paired by document."""
        means, errors, terms = [], [], list[float]()
        for column in self.shared:
            ours, theirs = _shares(self.cells[key][column]), _shares(self.cells[other][column])
            means.append(self._value(key, column) - self._value(other, column))
            differences = [a - b for a, b in zip(ours, theirs)]
            errors.append(mean_and_error(differences)[1])
            terms += [one / len(differences) for one in differences]
        count = len(self.shared)
        error = math.sqrt(math.fsum(error**2 for error in errors)) / count
        return math.fsum(means) / count, error, sign_flip_p_value(terms)

    def averages(self) -> list[Row]:
        """A row for each configuration: the average over tasks, beside the dense model's."""
        dense = next(key for key in self.cells if key[0] == "dense")
        rows: list[Row] = []
        for key in self.cells if self.shared else ():
            delta, error, p_value = self.difference(key, dense)
            row: Row = {**dict(zip(("variant", "fraction", "keep_last"), key)), "tasks": len(self.shared)}
            rows.append(row | {"average": self.average(key), "delta": delta, "delta_se": error, "p_value": p_value})
        return rows


def benchmark_table(board: Scoreboard, keep_last: bool) -> pd.DataFrame:
    """Values in per cent, with the paired difference to dense ± its standard error; * where p < 0.05."""
    rows = {}
    for key, cells in board.cells.items():
        if key[0] != "dense" and key[2] != keep_last:
            continue
        row = {column: _score(cells.get(column)) for column in board.columns}
        if board.shared:
            row["average"] = _with_difference(board.average(key), *board.difference(key, _dense(board)), key)
        rows[_label(key)] = row
    return _frame(rows)


def time_table(records: Iterable[TimesRecord], keep_last: bool, quantity: str) -> pd.DataFrame:
    """`quantity` (prefill_ms or decode_ms_per_token) by prompt length: median, and how many times dense's speed.

    The speedup is the median of the rounds' own ratios, with its quartiles.
    """
    by_field = {column.fields[0]: column for column in TIMES}
    speedup = {"prefill_ms": "speedup_prefill", "decode_ms_per_token": "speedup_decode"}[quantity]
    taken, gained = by_field[quantity], by_field[speedup]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for record in records:
        if record.variant != "dense" and record.keep_last != keep_last:
            continue
        column = f"prompt {record.prompt_tokens}, batch {record.batch_size}"
        row = record.row()
        gain = f" ({gained.value(row)}× {gained.beside(row)})" if record.variant != "dense" else ""
        rows.setdefault(_label(key_of(record)), {})[column] = f"{taken.value(row)}{gain}"
    return _frame(rows)


def battery_table(records: Iterable[BatteryRecord], keep_last: bool) -> pd.DataFrame:
    """Each check's value, with the paired difference to dense ± its standard error; * where it got worse beyond it."""
    rows: dict[tuple[str, str], dict[str, str]] = {DENSE: {}}
    for record in records:
        check, value, delta = record.check, record.value, record.delta
        if value is None or delta is None:  # of a model that overflows
            continue
        rows[DENSE][check] = f"{value - delta:.3g}"
        if record.keep_last == keep_last:
            error = "–" if record.delta_se is None else f"{record.delta_se:.2g}"
            mark = "*" if record.worse else ""
            rows.setdefault(_label(key_of(record)), {})[check] = f"{value:.3g} ({delta:+.2g}{mark} ± {error})"
    return _frame(rows)


@dataclass(frozen=True)
class PaperTable:
    """A table with the caption under which it stands in a paper; `name` is its label, and its file without suffix."""

    name: str
    caption: str
    frame: pd.DataFrame

    def markdown(self) -> str:
        return str(self.frame.reset_index().to_markdown(index=False))

    def latex(self) -> str:
        cells = self.frame.reset_index()
        right = [place >= self.frame.index.nlevels for place in range(len(cells.columns))]
        return as_latex([*cells.columns], cells.to_numpy().tolist(), caption=self.caption, label=self.name, right=right)


def write_tables(tables: Iterable[PaperTable], out: Path) -> None:
    """Each table as out/NAME.tex; the Markdown is put together by whoever tells the story."""
    out.mkdir(parents=True, exist_ok=True)
    for table in tables:
        (out / f"{table.name}.tex").write_text(table.latex(), encoding="utf-8")


def write_csv(records: Sequence[Record], path: Path) -> None:
    """The records as they are, a line each, without what is no figure."""
    rows = [{name: value for name, value in record.row().items() if name != "values"} for record in records]
    path.write_text(as_csv(rows, records[0].columns if records else ()), encoding="utf-8")


def _dense(board: Scoreboard) -> ConfigurationKey:
    return next(key for key in board.cells if key[0] == "dense")


def _label(key: ConfigurationKey) -> tuple[str, str]:
    variant, fraction, _ = key
    return VARIANTS[variant], f"{fraction:.0%}"


def _frame(rows: Mapping[tuple[str, str], Mapping[str, str]]) -> pd.DataFrame:
    names = [column.heading for column in CONFIGURED[:2]]
    table = pd.DataFrame(rows.values(), index=pd.MultiIndex.from_tuples(rows, names=names))
    return table.fillna("–")


def _score(record: BenchmarkRecord | None) -> str:
    if record is None or record.value is None:
        return "–"
    if not _is_share(record):
        return f"{record.value:.3g}"
    if record.variant == "dense":
        return f"{100 * record.value:.1f} ± {_percent(record.value_se)}"
    mark = "*" if record.p_value is not None and record.p_value < SIGNIFICANT else ""
    delta = "–" if record.delta is None else f"{100 * record.delta:+.1f}"
    return f"{100 * record.value:.1f} ({delta}{mark} ± {_percent(record.delta_se)})"


def _with_difference(value: float, delta: float, error: float, p_value: float, key: ConfigurationKey) -> str:
    if key[0] == "dense":
        return f"{100 * value:.1f}"
    mark = "*" if p_value < SIGNIFICANT else ""
    return f"{100 * value:.1f} ({100 * delta:+.1f}{mark} ± {_percent(error)})"


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _is_share(record: BenchmarkRecord) -> bool:
    shares = _shares(record)
    if record.value is None or not shares or len(shares) < record.documents:
        return False
    return all(-ROUNDING <= value <= 1 + ROUNDING for value in shares)


def _shares(record: BenchmarkRecord) -> list[float]:
    """The metric of each document that has one."""
    return [value for value in record.values or () if value is not None]
