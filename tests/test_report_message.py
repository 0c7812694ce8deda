"""The first sentence of a report, for each kind of folder: what can be left out, the
loss, the gain, what is next.
"""

import re
import shlex

import pytest
import typer.testing

import result_folders
from api import (
    app,
    parts_of,
    plan_file,
    results_of,
    write_report,
)
from notall import Plan

pytestmark = pytest.mark.any_transformers  # it reads records, and runs no model


def first(folder):
    """What the first verb says of a folder that has a message."""
    return next(shown for shown in parts_of(results_of(folder)) if shown.message)


def message(folder, *records):
    return first(result_folders.write(folder, *records)).message


def test_of_a_sweep_it_is_the_fastest_usable_plan_and_the_search_for_a_better_one(
    tmp_path,
):
    about = result_folders.SHAPED
    records = [
        one.model_copy(update={"provenance": about})
        for one in result_folders.all_records()
    ]
    shown = first(result_folders.write(tmp_path, *records))
    assert (
        shown.message.sentence
        == "Without 2 attentions of its 12 layers (attention 25%, last layer kept),"
        " tiny: +0.25 ± 0.03 nats a token (perplexity × 1.28); top-1 agreement 50%; decodes 1.12× as fast (quartiles 1.07 to 1.24);"
        " weights 2% smaller (3.7 MiB); KV cache 20% smaller (800 B a token)."
    )
    assert shown.message.usable
    assert (
        shown.message.command
        == "notall search tiny --skip attention:2 --text t --out plan.json"
    )
    assert shown.steps[shown.first].plan.attention == (7, 8)


def test_of_a_sweep_with_a_search_in_its_folder_it_is_what_the_search_chose(tmp_path):
    folder = result_folders.write(tmp_path, *result_folders.all_records())
    alone = first(folder)
    result_folders.write_search(folder / "plan.search")
    search, shown = first(folder / "plan.search"), first(folder)
    assert shown.message == search.message
    assert str(folder / "plan.json") in shown.message.command
    assert shown.steps == (*alone.steps, *search.steps)
    assert shown.steps[shown.first] == search.steps[search.first]
    page = write_report(folder, tmp_path / "r.html").read_text()
    (body,) = re.findall('<table id="table-results-2".*?</table>', page, re.S)
    rows = [
        shown.steps[int(number)] for number in re.findall('data-plan="(.*?)"', body)
    ]
    assert [row.plan.indices for row in rows] == [
        step.plan.indices for step in search.steps
    ]


@pytest.mark.parametrize(
    ("records", "mildest"),
    [
        (
            result_folders.all_records(),
            "attention 10%, last layer kept, perplexity has more than doubled: +0.90 ",
        ),
        (
            result_folders.all_compared(),
            "search by kl: 2 attentions, perplexity has more than doubled: +1.00 ",
        ),
    ],
)
def test_where_nothing_is_usable_it_says_so_and_asks_for_less(
    tmp_path, records, mildest
):
    useless = [
        one.model_copy(
            update={"quality": result_folders.quality(0.8 + one.quality.delta_nll)}
        )
        for one in records
        if one.plan
    ]
    shown = first(result_folders.write(tmp_path, *useless))
    plans = (
        f"None of the {len(useless)} plans here leaves tiny usable: with the mildest, "
    )
    assert shown.message.sentence.startswith(plans + mildest)
    assert shown.message.usable is False
    assert shown.message.command == "notall search tiny --max-nll 0.1 --out plan.json"
    losses = [step.quality.delta_nll for step in shown.steps]
    assert losses[shown.first] == min(losses)


def test_a_change_of_most_first_choices_is_no_more_usable_than_a_doubled_perplexity(
    tmp_path,
):
    other = result_folders.all_records(top1_agreement=0.49)
    assert "top-1 agreement is below one half" in message(tmp_path, *other).sentence


def test_of_a_comparison_it_is_the_fastest_usable_choice_and_how_to_make_it(tmp_path):
    rows = result_folders.all_compared()
    rows[1] = rows[1].model_copy(update={"times": result_folders.times(1.4)})
    faster = {
        "times": result_folders.times(2.0),
        "quality": result_folders.quality(0.7),
    }  # perplexity more than doubles
    rows[3] = rows[3].model_copy(update=faster)
    found = first(result_folders.write_comparison(tmp_path, rows)).message
    assert found.sentence.startswith(
        "Without 4 attentions of its 12 layers (search by kl), tiny: +0.40 ± 0.04 nats"
        " a token (perplexity × 1.49); top-1 agreement 50%; decodes"
        " 1.40× as fast (quartiles 1.33 to 1.54)"
    )
    assert (
        found.command
        == "notall search tiny --skip attention:4 --objective kl --out plan.json"
    )


