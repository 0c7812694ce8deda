"""The tables of a report: what a cell says, what it sorts by, and the same as CSV with every digit."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .console import Column, number, plain, probability, size, with_error, with_spread
from .rows import KINDS, Row, counted, name_of, sublayers

Columns = Sequence[tuple[str, Column]]  # each with the field that it sorts by

SKIPPED = ("variant", Column("skip", name_of, right=False))
SPEEDUPS = (
    ("speedup_prefill", with_spread("speedup_prefill", "prefill speedup [quartiles]", ".2f")),
    ("speedup_decode", with_spread("speedup_decode", "decode speedup [quartiles]", ".2f")),
)
TIMES = (
    ("prefill_ms", with_spread("prefill_ms", "prefill ms [quartiles]")),
    ("decode_ms_per_token", with_spread("decode_ms_per_token", "decode ms a token [quartiles]")),
    *SPEEDUPS,
)
BYTES = (
    ("weight_bytes", size("weight_bytes", "weights")),
    ("kv_bytes_per_token", size("kv_bytes_per_token", "KV a token")),
)
SPENT = (
    ("evaluations", number("evaluations", "evaluations", ",d")),
    ("forwards", number("forwards", "forward passes", ",.1f")),
    ("seconds", number("seconds", "CPU s", ",.1f")),
)
QUALITY = (
    ("delta_nll", with_error("delta_nll", "NLL added ± s.e.")),
    ("kl", with_error("kl", "KL ± s.e.")),
    ("top1_agreement", number("top1_agreement", "same first choice", ".0%")),
)
SWEEP = (
    ("variant", Column("skip", lambda row: KINDS[row["variant"]], right=False)),
    ("fraction", number("fraction", "fraction", ".0%")),
    ("keep_last", Column("last layer", lambda row: "kept" if row["keep_last"] else "", right=False)),
    ("delta_nll", with_error("delta_nll", "NLL added ± s.e.", ".2f")),
    ("perplexity", Column("perplexity", lambda row: _perplexity(row["perplexity"]))),
    ("kl", with_error("kl", "KL ± s.e.", ".2f")),
    ("top1_agreement", number("top1_agreement", "same first choice", ".0%")),
    *SPEEDUPS,
    *BYTES,
)
COMPARED = (
    ("criterion", plain("criterion")),
    ("aim", plain("aim", "by")),
    ("space", plain("space", "among")),
    ("count", number("count", "count", "d")),
    *QUALITY,
)
CHOSEN = (
    ("chosen", plain("chosen")),
    ("dense_cost", number("dense_cost", "objective, dense", ".4f")),
    ("cost", number("cost", "objective, skipped", ".4f")),
    *QUALITY,
    ("predicted_speedup", number("predicted_speedup", "predicted speedup", ".3f")),
    ("speedup", with_spread("speedup", "measured speedup [quartiles]", ".3f")),
    *SPENT,
    ("in_time", Column("in time", lambda row: "yes" if row["in_time"] else "no", right=False)),
)
BENCHED = (
    ("model", Column("skip", counted, right=False)),
    ("prompt_tokens", number("prompt_tokens", "prompt tokens", "d")),
    ("new_tokens", number("new_tokens", "new tokens", "d")),
    ("batch_size", number("batch_size", "batch", "d")),
    *TIMES,
    ("params", number("params", "parameters", ",")),
    *BYTES,
    ("peak_bytes", size("peak_bytes", "peak memory")),
)
# Of files that other commands write. A file that is not here is shown as it is.
OTHERS: dict[str, Columns] = {
    "chosen": CHOSEN,
    "bench": BENCHED,
    "benchmarks": (
        ("task", plain("task")),
        SKIPPED,
        ("num_fewshot", number("num_fewshot", "shots", "d")),
        ("documents", number("documents", "documents", "d")),
        ("metric", plain("metric")),
        ("value", with_error("value", "value ± s.e.")),
        ("delta", with_error("delta", "difference to dense ± s.e.")),
        ("p_value", probability("p_value", "p")),
    ),
    "battery": (
        ("check", plain("check")),
        SKIPPED,
        ("value", with_error("value", "value ± s.e.")),
        ("delta", with_error("delta", "difference to dense ± s.e.")),
        ("p_value", probability("p_value", "p")),
        ("worse", Column("worse", lambda row: "worse" if row["worse"] else "", right=False)),
    ),
    "times": (
        SKIPPED,
        ("prompt_tokens", number("prompt_tokens", "prompt tokens", "d")),
        ("batch_size", number("batch_size", "batch", "d")),
        *TIMES,
    ),
}
TITLES = {"benchmarks": "Benchmarks", "battery": "What accuracy hides", "times": "Times"}


@dataclass(frozen=True)
class Cell:
    """`value` is what is sorted by: a number, or else text."""

    text: str
    value: Any


@dataclass(frozen=True)
class Table:
    """`plans` holds, for each row, the plan that it is about, if it is about one."""

    name: str
    headings: tuple[str, ...]
    right: tuple[bool, ...]
    rows: tuple[tuple[Cell, ...], ...]
    plans: tuple[int | None, ...]
    csv: str


def stepped_table(kind: str, records: Sequence[Row]) -> Table:
    """The records that the page steps through, as the command of this kind writes them."""
    rows = [_with_tasks(record) for record in records]
    columns = {"sweep": SWEEP, "compare": _compared(rows), "search": CHOSEN, "bench": BENCHED}[kind]
    return _table("results", rows, columns, tuple(range(len(rows))))


def _with_tasks(record: Row) -> Row:
    """A record with the figures of its tasks beside its others."""
    figures = {
        f"{task} {name}": figure[field]
        for task, figure in record.get("tasks", {}).items()
        for field, name in (("value", "value"), ("delta", "delta"), ("delta_stderr", "delta_se"))
    }
    return record | figures


def _compared(rows: Sequence[Row]) -> Columns:
    tasks = dict.fromkeys(task for row in rows for task in row.get("tasks", ()))
    paired = ((f"{task} delta", with_error(f"{task} delta", f"{task}, to dense ± s.e.")) for task in tasks)
    return (*COMPARED, *paired, *SPENT, SPEEDUPS[1])


def other_table(name: str, records: Sequence[Row], plans: Mapping[str, int]) -> Table:
    """What another command wrote; its rows show the plan of their name on the map."""
    columns = OTHERS.get(name) or _columns(records)
    shown: tuple[int | None, ...] = (None,) * len(records)
    if name in OTHERS:
        shown = tuple(plans.get(name_of(record)) for record in records)
    return _table(name, records, columns, shown)


def _table(name: str, records: Sequence[Row], columns: Columns, plans: tuple[int | None, ...]) -> Table:
    """Of the columns those that a record has something in."""
    columns = [(key, column) for key, column in columns if any(row.get(key) is not None for row in records)]
    return Table(
        name,
        tuple(column.heading for _, column in columns),
        tuple(column.right for _, column in columns),
        tuple(tuple(_cell(row, key, column) for key, column in columns) for row in records),
        plans,
        to_csv([{"skipped": " ".join(sublayers(row)), **row} if "plan" in row else row for row in records]),
    )


def _cell(row: Row, key: str, column: Column) -> Cell:
    value = row.get(key)
    return Cell("-" if value is None else column.text(row), value)


def _columns(records: Sequence[Row]) -> Columns:
    """Every field but the long ones, as it is."""
    keys = dict.fromkeys(key for record in records for key, value in record.items() if not isinstance(value, list))
    keys.pop("provenance", None)
    numeric = {key: all(_is_number(record.get(key)) for record in records) for key in keys}
    return [(key, number(key, key, ".4g") if numeric[key] else plain(key)) for key in keys]


def to_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Every field that is a number or text, with every digit."""
    flat = [
        {key: value for key, value in record.items() if not isinstance(value, (dict, list, tuple))}
        for record in records
    ]
    names = list(dict.fromkeys(name for record in flat for name in record))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _perplexity(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if value < 1e5 else f"{value:.1e}"


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
