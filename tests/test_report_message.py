"""The first sentence of a report, for each kind of folder: what can be left out, the loss, the gain, what is next."""

import shlex
from dataclasses import replace

import pytest
import typer.testing

import result_folders
from api import (
    app,
    claims_table,
    findings_of,
    first_plan,
    message_of,
    plan_file,
    read_folder,
    repairs_table,
    stepped_table,
    write_report,
)
from notall import Plan

pytestmark = pytest.mark.any_transformers  # it reads records, and runs no model


def message(folder, **files):
    return message_of(read_folder(result_folders.write(folder, **files)))


def test_of_a_sweep_it_is_the_fastest_usable_plan_and_the_search_for_a_better_one(tmp_path):
    read = read_folder(result_folders.write(tmp_path))
    found = message_of(read)
    assert found.said == (
        "Without 2 attentions of its 10 layers (attention 25%, last layer kept), tiny decodes 1.12× as fast "
        "(quartiles 1.07 to 1.24) with weights smaller by 2% and a KV cache smaller by 20%, at +0.25 ± 0.03 nats a "
        "token (perplexity × 1.28; 50% of its first choices stay)."
    )
    assert found.usable
    assert found.command == "notall search tiny --kind attention --count 2 --text t --out plan.json"
    assert read.records[first_plan(read)]["plan"]["attention"] == [7, 8]


@pytest.mark.parametrize(
    ("records", "mildest"),
    [
        (result_folders.all_records(), "attention 10%, last layer kept, perplexity has more than doubled: +0.90 "),
        (result_folders.all_compared(), "search by kl: 2 attention, perplexity has more than doubled: +1.00 "),
    ],
)
def test_where_nothing_is_usable_it_says_so_and_asks_for_less(tmp_path, records, mildest):
    useless = [row | {"delta_nll": 0.8 + (row["delta_nll"] or 0)} for row in records if row["plan"]["attention"]]
    found = message(tmp_path, results=useless)
    plans = f"None of the {len(useless)} plans here leaves tiny usable: with the mildest, "
    assert found.said.startswith(plans + mildest)
    assert found.usable is False
    assert found.command == "notall search tiny --max-nll 0.1 --out plan.json"


def test_a_change_of_most_first_choices_is_no_more_usable_than_a_doubled_perplexity(tmp_path):
    other = [row | {"top1_agreement": 0.49} for row in result_folders.all_records()]
    assert "over half of its first choices have changed" in message(tmp_path, results=other).said


def test_of_a_comparison_it_is_the_fastest_usable_choice_and_how_to_make_it(tmp_path):
    rows = result_folders.all_compared()
    rows[1] |= {"speedup_decode": 1.4, "speedup_decode_low": 1.3, "speedup_decode_high": 1.5}
    faster = {"speedup_decode": 2.0, "delta_nll": 0.7}  # but perplexity more than doubles
    rows[3] |= faster
    found = message_of(read_folder(result_folders.write_comparison(tmp_path, rows)))
    assert found.said.startswith(
        "Without 4 attentions of its 12 layers (search by kl), tiny decodes 1.40× as fast (quartiles 1.30 to 1.50), at"
    )
    assert found.command == "notall search tiny --kind attention --count 4 --objective kl --out plan.json"


@pytest.mark.parametrize(
    ("repair", "end", "command"),
    [
        ("none", "repair it, and write that model", "notall export tiny --plan {} --repair --to hf --out smaller"),
        ("refit", "repair that plan", "notall repair tiny --plan {} --text t --out repaired"),
        ("replaceme", "repair that plan", "notall repair tiny --plan {} --method replaceme --text t --out repaired"),
    ],
)
def test_of_a_comparison_that_kept_its_plans_it_is_what_to_do_with_the_plan(tmp_path, repair, end, command):
    rows = [result_folders.compared("search", "attention", 2, 0.1, repair=repair)]
    folder = result_folders.write_comparison(tmp_path, rows)
    kept = plan_file(folder, rows[0])
    kept.parent.mkdir()
    Plan([1, 2]).save(kept)
    found = message_of(read_folder(folder))
    assert (found.end, found.command) == (end, command.format(kept))


