"""What a report is made of; `test_report_page.py` looks at it in a browser."""

import csv
import io
import math
import re
from pathlib import Path

import pytest
import vl_convert

import result_folders
from api import (
    axes,
    by_plan_table,
    figures,
    findings_of,
    first_plan,
    flatten,
    foreign_table,
    name_of,
    other_table,
    plots,
    probability,
    read_folder,
    read_json,
    render,
    size,
    stepped_table,
    told,
    write_report,
)
from notall import UsageError
from small_disk import room_for

pytestmark = pytest.mark.any_transformers  # it reads records, and runs no model

STAY = "50% of first choices stay"


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
    return read_json(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


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
    rows, source = figures.map_rows(read_folder(folder))
    assert source == "similarity"
    assert rows[3] == {"name": "attn.3", "layer": 3, "row": "attention", "cosine": 0.62, "cost": pytest.approx(0.38)}
    result_folders.write(tmp_path, results=result_folders.all_records(), leave_one_out=result_folders.alone())
    rows, source = figures.map_rows(read_folder(tmp_path))
    assert source == "measured"
    assert [row["cost"] for row in rows[:3]] == [0, 0.1, 0.2]
    page = " ".join(write_report(tmp_path, tmp_path / "r.html").read_text().split())
    assert "left out, on a logarithmic scale: NLL added, nats per token, measured on 2 windows of text." in page
    assert "a stand-in" not in page


def test_one_very_dear_sublayer_leaves_the_others_shades(tmp_path):
    """What stands between the others on the ramp is far more than a hundredth of it."""
    costs = [0.01, 0.1, 0.3, 9.0]
    alone = [row | {"delta_nll": cost} for row, cost in zip(result_folders.alone(), costs)]
    result_folders.write(tmp_path, results=result_folders.all_records(), leave_one_out=alone)
    layers = figures.draw_map(read_folder(tmp_path)).to_dict()["layer"]
    (shade,) = [layer["encoding"]["color"] for layer in layers if "scale" in layer["encoding"].get("color", {})]
    scale = shade["scale"]
    assert (scale["type"], scale["domain"]) == ("symlog", [0, 9.0])
    places = [axes.symlog(cost, scale["constant"]) / axes.symlog(9.0, scale["constant"]) for cost in costs]
    assert all(after - before > 0.1 for before, after in zip(places, places[1:]))
    assert shade["legend"]["values"][0] == 0
    gain = [row | {"delta_nll": -row["delta_nll"]} for row in alone]
    read = read_folder(
        result_folders.write(tmp_path / "gain", similarity=result_folders.similarity(), leave_one_out=gain)
    )
    assert "symlog" in str(figures.draw_map(read).to_dict())


def test_one_noisy_quartile_leaves_the_bars_of_what_is_saved_long():
    records = [row | {"speedup_decode_low": row["speedup_decode"] / 9} for row in result_folders.all_records()]
    layers = figures.draw_savings(figures.savings_rows(records)).to_dict()["layer"]
    (bars,) = [layer for layer in layers if layer["mark"]["type"] == "bar"]
    assert bars["encoding"]["x"]["scale"]["domain"] == [0, 1.25]
    rows = bars["data"]["values"]
    assert max(row["high"] for row in rows) > 5
    assert max(row["to"] for row in rows) == 1.25


def test_savings_are_shares_of_the_dense_model():
    records = result_folders.all_records()
    rows = [row for row in figures.savings_rows(records) if row["plan"] == 5]  # 33 % of the attentions
    found = {row["measure"]: row["share"] for row in rows}
    assert found["first token"] == pytest.approx(1 / (1 + 0.33 * 0.5))
    assert found["weights"] == pytest.approx((4_000_000 - 3 * 40_000) / 4_000_000)
    assert found["KV cache a token"] == 0.7
    assert all(row["low"] <= row["share"] <= row["high"] for row in rows)


def test_the_table_says_and_sorts_by_the_records():
    records = result_folders.all_records()
    table = stepped_table("sweep", records)
    assert [cell.text for cell in table.rows[2]][:4] == ["attention", "10%", "kept", "0.100 ± 0.010"]
    assert [row[3].value for row in table.rows] == [record["delta_nll"] for record in records]
    copied = list(csv.DictReader(io.StringIO(table.csv)))
    assert [float(row["delta_nll"]) for row in copied] == [record["delta_nll"] for record in records]
    assert copied[2]["skipped"] == "attn.8"


def test_a_sweep_begins_with_the_fastest_plan_that_is_usable(folder):
    read = read_folder(folder)
    first, losses = read.records[first_plan(read)], [row["delta_nll"] for row in read.records[1:]]
    speedups = [row["speedup_decode"] for row in read.records[1:]]
    usable = [row for row in read.records[1:] if row["delta_nll"] < math.log(2)]
    at_least = max(usable, key=lambda row: row["speedup_decode"])["speedup_decode_low"]
    may_be_as_fast = [row["delta_nll"] for row in usable if row["speedup_decode"] >= at_least]
    assert len(may_be_as_fast) > 1
    assert first["delta_nll"] == min(may_be_as_fast)
    assert first["speedup_decode"] < max(speedups)  # which more than doubles perplexity
    cards = {card.title: card.figure for card in findings_of(read)}
    assert cards["Loses least"] == f"{min(losses):+.2f}" != f"{max(losses):+.2f}"
    assert cards["Fastest usable"] == f"{first['speedup_decode']:.2f}×" != f"{max(speedups):.2f}×"


def test_where_no_plan_is_usable_the_cards_name_none_and_the_plan_that_loses_least_comes_first(tmp_path):
    useless = [row | {"top1_agreement": 0.49} for row in result_folders.all_records()[1:]]
    read = read_folder(result_folders.write(tmp_path, results=[*result_folders.all_records()[:1], *useless]))
    assert read.records[first_plan(read)]["delta_nll"] == min(row["delta_nll"] for row in useless)
    assert {card.title: card.figure for card in findings_of(read)}["Fastest usable"] == "none"


def test_files_of_other_commands_become_tables_as_they_are():
    rows = [{"criterion": "cosine", "lost": 0.25, "plan": {"mlp": [1]}}, {"criterion": "kl", "cost": 3}]
    table = foreign_table("front", rows)
    assert table.headings == ("criterion", "lost", "plan", "cost")
    assert [cell.text for cell in table.rows[0]] == ["cosine", "0.25", "{'mlp': [1]}", "-"]
    assert table.csv.splitlines()[:2] == ["criterion,lost,cost", "cosine,0.25,"]


@pytest.mark.parametrize(
    "odd",
    [
        {"provenance": "here", "value": 1},
        {"provenance": [{"model": "a"}]},
        {"plan": "attn.1", "tasks": [1]},
        {"plan": {"attention": 3}, "tasks": {"arc": "0.5"}},
        {"variant": "x", "fraction": "y", "keep_last": None, "plan": None},
        {"value": 10**400, "other": -(10**400)},
    ],
)
def test_what_no_command_wrote_is_shown_whatever_it_is(tmp_path, odd):
    result_folders.write(tmp_path, bench=result_folders.all_benched()[:2], mine=[odd, {"value": 2.5}])
    page = write_report(tmp_path, tmp_path / "r.html").read_text()
    assert "2.5" in data_of(page)["csv"]["mine"]


def test_a_browser_reads_figures_of_what_is_very_large(tmp_path):
    large = {"delta_nll": 1e308, "delta_nll_se": 1e308}
    result_folders.write(tmp_path, results=[row | large for row in result_folders.all_records()])
    assert data_of(write_report(tmp_path, tmp_path / "r.html").read_text())["specs"]


def test_bytes_come_in_the_unit_that_suits_them():
    column = size("b", "b")
    told = {0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1000 * 2**10: "1000.0 KiB", 2**20: "1.0 MiB", None: "-"}
    assert {value: column.text({"b": value}) for value in told} == told
    assert column.text({"b": 5000 * 2**30}) == "5000.0 GiB"


def test_small_probabilities_are_not_called_none():
    column = probability("p", "p")
    assert [column.text({"p": p}) for p in (0.0, 0.002, 0.0125, 1.0, math.nan, None)] == [
        "< 0.001",
        "0.002",
        "0.013",
        "1.000",
        "-",
        "-",
    ]
    rows = [{"check": "passkey", "variant": "dense", "fraction": 0.0, "keep_last": False, "p_value": 0.0}]
    table = other_table("battery", rows, {})
    assert table.rows[0][table.headings.index("p")].text == "< 0.001"


def test_a_folder_of_the_papers_evaluation_opens_on_its_claims(tmp_path):
    verdicts = {"A is better": "holds", "B is": "too few", "C is": "holds"}
    claims = [
        {"record": "claim", "claim": name, "here": "+1.0 ± 0.1", "verdict": said} for name, said in verdicts.items()
    ]
    folder = read_folder(result_folders.write(tmp_path, claims=claims, similarity=result_folders.similarity()))
    assert [(card.title, card.figure, card.text) for card in findings_of(folder)] == [
        ("Claims that hold", "2 of 3", "1 is open, on too few documents or rounds"),
    ]
    assert "The paper's claims, and this model" in render(folder)


def test_the_evaluation_that_the_repository_holds_makes_a_page():
    folder = read_folder(Path(__file__).parent.parent / "benchmarks" / "paper")
    assert {"benchmarks", "battery", "times"} <= set(folder.others)
    assert findings_of(folder)[0].title == "Claims that hold"
    assert "normalized accuracy" in render(folder)


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
        "higher_is_better": True,
    }
    sizes = ("params", "weight_bytes", "kv_bytes_per_token", "peak_bytes")
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
            {key: value for key, value in row.items() if key in (*keys, *sizes) or key.startswith(timed)}
            | {"prompt_tokens": 128, "batch_size": 1, "asked_batch_size": 1}
            for row in measured
        ],
        answers=[{"raw": True}],
    )
    page = write_report(tmp_path, tmp_path / "report.html").read_text()
    assert list(data_of(page)["specs"]) == ["map", "similarity"]
    assert len(data_of(page)["plans"]) == 19
    assert "-0.200 ± 0.050" in page
    assert page.index("<h2>Benchmarks</h2>") < page.index("<h2>Times</h2>")
    assert 'id="table-answers"' not in page
    assert data_of(page)["csv"]["benchmarks"].splitlines()[0].startswith("skipped,task,metric,variant,")
    beside = list(csv.DictReader(io.StringIO(data_of(page)["csv"]["benchmarks-by-plan"])))
    assert len(beside) == 19
    assert {row["arc, accuracy value"] for row in beside} == {"0.5"}
    assert [row["arc, accuracy delta"] for row in beside if row["variant"] == "dense"] == [""]


