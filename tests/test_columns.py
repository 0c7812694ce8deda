"""Columns are described once: what the terminal, the page, Markdown and CSV show of a record is the same."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path

import pytest

import result_folders
from api import (
    KINDS,
    USABLE,
    Column,
    Fields,
    SweepRecord,
    as_csv,
    as_markdown,
    best_first,
    columns_of,
    comparison_table,
    given,
    legend,
    magnitude,
    number,
    show,
    stepped_table,
    with_error,
    with_spread,
    with_tasks,
)
from api import cli_columns as lists
from api import columns_plain as plain

pytestmark = pytest.mark.any_transformers  # it writes tables, and runs no model

SHOWN = {name: kind for name, kind in KINDS.items() if kind.columns}
STEPPED = {
    "sweep": (result_folders.all_records(), "sweep"),
    "compare": (result_folders.all_compared(), "comparison"),
    "search": ([result_folders.chosen(3)], "search"),
    "bench": (result_folders.all_benched(), "bench"),
}


def fields_of(kind):
    """The names of what a row of a kind may hold: its groups are unpacked."""
    for name, field in kind.model_fields.items():
        words = re.findall(r"\w+", str(field.annotation))
        groups = [group for group in Fields.__subclasses__() if name in kind.groups and group.__name__ in words]
        yield from (field for group in groups for field in group.model_fields) if groups else [name]


def described():
    """Every column that there is, and where it was found."""
    for name, kind in SHOWN.items():
        yield from ((name, column) for column in kind.columns)
    for name, columns in vars(lists).items():
        if name.endswith("_COLUMNS"):
            yield from ((name, column) for column in columns)


def on_a_terminal(rows, columns, monkeypatch):
    monkeypatch.setattr("sys.stdout", out := io.StringIO())
    show(rows, columns, title="title")
    head = next(line for line in out.getvalue().splitlines() if line.startswith("┃"))
    return [cell.strip() for cell in head.strip("┃").split("┃")]


def in_markdown(text):
    head = next(line for line in text.splitlines() if line.startswith("| "))
    return [cell.strip() for cell in head.strip("|").split("|")]


def test_kinds_that_are_shown_have_columns():
    measured = {"sweep", "similarity", "comparison", "bench", "benchmark", "battery", "times", "claim"}
    assert measured | {"search", "refit", "healing", "measured", "draft", "front"} == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_columns_are_of_fields_that_a_record_has(name):
    columns = SHOWN[name].columns
    assert {field for column in columns for field in column.fields} <= set(fields_of(SHOWN[name]))
    assert len({column.heading for column in columns}) == len(columns)
    assert not [column.heading for column in columns if "," in column.heading]  # commas part what was left out


def test_a_field_has_one_heading_and_is_written_one_way_wherever_it_stands():
    sample = result_folders.chosen(3) | result_folders.record("mlp", 0.25, True, 1.25)
    sample |= {"value": 0.5, "value_se": 0.1, "delta": -0.2, "delta_se": 0.05, "p_value": 0.0, "worse": True}
    told = {}
    for where, column in described():
        text = column.text(sample) if column.fields[0] in sample else ""
        told.setdefault(column.fields, {}).setdefault((column.heading, text, column.right, column.unit), []).append(
            where
        )
    assert {fields: ways for fields, ways in told.items() if len(ways) > 1} == {}
    first = {column.fields[0] for _, column in described()}
    assert len(first) == len({column.fields for _, column in described()})


@pytest.mark.parametrize("command", STEPPED)
def test_the_terminal_the_page_and_csv_show_the_same_columns(command, monkeypatch):
    rows, name = STEPPED[command]
    columns = columns_of(rows) if command == "compare" else SHOWN[name].columns
    table = stepped_table(command, rows)
    flat = [with_tasks(row) for row in rows]
    headings = [heading for heading in table.headings if heading != "usable"]  # the page's own judgement
    assert on_a_terminal(flat, columns, monkeypatch) == headings
    assert [column.heading for column in given(columns, flat)] == headings
    if command != "compare":  # whose columns of tasks are made anew
        assert set(table.columns) - {USABLE} <= set(columns)
    names = [name for name in next(csv.reader(io.StringIO(table.csv))) if name != "usable"]
    fields = [field for column in table.columns for field in column.fields if field in flat[0] and field != "plan"]
    assert names[1 : 1 + len(fields)] == fields
    order = best_first(rows) if command == "compare" else range(len(rows))
    for row, cells in zip([flat[place] for place in order], table.rows):
        told = [(cell.text, column.text(row)) for cell, column in zip(cells, table.columns) if column is not USABLE]
        assert all(shown == expected for shown, expected in told)


def test_markdown_has_the_headings_of_the_page_and_the_terminal():
    rows = result_folders.all_compared()
    page = [
        heading for heading in stepped_table("compare", rows).headings if heading not in ("among", "count", "usable")
    ]
    assert in_markdown(comparison_table(rows)) == [*page, "skips"]
    assert {"NLL added", "arc_easy acc", "decode speedup", "CPU s"} <= set(page)
    assert "| 0.480 (-0.020 ± 0.020) |" in comparison_table(rows)


def test_the_page_of_the_paper_shows_the_headings_of_a_sweep():
    page = (Path(__file__).parent.parent / "docs" / "paper.md").read_text(encoding="utf-8")
    table = page[page.index("| skipped |") :].partition("\n\n")[0]
    headings = in_markdown(table)
    assert headings == [column.heading for column in SweepRecord.columns if column.heading in headings]
    assert {"skipped", "NLL added", "decode speedup", "perplexity"} <= set(headings)
    columns = [column for column in SweepRecord.columns if column.heading in headings]
    assert page.partition(table)[2].strip().startswith(legend(columns))


def test_quartiles_are_written_from_the_low_to_the_high():
    record = {"speedup_decode": 1.25, "speedup_decode_low": 1.0, "speedup_decode_high": 1.5}
    assert with_spread("speedup_decode", "decode", ".2f").text(record) == "1.25 [1.00, 1.50]"


def test_what_rounds_to_nothing_has_no_sign():
    row = {"cost": -1e-9, "cost_se": 0.0, "low": -0.0, "endless": -math.inf, "small": -0.051}
    assert number("cost", "objective", ".4f").value(row) == "0.0000"
    assert with_error("cost", "NLL added", "+.2f").text(row) == "+0.00 ± +0.00"
    assert number("low", "change", ".0%").value(row) == "0%"
    assert number("endless", "change").value(row) == "-inf"
    assert number("small", "change", ".1f").value(row) == "-0.1"


def test_a_perplexity_can_be_read_however_large():
    column = magnitude("perplexity", "perplexity")
    told = {
        15.44: "15.4",
        1351.83: "1,351.8",
        99_999.9: "99,999.9",
        100_000.0: "1.0e5",
        2_888_298_470.4: "2.9e9",
        9.97e9: "1.0e10",
        1e300: "1.0e300",
        math.inf: "inf",
        math.nan: "-",
        None: "-",
    }
    assert {value: column.text({"perplexity": value}) for value in told} == told


def test_what_was_not_measured_is_a_dash_and_a_column_of_nothing_is_left_out():
    column = with_error("loss", "loss")
    assert [column.text(row) for row in ({}, {"loss": None, "loss_se": None}, {"loss": 0.5, "loss_se": None})] == [
        *("-", "-"),
        "0.500 ± -",
    ]
    names = [plain("name"), column]
    assert given(names, [{"name": "a", "loss": None}, {"name": "b"}]) == names[:1]
    assert given(names, [{"name": "a", "loss": None}, {"loss": 0.0}]) == names
    assert given(names, []) == names


def test_rows_sort_by_numbers_where_there_are_some_and_else_by_what_is_read():
    plan = Column(("plan",), "skipped", lambda plan: f"{len(plan)} layers", right=False)
    row = {"plan": {"mlp": [1]}, "loss": 0.5, "name": "a"}
    assert [column.sorted_by(row) for column in (plan, with_error("loss", "loss"), plain("name"), plain("other"))] == [
        *("1 layers", 0.5, "a", None),
    ]


def test_markdown_and_csv_hold_whatever_a_name_says():
    rows = [{"name": "a|b", "loss": 0.25, "loss_se": 0.125, "more": 'x,"y"\n', "many": [1]}]
    columns = [with_error("loss", "loss", unit="nats"), plain("name")]
    assert as_markdown(rows, columns).splitlines() == [
        *("| loss | name |", "| ---: | --- |"),
        r"| 0.250 ± 0.125 | a\|b |",
    ]
    text = as_csv(rows, columns)
    assert text.splitlines()[0] == "loss,loss_se,name,more"
    assert next(csv.DictReader(io.StringIO(text))) == {
        **{"loss": "0.25", "loss_se": "0.125"},
        **{"name": "a|b", "more": 'x,"y"\n'},
    }
    assert legend(columns) == "±: one standard error."
    assert legend(columns[1:]) == ""
