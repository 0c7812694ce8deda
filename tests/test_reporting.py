"""What a report is made of; `test_report_page.py` looks at it in a browser."""

import csv
import io
import json
import re

import pytest

import result_folders
from notall import UsageError
from notall.reporting import figures, write_report
from notall.reporting.folder import flatten, name_of, read_folder
from notall.reporting.tables import other_table, paired_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return result_folders.write(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def page(folder):
    return write_report(folder, folder / "new" / "report.html").read_text(encoding="utf-8")


def markup(page):
    """The page without what its programs and styles say."""
    return re.sub(r"<(script|style)>.*?</\1>", r"<\1></\1>", page, flags=re.S)


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_the_page_fetches_nothing_and_is_small(page):
    assert re.findall(r"<(?:script|link|iframe|img)[^>]*(?:src|href)\s*=", markup(page)) == []
    assert "default-src 'none'" in page
    assert len(page.encode()) < 3_000_000
    assert page.lower().count("<script") == page.lower().count("</script>") == 3


def test_every_section_of_a_sweep_is_there(page):
    data = data_of(page)
    assert list(data["specs"]) == ["map", "savings", "similarity", "tradeoff"]
    assert len(data["plans"]) == 19
    for heading in (
        "plan by plan",
        "Quality against",
        "How much each layer",
        "Every plan",
        "What they say",
        "Where this",
    ):
        assert heading in page
    assert "a stand-in" in page
    assert "One, two," in page
    assert "scores" not in data["csv"]


def test_sections_without_their_file_are_left_out(tmp_path):
    only = result_folders.write(tmp_path / "only", similarity=result_folders.similarity())
    page = write_report(only, tmp_path / "a.html").read_text()
    assert list(data_of(page)["specs"]) == ["similarity"]
    assert "What they say" not in page
    assert 'id="plan"' not in page
    begun = result_folders.write(tmp_path / "begun", results=result_folders.all_records()[:1])
    assert list(data_of(write_report(begun, tmp_path / "b.html").read_text())["specs"]) == ["savings"]


def test_costs_that_were_measured_shade_the_map(tmp_path, folder):
    measured = [{"kind": kind, "layer": i, "delta_nll": 0.1 * i} for kind in ("attention", "mlp") for i in range(10)]
    rows, source = figures.map_rows(read_folder(folder))
    assert source == "similarity"
    assert rows[3] == {"name": "attn.3", "layer": 3, "row": "attention", "cosine": 0.62, "cost": pytest.approx(0.38)}
    result_folders.write(tmp_path, results=result_folders.all_records(), leave_one_out=measured)
    rows, source = figures.map_rows(read_folder(tmp_path))
    assert source == "measured"
    assert [row["cost"] for row in rows[:3]] == [0, 0.1, 0.2]


def test_savings_are_shares_of_the_dense_model():
    records = result_folders.all_records()
    rows = [row for row in figures.savings_rows(records, records[0]) if row["plan"] == 5]  # 33 % of the attentions
    found = {row["measure"]: row["share"] for row in rows}
    assert found["first token"] == pytest.approx(1 / (1 + 0.33 * 0.5))
    assert found["weights"] == pytest.approx((4_000_000 - 3 * 40_000) / 4_000_000)
    assert found["KV cache a token"] == 0.7
    assert all(row["low"] <= row["share"] <= row["high"] for row in rows)


def test_the_table_says_and_sorts_by_the_records():
    records = result_folders.all_records()
    table = paired_table(records)
    assert [cell.text for cell in table.rows[2]][:4] == ["attention", "10%", "kept", "0.10 ± 0.01"]
    assert [row[3].value for row in table.rows] == [record["delta_nll"] for record in records]
    copied = list(csv.DictReader(io.StringIO(table.csv)))
    assert [float(row["delta_nll"]) for row in copied] == [record["delta_nll"] for record in records]
    assert copied[2]["skipped"] == "attn.8"


def test_files_of_other_commands_become_tables_as_they_are():
    rows = [{"criterion": "cosine", "lost": 0.25, "plan": {"mlp": [1]}}, {"criterion": "kl", "cost": 3}]
    table = other_table("front", rows, {})
    assert table.headings == ("criterion", "lost", "plan", "cost")
    assert [cell.text for cell in table.rows[0]] == ["cosine", "0.25", "{'mlp': [1]}", "-"]
    assert table.csv.splitlines()[:2] == ["skipped,criterion,lost,cost", "mlp.1,cosine,0.25,"]


def test_a_folder_of_the_papers_evaluation_has_its_tables_and_a_map(tmp_path):
    measured = result_folders.all_records()
    keys = ("variant", "fraction", "keep_last", "plan")
    timed = ("prefill_ms", "decode_ms_per_token", "speedup_prefill", "speedup_decode")
    scores = {
        "num_fewshot": 0,
        "documents": 9,
        "metric": "acc",
        "value": 0.5,
        "value_se": 0.1,
        "delta": -0.2,
        "delta_se": 0.05,
        "p_value": 0.04,
    }
    result_folders.write(
        tmp_path,
        similarity=result_folders.similarity(),
        benchmarks=[
            {key: row[key] for key in keys}
            | {"task": "arc", "delta_se": 0.05, "p_value": 0.04, "values": [1.0]}
            | scores
            for row in measured
        ],
        times=[
            {key: value for key, value in row.items() if key in keys or key.startswith(timed)}
            | {"prompt_tokens": 128, "batch_size": 1}
            for row in measured
        ],
        answers=[{"raw": True}],
    )
    page = write_report(tmp_path, tmp_path / "report.html").read_text()
    assert list(data_of(page)["specs"]) == ["map", "similarity"]
    assert len(data_of(page)["plans"]) == 19
    assert "-0.200 ± 0.050" in page
    assert 'id="table-times"' in page
    assert 'id="table-answers"' not in page
    assert data_of(page)["csv"]["benchmarks"].splitlines()[0].startswith("skipped,variant,")


def test_hostile_text_is_text(tmp_path):
    page = markup(write_report(result_folders.write_nasty(tmp_path), tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "<script>window" not in page
    assert "<img" not in page
    assert page.lower().count("<script") == page.lower().count("</script>") == 3
    assert "&lt;script&gt;window.pwned" in page
    assert "{{ 7 * 7 }}" in page


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds no results; make some with notall sweep"),
        ({"results": [{"variant": "dense"}]}, "line 1 of"),
    ],
)
def test_a_folder_without_results_is_one_clear_line(files, says, tmp_path):
    for name, rows in files.items():
        result_folders.write(tmp_path, **{name: rows})
    with pytest.raises(UsageError, match=says):
        write_report(tmp_path, tmp_path / "report.html")
    with pytest.raises(UsageError, match="there is no folder"):
        write_report(tmp_path / "absent", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_one_clear_line(folder):
    with pytest.raises(UsageError, match=r"cannot write .*choose another -o"):
        write_report(folder, folder / "results.jsonl" / "report.html")


def test_names_and_nested_provenance_are_words():
    assert name_of(result_folders.record("mlp", 0.25, True, 1.0)) == "MLP 25%, last layer kept"
    assert dict(flatten({"a": {"b": 1, "c": {"d": "x"}}})) == {"a.b": "1", "a.c.d": "x"}