@pytest.mark.parametrize(
    ("repair", "end", "command"),
    [
        (
            "none",
            "repair it, and write that model",
            "notall export tiny --plan {} --repair refit --to hf --out smaller",
        ),
        (
            "refit",
            "repair that plan",
            "notall repair tiny --plan {} --text t --out repaired",
        ),
        (
            "replaceme",
            "repair that plan",
            "notall repair tiny --plan {} --repair replaceme --text t --out repaired",
        ),
    ],
)
def test_of_a_comparison_that_kept_its_plans_it_is_what_to_do_with_the_plan(
    tmp_path, repair, end, command
):
    rows = [result_folders.compared("search", "attention", 2, 0.1, repair=repair)]
    folder = result_folders.write_comparison(tmp_path, rows)
    kept = plan_file(folder, rows[0])
    kept.parent.mkdir()
    Plan([1, 2]).save(kept)
    found = first(folder).message
    assert (found.purpose, found.command) == (end, command.format(kept))


def test_the_command_of_a_comparison_names_its_space_and_its_way_to_choose(tmp_path):
    row = result_folders.compared(
        "cosine", "portable", 2, 0.2, objective="nll, less text", repair="refit"
    )
    found = first(result_folders.write_comparison(tmp_path, [row])).message
    assert (
        found.command
        == "notall search tiny --skip portable:2 --criterion cosine --out plan.json"
    )
    assert found.purpose == "make that plan, then repair it"


def test_of_a_search_it_is_what_was_chosen_last_and_where_its_plan_is(tmp_path):
    dense = result_folders.footprint(Plan())
    sizes = {"footprint": result_folders.footprint(Plan(range(2))), "dense": dense}
    rows = (result_folders.chosen(4), result_folders.chosen(2, **sizes))
    shown = first(result_folders.write(tmp_path / "better.search", *rows))
    assert (
        shown.message.sentence
        == "Without 2 attentions of its 12 layers, tiny: +0.20 ± 0.02 nats a token"
        " (perplexity × 1.22); top-1 agreement 50%; runs 1.25× as"
        " fast (quartiles 1.19 to 1.38); weights 2% smaller (3.7 MiB); KV cache 20%"
        " smaller (800 B a token)."
    )
    plan = tmp_path / "better.json"
    pruned = tmp_path / "better-pruned"
    assert (
        shown.message.command
        == f"notall export tiny --plan {plan} --repair refit --to hf --out {pruned}"
    )
    assert (shown.first, shown.steps[1].order) == (1, (("attn.9",), ("attn.8",)))


@pytest.mark.parametrize(
    ("changes", "usable", "command"),
    [
        (
            {"quality": result_folders.quality(0.7)},
            False,
            "repair tiny --plan {} --out repaired",
        ),
        (
            {"quality": result_folders.quality(0.1, top1_agreement=0.4)},
            False,
            "repair tiny --plan {} --out repaired",
        ),
        ({"quality": None}, None, "eval tiny --plan {}"),
    ],
)
def test_a_search_that_wrecked_the_model_says_so_and_one_that_measured_nothing_asks_for_it(
    tmp_path, changes, usable, command
):
    found = message(tmp_path / "p.search", result_folders.chosen(2, **changes))
    assert found.usable is usable
    assert found.command == f"notall {command.format(tmp_path / 'p.json')}"
    assert {
        False: "the model is no longer usable",
        None: "what that costs was not measured",
    }[usable] in found.sentence


def test_of_a_search_that_was_repaired_it_is_the_repaired_plan(tmp_path):
    found = message(
        tmp_path / "p.search", result_folders.chosen(3), *result_folders.all_measured()
    )
    assert "the repaired tiny" in found.sentence
    assert "tiny: +0.10 ± 0.01 nats" in found.sentence
    assert f"--plan {tmp_path / 'p.repaired'}" in found.command


def test_a_search_that_missed_its_budget_says_so(tmp_path):
    missed = message(
        tmp_path / "a", result_folders.chosen(2, missed="1.16x is what was reached")
    )
    kept = message(tmp_path / "b", result_folders.chosen(2))
    assert (
        missed.sentence
        == f"{kept.sentence} Missed what was asked: 1.16x is what was reached."
    )