def test_checks_stand_beside_each_other_by_plan():
    asked = {"part": "text", "value_se": 0.1, "p_value": 0.5, "better": "lower", "worse": False, "plan": {}}
    rows = [
        {"variant": variant, "fraction": 0.1, "keep_last": False, "check": check, "value": value, "delta": 0.5} | asked
        for variant in ("dense", "attention")
        for check, value in (("NLL at 0 to 63", 3.5), ("repetition", None))
    ]
    table = by_plan_table("battery", [row | {"delta_se": 0.25} for row in rows], {"attention 10%": 7})
    assert table.headings == ("skipped", "fraction", "last layer", "NLL at 0 to 63", "repetition")
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["dense", "10%", "", "3.500", "-"],
        ["attention", "10%", "", "3.500 (+0.500 ± 0.250)", "-"],
    ]
    assert table.plans == (None, 7)


def test_a_comparison_is_a_map_of_its_choices_fronts_and_a_table(tmp_path):
    folder = result_folders.write_comparison(tmp_path)
    page = write_report(folder, tmp_path / "r.html").read_text()
    data = data_of(page)
    assert list(data["specs"]) == ["front0", "front1", "map", "savings", "tradeoff"]
    assert len(page.encode()) < 3_000_000
    assert [plan["name"] for plan in data["plans"]][:2] == ["search by kl: 2 attention", "search by kl: 4 attention"]
    assert data["plans"][0]["skipped"] == ["attn.8", "attn.9"]
    assert "skipped in this order: attn.9, attn.8." in data["plans"][0]["told"]
    assert (
        "left out, on a logarithmic scale: KL added, nats per token, measured on the text that was chosen by."
        in " ".join(page.split())
    )
    assert not {"choices", "held_out", "times"} & data["csv"].keys()
    assert "table-times" not in page
    assert read_folder(folder).layers == result_folders.LAYERS + 2  # as the fingerprint says
    front = list(csv.DictReader(io.StringIO(data["csv"]["front1"])))
    assert {row["space"] for row in front} == {"portable"}
    assert len(front) == 6


