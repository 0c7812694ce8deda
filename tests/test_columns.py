"""Columns are described once: what the terminal, the page, Markdown, LaTeX and CSV show
of a fact is the same.
"""

from __future__ import annotations

import csv
import io
import math
import re
from html import unescape
from importlib import import_module
from pkgutil import walk_packages
from types import SimpleNamespace

import pytest

import result_folders
from api import (
    BENCH_COLUMNS,
    P_VALUE,
    SEARCH_COLUMNS,
    SWEEP_COLUMNS,
    TIMES,
    Cell,
    Column,
    Fact,
    Number,
    Quartiles,
    Times,
    as_csv,
    as_latex,
    bench_rows,
    comparison_columns,
    experiments,
    in_magnitude,
    number,
    print_table,
    render,
    report,
    results,
    results_of,
    size,
    table,
    with_delta,
    with_error,
    with_quartiles,
    within,
    words,
)

pytestmark = pytest.mark.any_transformers  # it writes tables, and runs no model


def described():
    """Every tuple of columns of the modules that have some, and where it was found."""
    for package in (results, experiments, report):
        for module in walk_packages(package.__path__, f"{package.__name__}."):
            found = import_module(module.name)
            for name, value in vars(found).items():
                if (
                    isinstance(value, tuple)
                    and value
                    and all(isinstance(one, Column) for one in value)
                ):
                    yield f"{module.name.rpartition('.')[2]}.{name}", value


TABLES = {
    "sweep": (result_folders.all_records(), SWEEP_COLUMNS),
    "compare": (
        result_folders.all_compared(),
        comparison_columns(result_folders.all_compared()),
    ),
    "search": ([result_folders.chosen(3)], SEARCH_COLUMNS),
    "bench": (bench_rows(result_folders.all_benched()), BENCH_COLUMNS),
}


class Named(Fact):
    name: str | None = None
    loss: Number = math.nan
    more: str = ""


def error(named):
    return named.loss, named.loss / 2


LOSS = with_error("loss", error, unit="nats")
NAME = words("name", lambda one: one.name)


def one_of(column, value):
    return column(lambda _: value).text(None)


def test_lists_of_columns_have_a_heading_once_each_without_commas():
    lists = dict(described())
    assert {
        "sweep.COLUMNS",
        "search.COLUMNS",
        "draft.COLUMNS",
        "repairs.MEASURED",
        "facts.QUALITY",
    } <= set(lists)
    for columns in lists.values():
        headings = [column.heading for column in columns]
        assert len(set(headings)) == len(headings)
        assert not [
            heading for heading in headings if "," in heading
        ]  # commas part what was left out


@pytest.mark.parametrize("command", TABLES)
def test_the_terminal_markdown_and_latex_show_the_same_cells(command, monkeypatch):
    rows, columns = TABLES[command]
    found = table("title", columns, rows)
    monkeypatch.setattr("sys.stdout", out := io.StringIO())
    print_table(found)
    lines = [line for line in out.getvalue().splitlines() if line[:1] in "┃│"]
    printed = [
        [cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in lines
    ]
    assert printed == [
        [*found.headings],
        *([str(cell) for cell in row] for row in found.rows),
    ]
    head, _, *body = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in found.markdown().splitlines()
    ]
    assert [head, *body] == printed
    latex = as_latex(found, caption="c", label="l")
    assert latex.count(r"\\") == len(rows) + 1
    assert latex.count("&") == (len(rows) + 1) * (len(found.headings) - 1)


@pytest.mark.parametrize("command", ["sweep", "compare", "search", "bench"])
def test_the_page_shows_what_the_terminal_shows(command, tmp_path):
    """But for its own judgement, whether a model is usable."""
    rows, columns = TABLES[command]
    folder = (
        result_folders.WRITERS[command](tmp_path)
        if command != "search"
        else result_folders.write(tmp_path, *rows)
    )
    page = unescape(render(results_of(folder)))
    shown = re.search(r'<table id="table-results".*?</table>', page, re.S)[0]
    headings = re.findall(r"<th .*?<bdi>(.*?)</bdi>", shown)
    told = table("title", columns, rows)
    assert [heading for heading in headings if heading != "usable"] == [*told.headings]
    cells = re.findall(r"<bdi>(.*?)</bdi>", shown)[len(headings) :]
    assert {str(cell) for row in told.rows for cell in row} <= set(cells)


def test_a_csv_has_every_figure_of_the_facts_with_its_digits():
    records = result_folders.all_records()
    lines = list(csv.DictReader(io.StringIO(table("t", SWEEP_COLUMNS, records).csv)))
    assert [float(line["delta_nll"]) for line in lines] == [
        record.quality.delta_nll for record in records
    ]
    assert [float(line["speedup_decode_low"]) for line in lines] == [
        record.times.speedup_decode.low for record in records
    ]
    assert lines[2]["skipped"] == "attn.8"
    cells = [("a", 0.1), ("b", 1 / 3)]  # of rows that are no facts what they sort by
    told = table(
        "t",
        [words("name", lambda row: row[0]), number("loss", lambda row: row[1])],
        cells,
    )
    assert told.csv == f"name,loss\na,0.1\nb,{1 / 3}\n"