@pytest.mark.parametrize(
    ("before", "after", "lost", "command"),
    [
        ("skipped", "repaired", 0.4, "export tiny --plan {0} --to hf --out {0}-pruned"),
        ("skipped", "repaired", 4.0, "heal tiny --plan {0} --out healed"),
        ("repaired", "healed", 4.0, "search tiny --max-nll 0.1 --out plan.json"),
    ],
)
def test_of_a_repair_it_is_its_last_state_and_what_comes_after_that(
    tmp_path, before, after, lost, command
):
    rows = [
        result_folders.measured("prose", state, lost * share)
        for state, share in ((before, 1), (after, 0.25))
    ]
    made = result_folders.looks() if after == "healed" else result_folders.refits()
    found = message(tmp_path / "r", *rows, *made)
    assert found.sentence.startswith(
        f"Without 3 attentions of its 12 layers, the {after} tiny: "
    )
    assert found.command == f"notall {command.format(tmp_path / 'r')}"


def test_cards_of_a_repair_tell_of_each_text_what_it_gives_back(tmp_path):
    again = result_folders.measured(
        "book.txt", "repaired", 0.1
    )  # measured anew: the last one counts
    shown = first(
        result_folders.write_repair(tmp_path, [*result_folders.all_measured(), again])
    )
    stays = "top-1 agreement 50%"
    assert [(card.title, card.figure, card.text) for card in shown.cards] == [
        (
            *("prose, other windows", "+0.10"),
            (
                f"repaired (KL 0.10, {stays}); +0.40 ± 0.04 nats a token skipped (KL"
                f" 0.40, {stays})"
            ),
        ),
        (
            "book.txt",
            "+0.10",
            (
                f"repaired (KL 0.10, {stays}); +0.80 ± 0.08 nats a token skipped (KL"
                f" 0.80, {stays})"
            ),
        ),
    ]


@pytest.mark.parametrize(
    ("lost", "usable", "command"),
    [
        (0.4, True, "bench tiny --skip attention:0.33"),
        (0.8, False, "search tiny --max-nll 0.1 --out plan.json"),
    ],
)
def test_of_an_evaluation_it_is_what_was_measured_and_what_it_saves(
    tmp_path, lost, usable, command
):
    """Its folder holds no plan: the next command names it as the evaluation did."""
    about = result_folders.ABOUT.model_copy(
        update={"where": {"command": "notall eval tiny --skip attention:0.33 -o e"}}
    )
    found = message(
        tmp_path, result_folders.measured("prose", "skipped", lost, provenance=about)
    )
    assert found.sentence.startswith(f"Without 3 attentions, tiny: {lost:+.2f} ± ")
    assert ("no longer usable" in found.sentence) != usable
    assert found.usable is usable
    assert found.command == f"notall {command}"


@pytest.mark.parametrize(
    ("what", "where", "command"),
    [
        (
            {},
            "notall bench tiny --skip mlp:0.3 --keep-last",
            "tiny --skip mlp:0.3 --keep-last",
        ),
        (
            {},
            "notall bench tiny --plan 'my plan.json' --rounds 9",
            "tiny --plan 'my plan.json'",
        ),
        ({}, "notall bench 'tiny", "tiny --plan plan.json"),
        ({"dummy_weights": True}, "notall bench --skip mlp", "MODEL --skip mlp"),
    ],
)
def test_of_a_bench_it_is_the_last_plan_and_what_its_loss_is(
    tmp_path, what, where, command
):
    about = result_folders.Provenance(
        what=result_folders.ABOUT.what | what, where={"command": where}
    )
    rows = [
        one.model_copy(update={"provenance": about})
        for one in result_folders.all_benched()
    ]
    shown = first(result_folders.write(tmp_path, *rows))
    found = shown.message
    assert (
        found.sentence
        == "Without 3 blocks, tiny: what that costs was not measured; decodes 1.40× as"
        " fast (quartiles 1.33 to 1.54); weights 2% smaller (7.5 MiB); KV cache 30%"
        " smaller (700 B a token)."
    )
    assert found.usable is None
    assert found.command == f"notall eval {command}"
    assert [step.footprint.weight_bytes for step in shown.steps] == [
        4_000_000,
        3_880_000,
        8_000_000,
        7_880_000,
    ]
    assert [step.dense.weight_bytes for step in shown.steps] == [4_000_000] * 2 + [
        8_000_000
    ] * 2