def test_the_table_of_a_comparison_has_its_tasks():
    records = result_folders.all_compared()
    records[1]["tasks"] = {}
    table = stepped_table("compare", records)
    assert table.headings[:5] == ("criterion", "by", "among", "count", "NLL added")
    column = table.headings.index("arc_easy acc")
    told = {table.plans[place]: row[column].text for place, row in enumerate(table.rows)}
    assert [told[plan] for plan in range(3)] == ["0.480 (-0.020 ± 0.020)", "-", "0.480 (-0.020 ± 0.020)"]
    assert table.rows[0][column].value == 0.48
    copied = next(csv.DictReader(io.StringIO(table.csv)))
    assert (copied["arc_easy acc value"], copied["arc_easy acc delta_se"]) == ("0.48", "0.02")
    untimed = [{name: value for name, value in row.items() if "speedup" not in name} for row in records]
    assert not [heading for heading in stepped_table("compare", untimed).headings if "speedup" in heading]


def test_of_a_comparison_that_was_not_timed_no_speed_is_drawn(tmp_path):
    timed = ("prefill", "decode", "speed")
    records = [
        {name: value for name, value in row.items() if not name.startswith(timed)}
        for row in result_folders.all_compared()
    ]
    folder = result_folders.write_comparison(tmp_path, records)
    assert list(data_of(write_report(folder, tmp_path / "r.html").read_text())["specs"]) == ["front0", "front1", "map"]