def test_quartiles_are_written_from_the_low_to_the_high():
    spread = Quartiles(median=1.25, low=1.0, high=1.5, n=3)
    assert (
        one_of(lambda get: with_quartiles("decode", get, ".2f"), spread)
        == "1.25 [1.00, 1.50]"
    )
    assert one_of(lambda get: with_quartiles("decode", get), None) == "-"


def test_a_figure_stands_beside_its_difference_to_the_dense_model():
    assert (
        one_of(lambda get: with_delta("arc", get), (0.48, -0.02, 0.02))
        == "0.480 (-0.020 ± 0.020)"
    )
    assert (
        one_of(lambda get: with_delta("arc", get), (0.5, math.nan, math.nan)) == "0.500"
    )


def test_what_rounds_to_nothing_has_no_sign():
    assert one_of(lambda get: number("", get, ".4f"), -1e-9) == "0.0000"
    assert one_of(lambda get: number("", get, ".0%"), -0.0) == "0%"
    assert one_of(lambda get: number("", get, ".1f"), -0.051) == "-0.1"
    assert one_of(lambda get: number("", get), -math.inf) == "-"
    assert (
        one_of(lambda get: with_error("", get, "+.2f"), (-1e-9, 0.0)) == "+0.00 ± +0.00"
    )


def test_a_perplexity_can_be_read_however_large():
    told = {
        15.44: "15.4",
        1351.83: "1,351.8",
        99_999.9: "99,999.9",
        100_000.0: "1.0e5",
        2_888_298_470.4: "2.9e9",
        9.97e9: "1.0e10",
        1e300: "1.0e300",
        None: "-",
    }
    assert {
        value: one_of(lambda get: number("perplexity", get, in_magnitude), value)
        for value in told
    } == told
    assert one_of(lambda get: number("perplexity", get, in_magnitude), math.nan) == "-"
    assert in_magnitude(math.inf) == "inf"


def test_bytes_come_in_the_unit_that_suits_them():
    told = {
        0: "0 B",
        1023: "1023 B",
        1024: "1.0 KiB",
        1000 * 2**10: "1000.0 KiB",
        2**20: "1.0 MiB",
        None: "-",
    }
    assert {value: one_of(lambda get: size("b", get), value) for value in told} == told
    assert one_of(lambda get: size("b", get), 5000 * 2**30) == "5000.0 GiB"


def test_small_probabilities_are_not_called_none():
    told = {0.0: "< 0.001", 0.002: "0.002", 0.0125: "0.013", 1.0: "1.000", None: "-"}
    assert {
        value: P_VALUE.text(SimpleNamespace(p_value=value)) for value in told
    } == told
    assert P_VALUE.text(SimpleNamespace(p_value=math.nan)) == "-"


def test_what_was_not_measured_is_a_dash_and_a_column_of_nothing_is_left_out():
    assert LOSS.text(Named(loss=math.nan)) == "-"
    assert one_of(lambda get: with_error("", get), (0.5, math.nan)) == "0.500 ± -"
    assert table("t", [NAME, LOSS], [Named(name="a"), Named(name="b")]).headings == (
        "name",
    )
    assert table("t", [NAME, LOSS], [Named(name="a"), Named(loss=0.0)]).headings == (
        "name",
        "loss",
    )
    assert table("t", [NAME, LOSS], []).headings == ("name", "loss")


def test_a_column_of_a_fact_is_one_of_what_holds_it():
    (lifted,) = within((LOSS,), lambda holder: holder["held"])
    assert lifted.text({"held": Named(loss=0.5)}) == "0.500 ± 0.250"
    assert lifted.text({"held": None}) == "-"
    assert (lifted.heading, lifted.unit, lifted.titled) == (
        "loss",
        "nats",
        "loss, nats",
    )


def test_rows_sort_by_numbers_where_there_are_some_and_else_by_what_is_read():
    named = Named(name="a", loss=0.5)
    assert [
        column.cell(named).value
        for column in (LOSS, NAME, words("other", lambda _: ""))
    ] == [0.5, "a", None]
    assert str(Cell(0.5, "0.500", "± 0.250")) == "0.500 ± 0.250"


def test_markdown_and_csv_hold_whatever_a_name_says():
    found = table("t", [LOSS, NAME], [Named(name="a|b", loss=0.25, more='x,"y"\n')])
    assert found.markdown().splitlines() == [
        *("| loss | name |", "| ---: | --- |"),
        r"| 0.250 ± 0.125 | a\|b |",
    ]
    assert next(csv.DictReader(io.StringIO(found.csv))) == {
        "loss": "0.25",
        "name": "a|b",
        "more": 'x,"y"\n',
    }
    assert as_csv([Named(name="a", loss=1.0)]) == "name,loss,more\na,1.0,\n"
    assert found.legend == "±: one standard error."
    assert table("t", [NAME], []).legend == ""


def test_the_headings_of_times_are_of_their_own_figures():
    """Figures that are all different, each beside its name in the fact."""
    figures = {
        "prefill_ms": 11.0,
        "decode_ms_per_token": 12.0,
        "speedup_prefill": 1.3,
        "speedup_decode": 1.4,
    }
    times = Times(**{name: Quartiles.of([value]) for name, value in figures.items()})
    shown = {column.heading: float(column.text(times).split()[0]) for column in TIMES}
    assert shown == {
        "decode speedup": 1.4,
        "prefill speedup": 1.3,
        "decode ms/token": 12.0,
        "prefill ms": 11.0,
    }