def test_of_the_papers_evaluation_it_is_what_became_of_its_claims(tmp_path):
    shown = first(result_folders.write_paper(tmp_path))
    assert (
        shown.message.sentence
        == "The paper's 4 claims on tiny (holds: 1, does not hold: 1, inconclusive: 2);"
        " without the deepest 33% of its attentions it decodes 1.17× as fast (95 %"
        " interval 0.85 to 1.48) and the average of 2 benchmarks changes by -20.0 ±"
        " 3.5 points."
    )
    assert shown.message.command == "notall eval tiny --skip attention:0.33"


def test_an_average_from_a_few_documents_is_not_told_as_one(tmp_path):
    few = [
        *result_folders.benchmarks(29),
        *result_folders.timed(),
        *result_folders.claims(),
    ]
    assert (
        "-20.0 ± 3.5 points, from too few documents to say (29 of a task)."
        in message(tmp_path, *few).sentence
    )


def test_the_diagnostics_tell_which_of_the_papers_plans_is_usable(tmp_path):
    found = first(result_folders.write_paper(tmp_path / "a", diagnostics=True)).message
    assert (
        "without the deepest 33% of its attentions (the last layer kept) it decodes"
        " 1.17×" in found.sentence
    )
    assert "long texts take +0.33 nats a token." in found.sentence
    assert found.usable
    assert found.command.endswith("--skip attention:0.33 --keep-last")
    wrecked = [
        *result_folders.benchmarks(),
        *result_folders.timed(),
        *result_folders.checks(delta=5.0),
    ]
    found = message(tmp_path / "b", *wrecked)
    assert "+5.00 nats a token: it is no longer usable" in found.sentence
    assert found.usable is False


def test_an_evaluation_that_has_only_begun_says_how_to_go_on(tmp_path):
    rows = [
        one
        for one in result_folders.checks()
        if one.check == "passkey at 256" and one.variant == "mlp"
    ]
    found = message(tmp_path, *rows)
    assert found.sentence == "The evaluation of tiny has only begun."
    assert found.command == f"notall paper tiny --out {tmp_path}"


def test_a_page_of_the_papers_evaluation_opens_on_its_claims(tmp_path):
    page = write_report(
        result_folders.write_paper(tmp_path), tmp_path / "r.html"
    ).read_text()
    assert (
        page.index('id="message"')
        < page.index('id="table-claims"')
        < page.index('id="plans"')
    )


def test_the_table_of_a_comparison_begins_with_the_best_and_repairs_stand_below_each_other(
    tmp_path,
):
    ways = (("cosine", 0.3, 0.25), ("deepest", 0.9, 0.1), ("search", 0.2, 0.15))
    records = [
        result_folders.compared(way, space, count, lost, repair=repair)
        for space, count in (("attention", 4), ("attention", 2), ("portable", 2))
        for way, unrepaired, repaired in ways
        for repair, lost in (("none", unrepaired * count), ("refit", repaired * count))
    ]
    shown = first(result_folders.write_comparison(tmp_path, records))
    (results,) = shown.sections
    table, steps = results.table, results.steps
    cells = [[str(cell) for cell in row[:5]] for row in table.rows]
    assert [row[0] for row in cells[:6]] == [
        "deepest",
        "deepest",
        "search",
        "search",
        "cosine",
        "cosine",
    ]
    assert [row[3] for row in cells] == ["2"] * 6 + ["4"] * 6 + ["2"] * 6
    assert [row[4] for row in cells] == ["refit", "-"] * 9
    for row, step in zip(table.rows, steps):
        assert row[5].value == records[step].quality.delta_nll
    usable = [str(row[table.headings.index("usable")]) for row in table.rows]
    assert usable[:6] == ["yes", "no", "yes", "yes", "yes", "yes"]


def test_every_next_command_is_one_that_can_be_typed(tmp_path):
    """Its options are the command's own; only what it reads is absent here."""
    useless = result_folders.all_records(top1_agreement=0.1)
    folders = {
        **{
            name: write(tmp_path / name)
            for name, write in result_folders.WRITERS.items()
        },
        "useless": result_folders.write(tmp_path / "useless", *useless),
        "wrecked": result_folders.write_search(
            tmp_path / "w.search",
            result_folders.chosen(2, quality=result_folders.quality(3.0)),
        ),
    }
    runner = typer.testing.CliRunner()
    for folder in folders.values():
        _, command, *words = shlex.split(first(folder).message.command)
        options = [word for word in words if word.startswith("--")]
        parsed = runner.invoke(app, [command, *words, "--no-such-option"])
        assert "--no-such-option" in parsed.output
        assert options
        assert all(option not in parsed.output for option in options)