def test_the_last_answer_to_a_question_counts(tmp_path):
    again = result_folders.compared("search", "attention", 2, 0.123)
    folder = result_folders.write_comparison(tmp_path, [*result_folders.all_compared(), again])
    records = read_folder(folder).records
    assert len(records) == 12
    assert records[0]["delta_nll"] == 0.123


def test_the_cards_of_a_comparison_say_what_loses_least_at_the_largest_counts(tmp_path):
    lacking = result_folders.compared("greedy", "attention", 4, None)
    found = findings_of(
        read_folder(result_folders.write_comparison(tmp_path, [*result_folders.all_compared(), lacking]))
    )
    assert [card.title for card in found] == [
        "Fastest usable",
        "Loses least: 4 attention",
        "Loses least: 6 portable",
    ]
    assert found[1].figure == "+0.40"
    assert found[1].text.startswith(
        "search by kl, 10.0 forward passes to find; next, +1.20 nats a token (± 0.12): cosine"
    )


def test_what_sublayers_cost_alone_is_taken_from_whatever_tells_of_most(tmp_path):
    result_folders.write_comparison(tmp_path)
    costs = read_folder(tmp_path).costs
    assert costs.found == {("attention", i): pytest.approx(0.1 * i) for i in range(result_folders.LAYERS)}
    partly = result_folders.evaluations("task:arc", result_folders.LAYERS + 1, 3)
    result_folders.write(
        tmp_path, evaluations=[*partly, result_folders.SPENT | {"skipped": ["attn.0"], "batches": "all", "cost": 7.0}]
    )
    costs = read_folder(tmp_path).costs
    assert len(costs.found) == result_folders.LAYERS + 1
    assert (costs.title, costs.measured_on) == ("rise of task:arc", "the text that was chosen by, on 3 of its batches")
    undone = [line for line in result_folders.evaluations("kl", 30) if line.get("skipped") != []]
    result_folders.write(tmp_path, **{"evaluations/no-dense": undone})
    assert read_folder(tmp_path).costs == costs