def test_the_command_of_a_comparison_names_its_space_and_its_way_to_choose(tmp_path):
    row = result_folders.compared("cosine", "portable", 2, 0.2, aim="nll, less text", repair="refit")
    found = message_of(read_folder(result_folders.write_comparison(tmp_path, [row])))
    assert found.command == (
        "notall search tiny --kind sublayer --portable --count 2 --criterion cosine --out plan.json"
    )
    assert found.end == "make that plan, then repair it"


def test_of_a_search_it_is_what_was_chosen_last_and_where_its_plan_is(tmp_path):
    sizes = {"weight_bytes": 96, "dense_weight_bytes": 100, "kv_bytes_per_token": 7, "dense_kv_bytes_per_token": 10}
    folder = tmp_path / "better.search"
    found = message(folder, chosen=[result_folders.chosen(4), result_folders.chosen(2) | {"weighed": sizes}])
    assert found.said == (
        "Without 2 attentions of its 12 layers, tiny runs 1.25× as fast (quartiles 1.20 to 1.30) with weights smaller "
        "by 4% and a KV cache smaller by 30%, at +0.20 ± 0.02 nats a token (perplexity × 1.22; 50% of its first "
        "choices stay)."
    )
    plan = tmp_path / "better.json"
    assert found.command == f"notall export tiny --plan {plan} --repair --to hf --out {tmp_path / 'better-pruned'}"


@pytest.mark.parametrize(
    ("changes", "usable", "command"),
    [
        ({"delta_nll": 0.7}, False, "repair tiny --plan {} --out repaired"),
        ({"top1_agreement": 0.4}, False, "repair tiny --plan {} --out repaired"),
        (dict.fromkeys(result_folders.QUALITY), None, "eval tiny --plan {}"),
    ],
)
def test_a_search_that_wrecked_the_model_says_so_and_one_that_measured_nothing_asks_for_it(
    tmp_path, changes, usable, command
):
    row = {name: value for name, value in (result_folders.chosen(2) | changes).items() if value is not None}
    found = message(tmp_path / "p.search", chosen=[row])
    assert found.usable is usable
    assert found.command == f"notall {command.format(tmp_path / 'p.json')}"
    assert {False: "but is no longer usable", None: "what that costs was not measured"}[usable] in found.said


def test_of_a_search_that_was_repaired_it_is_the_repaired_plan(tmp_path):
    files = {"chosen": [result_folders.chosen(3)], "measured": result_folders.all_measured()}
    found = message(tmp_path / "p.search", **files)
    assert "the repaired tiny" in found.said
    assert "at +0.10 ± 0.01 nats" in found.said
    assert f"--plan {tmp_path / 'p.repaired'}" in found.command


@pytest.mark.parametrize(
    ("before", "after", "lost", "command"),
    [
        ("skipped", "repaired", 0.4, "export tiny --plan {0} --to hf --out {0}-pruned"),
        ("skipped", "repaired", 4.0, "heal tiny --plan {0} --out healed"),
        ("repaired", "healed", 4.0, "search tiny --max-nll 0.1 --out plan.json"),
    ],
)
def test_of_a_repair_it_is_its_last_state_and_what_comes_after_that(tmp_path, before, after, lost, command):
    rows = [result_folders.measured("prose", state, lost * share) for state, share in ((before, 1), (after, 0.25))]
    made = {"healing": result_folders.looks()} if after == "healed" else {"refits": result_folders.refits()}
    found = message(tmp_path / "r", measured=rows, **made)
    assert found.said.startswith(f"Without 3 attentions of its 12 layers, the {after} tiny is ")
    assert found.command == f"notall {command.format(tmp_path / 'r')}"


