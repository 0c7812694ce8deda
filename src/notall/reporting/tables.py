"""The tables of a report: what a cell says, what it sorts by, and the same as CSV with every digit."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..console import Column, number, plain, size, with_error, with_spread
from .folder import KINDS, Row, name_of, sublayers

COLUMNS = (
    ("variant", Column("skip", lambda row: KINDS[row["variant"]], right=False)),
    ("fraction", number("fraction", "fraction", ".0%")),
    ("keep_last", Column("last layer", lambda row: "kept" if row["keep_last"] else "", right=False)),
    ("delta_nll", with_error("delta_nll", "NLL added ± s.e.", ".2f")),
    ("perplexity", Column("perplexity", lambda row: _perplexity(row["perplexity"]))),
    ("kl", with_error("kl", "KL ± s.e.", ".2f")),
    ("top1_agreement", number("top1_agreement", "same first choice", ".0%")),
    ("speedup_prefill", with_spread("speedup_prefill", "prefill speedup [quartiles]", ".2f")),
    ("speedup_decode", with_spread("speedup_decode", "decode speedup [quartiles]", ".2f")),
    ("weight_bytes", size("weight_bytes", "weights")),
    ("kv_bytes_per_token", size("kv_bytes_per_token", "KV a token")),
)
# Of files that other commands write. A file that is not here is shown as it is.
OTHERS = {
    "benchmarks": (
        ("task", plain("task")),
        ("variant", Column("skip", name_of, right=False)),
        ("num_fewshot", number("num_fewshot", "shots", "d")),
        ("documents", number("documents", "documents", "d")),
        ("metric", plain("metric")),
        ("value", with_error("value", "value ± s.e.")),
        ("delta", with_error("delta", "difference to dense ± s.e.")),
        ("p_value", number("p_value", "p", ".3f")),
    ),
    "battery": (
        ("check", plain("check")),
        ("variant", Column("skip", name_of, right=False)),
        ("value", with_error("value", "value ± s.e.")),
        ("delta", with_error("delta", "difference to dense ± s.e.")),
        ("p_value", number("p_value", "p", ".3f")),
        ("worse", Column("worse", lambda row: "worse" if row["worse"] else "", right=False)),
    ),
    "times": (
        ("variant", Column("skip", name_of, right=False)),
        ("prompt_tokens", number("prompt_tokens", "prompt tokens", "d")),
        ("batch_size", number("batch_size", "batch", "d")),
        ("prefill_ms", with_spread("prefill_ms", "prefill ms [quartiles]")),
        ("decode_ms_per_token", with_spread("decode_ms_per_token", "decode ms a token [quartiles]")),
        ("speedup_prefill", with_spread("speedup_prefill", "prefill speedup [quartiles]", ".2f")),
        ("speedup_decode", with_spread("speedup_decode", "decode speedup [quartiles]", ".2f")),
    ),
}


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


def paired_table(records: Sequence[Row]) -> Table:
    """Every configuration of a sweep beside the dense model."""
    return _table("results", records, COLUMNS, tuple(range(len(records))))


def other_table(name: str, records: Sequence[Row], plans: Mapping[str, int]) -> Table:
    """What another command wrote; its rows show the plan of their name on the map."""
    columns = OTHERS.get(name) or _columns(records)
    shown: tuple[int | None, ...] = (None,) * len(records)
    if name in OTHERS:
        shown = tuple(plans.get(name_of(record)) for record in records)
    return _table(name, records, columns, shown)


def _table(
    name: str, records: Sequence[Row], columns: Sequence[tuple[str, Column]], plans: tuple[int | None, ...]
) -> Table:
    keys = dict.fromkeys(key for key, _ in columns)
    return Table(
        name,
        tuple(column.heading for _, column in columns),
        tuple(column.right for _, column in columns),
        tuple(tuple(Cell(column.text(keys | row), row.get(key)) for key, column in columns) for row in records),
        plans,
        to_csv([{"skipped": " ".join(sublayers(row)), **row} if "plan" in row else row for row in records]),
    )


def _columns(records: Sequence[Row]) -> list[tuple[str, Column]]:
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