def test_a_search_shows_what_it_chose_last(tmp_path):
    rows = [result_folders.chosen(2), result_folders.chosen(3, in_time=False)]
    folder = result_folders.write(tmp_path, chosen=rows, evaluations=result_folders.evaluations())
    page = write_report(folder, tmp_path / "r.html").read_text()
    data = data_of(page)
    assert list(data["specs"]) == ["map"]
    assert "evaluations" not in data["csv"]
    assert [plan["name"] for plan in data["plans"]] == ["search by kl: 2 attention", "search by kl: 3 attention"]
    assert first_plan(read_folder(folder)) == 1
    assert "skipped in this order: attn.9, attn.8, attn.7." in data["plans"][1]["told"]
    cards = {card.title: card for card in findings_of(read_folder(folder))}
    assert (cards["Skips"].figure, cards["As fast"].figure, cards["Objective"].figure) == ("3", "1.25×", "+0.250")
    assert "time was up" in cards["Took"].text
    table = stepped_table("search", rows)
    told = [dict(zip(table.headings, (cell.text for cell in row))) for row in table.rows]
    assert [told[0][name] for name in ("chosen", "objective on its text", "dense model's objective")] == [
        "search by kl: 2 attention",
        "0.2500",
        "0.0000",
    ]
    assert [row["search finished"] for row in told] == ["yes", "no"]


def test_a_search_that_measured_nothing_but_its_objective(tmp_path):
    names = (*result_folders.QUALITY, "predicted_ms", "measured_ms", "predicted_speedup", "off")
    names += ("speedup", "speedup_low", "speedup_high")
    row = {name: value for name, value in result_folders.chosen(2).items() if name not in names}
    assert stepped_table("search", [row]).headings == (
        *("chosen", "objective on its text", "dense model's objective", "search finished"),
        *("evaluations", "forward passes", "CPU s"),
    )
    folder = read_folder(result_folders.write(tmp_path, chosen=[row]))
    assert [card.title for card in findings_of(folder)] == ["Skips", "Objective", "Took"]
    assert told(row) == "2 sublayers skipped; skipped in this order: attn.9, attn.8."


def test_a_repair_shows_what_it_gives_back_and_what_became_of_each_sublayer(tmp_path):
    folder = result_folders.write(tmp_path, measured=result_folders.all_measured(), refits=result_folders.refits())
    page = write_report(folder, tmp_path / "r.html").read_text()
    data = data_of(page)
    assert list(data["specs"]) == ["map", "refits"]
    drawn = [(row["kind"], row["layer"], row["left"]) for row in data["specs"]["refits"]["data"]["values"]]
    assert drawn[:2] == [("attention", 5, 0.9), ("MLP", 5, 0.7)]
    assert len(drawn) == 5
    assert [plan["skipped"] for plan in data["plans"]] == [["attn.7", "attn.8", "attn.9"]]
    assert data["plans"][0]["told"] == "3 sublayers skipped."
    assert page.index("<h2>Before and after</h2>") < page.index("<h2>What became of each kept sublayer</h2>")
    rows = list(csv.DictReader(io.StringIO(data["csv"]["measured"])))
    assert [(row["text"], row["model"], float(row["delta_nll"])) for row in rows[2:]] == [
        ("book.txt", "skipped", 0.8),
        ("book.txt", "repaired", 0.2),
    ]
    read = read_folder(folder)
    assert read.layers == result_folders.LAYERS + 2  # as the fingerprint says
    assert [(card.title, card.figure, card.text) for card in findings_of(read)] == [
        (
            *("prose, other windows", "+0.10"),
            f"repaired (KL 0.10, {STAY}); +0.40 nats a token (± 0.04) skipped (KL 0.40, {STAY})",
        ),
        ("book.txt", "+0.20", f"repaired (KL 0.20, {STAY}); +0.80 nats a token (± 0.08) skipped (KL 0.80, {STAY})"),
    ]