@pytest.mark.parametrize(
    ("lost", "usable", "command"),
    [
        (0.4, True, "bench tiny --skip attention --fraction 0.33"),
        (0.8, False, "search tiny --max-nll 0.1 --out plan.json"),
    ],
)
def test_of_an_evaluation_it_is_what_was_measured_and_what_it_saves(tmp_path, lost, usable, command):
    """Its folder holds no plan: the next command names it as the evaluation did."""
    about = {"what": {"model": "tiny"}, "where": {"command": "notall eval tiny --skip attention --fraction 0.33 -o e"}}
    found = message(tmp_path, measured=[result_folders.measured("prose", "skipped", lost, provenance=about)])
    assert found.said.startswith(f"Without 3 attentions, tiny is {'still' if usable else 'no longer'} ")
    assert found.usable is usable
    assert found.command == f"notall {command}"


def test_a_search_that_missed_its_budget_says_so(tmp_path):
    read = read_folder(result_folders.write(tmp_path, chosen=[result_folders.chosen(2)]))
    missed = replace(read, records=(read.records[0] | {"missed": "1.16x is what was reached"},))
    assert message_of(missed).said == f"{message_of(read).said} It missed what was asked: 1.16x is what was reached."


@pytest.mark.parametrize(
    ("about", "command"),
    [
        (
            {"command": "notall bench tiny --skip mlp --fraction 0.3 --keep-last"},
            "tiny --skip mlp --fraction 0.3 --keep-last",
        ),
        ({"command": "notall bench tiny --plan 'my plan.json' --rounds 9"}, "tiny --plan 'my plan.json'"),
        ({"command": "notall bench 'tiny"}, "tiny --plan plan.json"),
        ({"dummy_weights": True, "command": "notall bench --skip mlp"}, "MODEL --skip mlp"),
    ],
)
def test_of_a_bench_it_is_the_last_plan_and_what_its_loss_is(tmp_path, about, command):
    rows = [row | {"provenance": result_folders.ABOUT | about} for row in result_folders.all_benched()]
    found = message(tmp_path, bench=rows)
    assert found.said == (
        "Without 3 blocks, tiny decodes 1.40× as fast (quartiles 1.33 to 1.54) with weights smaller "
        "by 52% and a KV cache smaller by 30%; what that costs was not measured."
    )
    assert found.usable is None
    assert found.command == f"notall eval {command}"


def test_of_the_papers_evaluation_it_is_what_became_of_its_claims(tmp_path):
    found = message_of(read_folder(result_folders.write_paper(tmp_path)))
    assert found.said == (
        "Of the paper's 4 claims 1 holds, 1 does not hold and 2 lie within error on tiny; without the deepest 33% of "
        "its attentions it decodes 1.17× as fast and the average of 2 benchmarks changes by -20.0 ± 3.5 points."
    )
    assert found.command == "notall eval tiny --skip attention --fraction 0.33"


def test_an_average_from_a_few_documents_is_not_told_as_one(tmp_path):
    folder = read_folder(result_folders.write_paper(tmp_path))
    folder.others["benchmarks"] = [row | {"documents": 29} for row in folder.others["benchmarks"]]
    assert "-20.0 ± 3.5 points, from too few documents to say (29 a task)." in message_of(folder).said


def test_the_battery_tells_which_of_the_papers_plans_is_usable(tmp_path):
    folder = read_folder(result_folders.write_paper(tmp_path, battery=True))
    found = message_of(folder)
    assert "without the deepest 33% of its attentions (the last layer kept) it decodes 1.17×" in found.said
    assert "long texts take +0.33 nats a token." in found.said
    assert found.usable
    assert found.command.endswith("--skip attention --fraction 0.33 --keep-last")
    wrecked = [row | {"delta": 5.0} for row in folder.others["battery"]]
    folder.others["battery"] = wrecked
    assert "+5.00 nats a token: it is no longer usable" in message_of(folder).said
    assert message_of(folder).usable is False