def test_a_repair_that_was_killed_shows_what_is_refit(tmp_path):
    folder = result_folders.write(tmp_path, refits=result_folders.refits())
    page = write_report(folder, tmp_path / "r.html").read_text()
    assert list(data_of(page)["specs"]) == ["refits"]
    assert "What <bdi>tiny</bdi> can do without" in page  # as the first line says
    assert findings_of(read_folder(folder)) == []


def test_a_refit_of_no_sublayer_is_one_line(tmp_path):
    header, line, *_ = result_folders.refits()
    folder = result_folders.write(tmp_path, refits=[header, line | {"sublayers": []}])
    with pytest.raises(UsageError, match=r"line 2 of .*refits.jsonl: sublayers: .* at least 1 item"):
        write_report(folder, tmp_path / "r.html")


def test_a_parallel_block_is_drawn_as_one():
    both = [row | {"sublayers": ["attn.3", "mlp.3"]} for row in result_folders.refits()[1:2]]
    lacking = [both[0] | {"left": None}]
    (row,) = plots.refit_layers([*both, *lacking]).to_dict()["data"]["values"]
    assert row == {"layer": 3, "kind": "block", "left": 0.9}


def test_a_healing_is_what_it_gives_back_over_its_tokens(tmp_path):
    measured = result_folders.all_measured("repaired", "healed")
    again = result_folders.measured("book.txt", "healed", 0.1)  # of what was healed anew: the last one counts
    folder = result_folders.write(tmp_path, measured=[*measured, again], healing=result_folders.looks())
    data = data_of(write_report(folder, tmp_path / "r.html").read_text())
    assert list(data["specs"]) == ["healing", "map"]
    assert data["specs"]["healing"]["data"]["values"] == [
        {"tokens": 0, "kl": 0.4},
        {"tokens": 512, "kl": 0.3},
        {"tokens": 1024, "kl": 0.25},
    ]
    assert [card.text for card in findings_of(read_folder(folder))] == [
        f"healed (KL 0.10, {STAY}); +0.40 nats a token (± 0.04) repaired (KL 0.40, {STAY})",
        f"healed (KL 0.10, {STAY}); +0.80 nats a token (± 0.08) repaired (KL 0.80, {STAY})",
    ]
    assert findings_of(read_folder(folder))[1].figure == "+0.10"


def test_a_search_shows_what_the_repair_of_its_choice_gives_back(tmp_path):
    measured = [*result_folders.all_measured(), result_folders.measured("other", "skipped", None)]
    folder = result_folders.write(tmp_path, chosen=[result_folders.chosen(3)], measured=measured)
    page = write_report(folder, tmp_path / "r.html").read_text()
    assert 'id="table-measured"' in page
    assert [plan["name"] for plan in data_of(page)["plans"]] == ["search by kl: 3 attention"]
    assert "0.800 ± 0.080" in page


def test_a_bench_is_held_against_the_dense_model_that_it_was_timed_with(tmp_path):
    rows = result_folders.all_benched()
    folder = result_folders.write(tmp_path, bench=rows)
    page = write_report(folder, tmp_path / "r.html").read_text()
    assert list(data_of(page)["specs"]) == ["map", "savings"]
    assert len(data_of(page)["plans"]) == 4
    weights = {row["plan"]: row["share"] for row in figures.savings_rows(rows) if row["measure"] == "weights"}
    assert weights == {0: 1, 1: 3_880_000 / 4_000_000, 2: 1, 3: 3_880_000 / 8_000_000}
    without = rows[3] | {"state_bytes": None}  # a line may lack what the other one has
    assert (
        len(figures.savings_rows([rows[2] | {"state_bytes": 100}, without])) == len(figures.savings_rows(rows[2:])) + 1
    )
    table = stepped_table("bench", rows)
    assert [row[0].text for row in table.rows] == ["dense", "3 attention", "dense", "3 attention, 3 MLP"]
    assert name_of(rows[3]) == "3 attention, 3 MLP, 128 + 32 tokens, batch 4"


def test_a_bench_that_was_torn_in_the_middle_of_its_pair_is_dropped(tmp_path):
    rows = [result_folders.benched("dense", "dense"), *result_folders.all_benched()[:2]]  # the first one stood alone
    torn = result_folders.benched("dense", "dense", beside=rows[2]["plan"])
    folder = result_folders.write(tmp_path, bench=[*rows, torn])
    with pytest.warns(UserWarning, match="times of a dense model without those of its plan"):
        assert [row["model"] for row in read_folder(folder).records] == ["dense", "dense", "skipped"]
    result_folders.write(tmp_path, bench=[torn, rows[2]])
    with pytest.warns(UserWarning, match="times of a dense model"):
        assert len(read_folder(folder).records) == 5


def test_a_bench_kept_in_the_folder_of_a_sweep_is_a_table(tmp_path):
    rows = result_folders.all_benched()
    page = write_report(
        result_folders.write(tmp_path, results=result_folders.all_records(), bench=rows), tmp_path / "r.html"
    ).read_text()
    assert len(data_of(page)["plans"]) == 19
    assert 'id="table-bench"' in page


@pytest.mark.parametrize("write", [result_folders.write_nasty, result_folders.write_nasty_comparison])
def test_hostile_text_is_text(tmp_path, write):
    whole = write_report(write(tmp_path), tmp_path / "r.html").read_text(encoding="utf-8")
    assert len(whole.encode()) < 3_000_000
    page = markup(whole)
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
        (
            {"results": [result_folders.compared("x", "mlp", 1, 0.1, evaluations="1")]},
            "line 1 of .*results.jsonl: evalu",
        ),
        ({"chosen": [result_folders.chosen(1), {"chosen": "x"}]}, "line 2 of .*chosen.jsonl: plan: Field required"),
        ({"bench": [result_folders.benched("dense", "other")]}, "line 1 of .*bench.jsonl: model"),
        ({"results": result_folders.all_records(), "bench": [{"model": "dense"}]}, "line 1 of .*bench.jsonl: plan"),
        ({"leave_one_out": [{"kind": "attention", "layer": "1"}]}, "line 1 of .*leave_one_out.jsonl: layer"),
        (
            {"evaluations": [{"settings": {}}, {"skipped": "attn.1", "cost": 1.0}]},
            "line 2 of .*evaluations.jsonl: ",
        ),
        ({"evaluations": [{"skipped": ["attn.1"], "cost": 1.0}]}, "line 1 of .*evaluations.jsonl: record"),
        ({"choices": [{"settings": {}}], "held_out": [{"batch": 0}]}, "holds no results; .* or let a run end"),
        ({"evaluations": result_folders.evaluations()}, "holds no results; .* or let a run end"),
        (
            {"answers": [{"record": "answers", "plans": [], "answers": {}}]},
            "answers alone make no page: let notall eval or notall paper end$",
        ),
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


FAR = 40_000_000


@pytest.mark.parametrize(
    "files",
    [
        {"similarity": [{"layer": FAR, "kind": "mlp", "cosine": 0.5, "cosine_se": 0.1}]},
        {"leave_one_out": [result_folders.alone()[0] | {"layer": FAR}]},
    ],
    ids=lambda files: next(iter(files)),
)
def test_a_layer_that_no_model_has_is_refused(tmp_path, files):
    folder = result_folders.write(tmp_path, **files)
    with pytest.raises(UsageError, match=r"line 1 of .*: layer: Input should be less than"):
        read_folder(folder)