def test_an_evaluation_that_has_only_begun_says_how_to_go_on(tmp_path):
    rows = [row for row in result_folders.battery() if row["check"] == "passkey at 256"]
    found = message(tmp_path, battery=[row | {"variant": "mlp"} for row in rows])
    assert found.said == "The evaluation of tiny has only begun."
    assert found.command == f"notall paper tiny --out {tmp_path}"


def test_a_page_of_the_papers_evaluation_opens_on_its_claims(tmp_path):
    folder = result_folders.write_paper(tmp_path)
    page = write_report(folder, tmp_path / "r.html").read_text()
    assert page.index('id="message"') < page.index('id="claims"') < page.index("<h2>Benchmarks</h2>")
    table = claims_table(read_folder(folder).claims)
    assert [cell.text for cell in table.rows[1]] == ["a | b", "does not hold", "+0.1 ± 0.2"]
    assert findings_of(read_folder(folder))[0].figure == "1 of 4"


def test_a_folder_of_foreign_lines_has_no_message(tmp_path):
    assert message(tmp_path, lost=[{"criterion": "cosine", "lost": 0.1}]) is None


def test_the_table_of_a_comparison_begins_with_the_best_and_repairs_stand_beside(tmp_path):
    ways = (("cosine", 0.3, 0.25), ("deepest", 0.9, 0.1), ("search", 0.2, 0.15))
    records = [
        result_folders.compared(way, space, count, lost, repair=repair)
        for space, count in (("attention", 4), ("attention", 2), ("portable", 2))
        for way, unrepaired, repaired in ways
        for repair, lost in (("none", unrepaired * count), ("refit", repaired * count))
    ]
    table = stepped_table("compare", records)
    cells = [[cell.text for cell in row[:5]] for row in table.rows]
    assert [row[0] for row in cells[:6]] == ["deepest", "deepest", "search", "search", "cosine", "cosine"]
    assert [row[3] for row in cells] == ["2"] * 6 + ["4"] * 6 + ["2"] * 6
    assert [row[4] for row in cells] == ["refit", "none"] * 9
    for row, plan in zip(table.rows, table.plans):
        assert row[5].value == records[plan]["delta_nll"]
    usable = [row[table.headings.index("usable")].text for row in table.rows]
    assert usable[:6] == ["yes", "no", "yes", "yes", "yes", "yes"]
    beside = repairs_table(records)
    assert beside.headings == ("criterion", "by", "among", "count", "unrepaired", "refit")
    assert [cell.text for cell in beside.rows[0]][4:] == ["1.800 ± 0.180", "0.200 ± 0.020"]
    assert repairs_table([row for row in records if row["repair"] == "none"]) is None


def test_every_next_command_is_one_that_can_be_typed(tmp_path):
    """Its options are the command's own; only what it reads is absent here."""
    folders = {
        "sweep": result_folders.write(tmp_path / "sweep"),
        "useless": result_folders.write(
            tmp_path / "useless", results=[row | {"top1_agreement": 0.1} for row in result_folders.all_records()]
        ),
        "compare": result_folders.write_comparison(tmp_path / "compare"),
        "search": result_folders.write(tmp_path / "p.search", chosen=[result_folders.chosen(2)]),
        "wrecked": result_folders.write(tmp_path / "w.search", chosen=[result_folders.chosen(2, delta_nll=3.0)]),
        "bench": result_folders.write(tmp_path / "bench", bench=result_folders.all_benched()),
        "paper": result_folders.write_paper(tmp_path / "paper"),
    }
    runner = typer.testing.CliRunner()
    for folder in folders.values():
        _, command, *words = shlex.split(message_of(read_folder(folder)).command)
        options = [word for word in words if word.startswith("--")]
        parsed = runner.invoke(app, [command, *words, "--no-such-option"])
        assert "--no-such-option" in parsed.output
        assert options
        assert all(option not in parsed.output for option in options)