def test_names_of_layers_that_no_model_has_make_no_page_of_gigabytes(tmp_path):
    far = result_folders.SPENT | {"skipped": [f"mlp.{FAR}"], "batches": "all", "cost": 1.0}
    dense = result_folders.record("dense", 0.0, False, 0.0, provenance={"fingerprint": f"llama-{FAR}x64-0"})
    folder = result_folders.write(tmp_path / "shape", results=[dense], evaluations=result_folders.evaluations())
    assert read_folder(folder).layers == result_folders.LAYERS
    folder = result_folders.write(tmp_path / "name", results=[dense], evaluations=[*result_folders.evaluations(), far])
    with pytest.raises(UsageError, match=r"line 14 of .*evaluations.jsonl: skipped.0: "):
        read_folder(folder)


def test_a_page_that_cannot_be_written_is_one_clear_line(folder):
    with pytest.raises(UsageError, match=r"cannot write .*choose another -o"):
        write_report(folder, folder / "results.jsonl" / "report.html")


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_the_page_that_was_there_and_nothing_beside_it(folder, tmp_path):
    path = write_report(folder, tmp_path / "report.html")
    whole = path.read_bytes()
    with room_for(1000), pytest.raises(UsageError, match=r"cannot write .*File too large; choose another -o"):
        write_report(folder, path)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(whole[:20_000])
    assert write_report(folder, path).read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("results.jsonl", r"results.jsonl is no name of a page: choose one that ends in .html"),
        ("notes.html", r"notes.html is there, and is no page of notall: choose another -o"),
    ],
)
def test_what_is_no_page_is_never_written_over(tmp_path, name, says):
    result_folders.write(tmp_path)
    (tmp_path / "notes.html").write_text("<p>mine: notall report</p>")
    before = (tmp_path / name).read_bytes()
    with pytest.raises(UsageError, match=says):
        write_report(tmp_path, tmp_path / name)
    assert (tmp_path / name).read_bytes() == before


def test_a_page_behind_a_link_is_written_where_the_link_leads(folder, tmp_path):
    (tmp_path / "link.html").symlink_to(tmp_path / "there.html")
    write_report(folder, tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "there.html").stat().st_size > 500_000


@pytest.mark.parametrize("name", ["a\u2028b", 'a\\"b', "a\\", "a\x00b\x1b\n\x85\ufffe\u202eb", "<b> & </script>"])
def test_any_name_can_be_drawn(tmp_path, name):
    """By the compiler that the page has too, which parses its expressions."""
    rows = [row | {"aim": name} for row in result_folders.all_compared()[:2]]
    folder = result_folders.write_comparison(tmp_path, [*rows, result_folders.all_compared()[0]])
    result_folders.write(folder, **{"evaluations/leave-one-out-x": result_folders.evaluations(name, 11)})
    specs = figures.draw_all(read_folder(folder))
    assert set(specs) == {"front0", "map", "savings", "tradeoff"}
    for figure in ("front0", "map", "tradeoff"):
        spec = specs[figure] | {"width": 300, "config": plots.LIGHT}
        assert "<svg" in vl_convert.vegalite_to_svg(spec, vl_version=plots.VEGALITE)


def test_names_and_nested_provenance_are_words():
    assert name_of(result_folders.record("mlp", 0.25, True, 1.0)) == "MLP 25%, last layer kept"
    assert dict(flatten({"a": {"b": 1, "c": {"d": "x"}}})) == {"a.b": "1", "a.c.d": "x"}


def test_a_folder_of_folders_names_one_that_holds_results(tmp_path):
    result_folders.write(tmp_path / "demo")
    with pytest.raises(UsageError, match=r"holds no results; .*demo does"):
        read_folder(tmp_path)


def test_a_folder_of_a_file_of_no_kind_shows_it_as_it_is(tmp_path):
    folder = read_folder(result_folders.write(tmp_path, lost=[{"criterion": "cosine", "lost": 0.1}]))
    assert folder.kind is None
    assert folder.foreign == {"lost": ({"criterion": "cosine", "lost": 0.1},)}
