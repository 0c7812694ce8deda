"""What a report is made of; `test_report_page.py` looks at it in a browser."""

import csv
import io
import re
from pathlib import Path

import pytest

import result_folders
import shown_pages
from api import (
    ComparisonRecord,
    Message,
    PageParts,
    PageStep,
    Provenance,
    Section,
    comparison_points,
    flatten,
    joined,
    read_json,
    records_lines,
    render,
    results_of,
    table,
    words,
    write_report,
)
from notall import Plan, UsageError
from small_disk import room_for

pytestmark = (
    pytest.mark.any_transformers
)  # it lays out what verbs show, and runs no model


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = shown_pages.page(
        tmp_path_factory.mktemp("sweep"), shown_pages.swept(), shown_pages.alike()
    )
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return shown_pages.page(
        tmp_path_factory.mktemp("compare"), shown_pages.compared()
    ).read_text(encoding="utf-8")


def markup(page):
    """The page without what its programs and styles say."""
    return re.sub(r"<(script|style)>.*?</\1>", r"<\1></\1>", page, flags=re.S)


def data_of(page):
    return read_json(
        re.search(
            r'<script type="application/json" id="data">(.*?)</script>', page, re.S
        )[1]
    )


def headings(page):
    """The titles of the sections, in their order."""
    found = re.findall(r"<h2>(.*?)</h2>", markup(page), re.S)
    return [re.sub("<.*?>", "", title) for title in found]


def repair_folder(path):
    """A folder on disk, as a repair that was killed leaves it."""
    return result_folders.write(path, *result_folders.refits())


# --- what is on it
# --------------------------------------------------------------------------------------


def test_the_page_fetches_nothing_and_is_small(page):
    assert (
        re.findall(r"<(?:script|link|iframe|img)[^>]*(?:src|href)\s*=", markup(page))
        == []
    )
    assert "default-src 'none'" in page
    assert len(page.encode()) < 3_000_000
    assert page.lower().count("<script") == page.lower().count("</script>") == 3


def test_every_part_is_there_in_its_order(page):
    data = data_of(page)
    assert list(data["specs"]) == ["map", "savings", "similarity", "tradeoff"]
    assert data["followers"] == ["savings", "tradeoff"]
    assert headings(page) == [
        *(
            "Original model",
            "Fastest",
            "The model, plan by plan",
            "Quality against measured speed",
        ),
        *("Every plan beside the original model", "How much each layer changes"),
        *("What they say", "Where this comes from"),
    ]
    assert len(data["plans"]) == 19
    assert data["plans"][4] == {
        "name": "attention 25%, last layer kept",
        "skipped": ["attn.7", "attn.8"],
        "prompt": [],
        "told": (
            "2 sublayers skipped; +0.25 ± 0.03 nats a token; decodes 1.12 times as fast"
            " [1.07 to 1.24]."
        ),
    }
    assert 'value="4"' in page  # the step to begin with
    assert "One, two," in page
    assert data["next"] == "notall search tiny"


def test_parts_that_nothing_is_shown_of_are_left_out(tmp_path):
    page = shown_pages.page(tmp_path / "a", shown_pages.alike()).read_text()
    assert list(data_of(page)["specs"]) == ["similarity"]
    assert headings(page) == ["How much each layer changes", "Where this comes from"]
    assert 'id="plan"' not in page
    one = shown_pages.page(
        tmp_path / "b", PageParts(steps=(shown_pages.dense(),))
    ).read_text()
    assert list(data_of(one)["specs"]) == ["map", "savings"]
    assert "nothing is skipped; 50.0 ms a token." in one


def test_a_step_is_told_in_a_sentence():
    step = PageStep("a", Plan((1, 2)), order=(("attn.2",), ("attn.1", "mlp.1")))
    assert (
        step.description
        == "2 sublayers skipped; skipped in this order: attn.2, attn.1+mlp.1."
    )
    lost = result_folders.quality(0.4).model_copy(update={"delta_nll": float("nan")})
    assert (
        PageStep("a", Plan((1,)), lost).description
        == "1 sublayer skipped; +inf ± 0.04 nats a token."
    )


def test_the_map_is_shaded_by_what_is_known(page, comparison):
    assert "a stand-in" in page
    whole = " ".join(comparison.split())
    assert (
        "left out, on a logarithmic scale: NLL added, nats per token, measured on 2"
        " windows of text." in whole
    )
    assert "a stand-in" not in comparison
    cells = list(csv.DictReader(io.StringIO(data_of(comparison)["csv"]["map"])))
    assert [float(row["cost"]) for row in cells[:3]] == pytest.approx([0, 0.1, 0.2])
    assert len(cells) == 2 * result_folders.LAYERS


def test_savings_are_shares_of_the_dense_model(page):
    rows = [
        row
        for row in csv.DictReader(io.StringIO(data_of(page)["csv"]["savings"]))
        if row["plan"] == "5"
    ]
    found = {
        row["measure"]: float(row["share"]) for row in rows
    }  # 33 % of the attentions
    assert found["first token"] == pytest.approx(1 / (1 + 0.33 * 0.5))
    assert found["weights"] == pytest.approx((4_000_000 - 3 * 40_000) / 4_000_000)
    assert found["KV cache a token"] == 0.7
    assert all(
        float(row["low"]) <= float(row["share"]) <= float(row["high"]) for row in rows
    )


def test_what_a_step_lacks_has_no_bar():
    step = PageStep(
        "a", Plan((1,)), footprint=shown_pages.DENSE
    )  # of an original model nothing is known
    page = render(shown_pages.folder(Path("f")), [PageParts(steps=(step,))])
    assert list(data_of(page)["specs"]) == ["map"]
    left = shown_pages.DENSE.model_copy(update={"state_bytes": 50})
    both = PageStep(
        "a",
        Plan((1,)),
        footprint=left,
        dense=left.model_copy(update={"state_bytes": 100}),
    )
    page = render(shown_pages.folder(Path("f")), [PageParts(steps=(both,))])
    assert "states: 50 B of 100 B" in str(data_of(page)["specs"]["savings"])
    assert "Where the time and the bytes go" in page


def test_panels_stand_beside_each_other_with_their_titles(comparison):
    assert list(data_of(comparison)["specs"]) == [
        "front0",
        "front1",
        "map",
        "savings",
        "tradeoff",
    ]
    assert [
        re.sub("<.*?>", "", title)
        for title in re.findall(r"<h3>(.*?)</h3>", markup(comparison))
    ][1:] == [
        *("attention", "mlp"),
    ]


def test_a_table_says_and_sorts_by_the_facts(page):
    body = markup(page)
    row = re.search(r'<tr data-plan="2">(.*?)</tr>', body, re.S)[1]
    cells = re.findall(r"<bdi>(.*?)</bdi>", row)
    assert cells[:3] == ["attention", "kept", "0.100 ± 0.010"]
    assert re.findall(r'data-value="(.*?)"', row)[2] == str(
        shown_pages.steps()[2].quality.delta_nll
    )
    assert "±: one standard error; [ ]: quartiles of the rounds." in body


def test_of_several_verbs_one_is_stepped_through_and_tables_of_others_find_its_plan(
    tmp_path,
):
    message = Message("other", True, "go on", "notall eval")
    other = shown_pages.repaired()
    later = PageParts(
        message=message,
        steps=other.steps,
        sections=(*other.sections, shown_pages.results(other.steps[:0])),
    )
    page = shown_pages.page(tmp_path, shown_pages.swept(), later).read_text()
    data = data_of(page)
    assert len(data["plans"]) == 19
    assert data["next"] == "notall search tiny"
    body = re.search(r'<table id="table-measured".*?</table>', markup(page), re.S)[0]
    assert re.findall('data-plan="(.*?)"', body) == [
        "5",
        "5",
    ]  # the deepest 33% of the attentions
    assert data["followers"] == ["savings", "tradeoff"]


def test_a_figure_of_a_verb_that_is_not_stepped_through_marks_no_step(tmp_path):
    page = shown_pages.page(
        tmp_path, shown_pages.compared(), shown_pages.swept()
    ).read_text()
    data = data_of(page)
    assert data["followers"] == ["savings", "front0", "front1", "tradeoff"]
    assert "tradeoff-2" in data["specs"]  # each name is there once
    assert {"results", "results-2"} <= set(data["csv"])
    assert {
        param["name"]: param["value"]
        for param in data["specs"]["tradeoff-2"]["params"]
        if "value" in param
    } == {"plan": -1}


def test_a_section_may_open_the_page(tmp_path):
    columns = [words("claim", lambda one: one.name)]
    claims = Section(
        "claims",
        "The claims",
        table=table("claims", columns, [shown_pages.dense()]),
        opens=True,
    )
    swept = shown_pages.swept()
    page = shown_pages.page(
        tmp_path, PageParts(steps=swept.steps, sections=(*swept.sections, claims))
    ).read_text()
    assert headings(page)[:2] == ["The claims", "The model, plan by plan"]


def test_a_repair_is_a_figure_over_its_table(tmp_path):
    page = shown_pages.page(tmp_path, shown_pages.repaired()).read_text()
    drawn = data_of(page)["specs"]["refits"]["data"]["values"]
    assert [(row["kind"], row["layer"], row["left"]) for row in drawn][:2] == [
        ("attention", 5, 0.9),
        ("MLP", 5, 0.7),
    ]
    assert page.index('id="refits"') < page.index('id="table-refits"')
    assert data_of(page)["csv"]["refits"].count("\n") == 6


def test_a_folder_says_where_it_comes_from(page, tmp_path):
    terms = re.findall(r"<dt>(.*?)</dt>", page)
    assert terms[:2] == ["command", "date"]
    assert "not written down" in page
    assert "machine.cores" in terms
    assert dict(flatten({"a": {"b": 1, "c": {"d": "x"}}})) == {"a.b": "1", "a.c.d": "x"}


PARTS = {
    "sweep": ["map", "results", "savings", "similarity"],
    "compare": ["map", "results0", "results1", "results2", "savings"],
    "search": ["map"],
    "bench": ["map", "savings"],
    "repair": ["map", "refits"],
    "heal": ["healing", "map"],
    "eval": ["map"],
    "paper": ["map", "savings"],
    "pareto": ["pareto"],
}


@pytest.mark.parametrize("command", result_folders.WRITERS)
def test_each_command_s_folder_makes_a_page(tmp_path, command):
    folder = result_folders.WRITERS[command](tmp_path / command)
    page = write_report(folder, tmp_path / "r.html").read_text()
    data = data_of(page)
    assert list(data["specs"]) == PARTS[command]
    assert '<p id="said">' in page
    assert data["next"].startswith("notall ")
    assert len(page) < 3_000_000
    tables = set(re.findall(r'<table id="table-(.*?)"', page))
    assert tables <= data["csv"].keys()
    assert all(data["csv"][name].count("\n") > 1 for name in tables)


def test_a_folder_may_hold_what_several_commands_wrote(tmp_path):
    result_folders.write_search(tmp_path)
    result_folders.write(
        tmp_path, *result_folders.all_measured(), *result_folders.all_benched()
    )
    page = write_report(tmp_path, tmp_path / "r.html").read_text()
    assert [plan["name"] for plan in data_of(page)["plans"]] == [
        "search by kl: 2 attentions",
        "search by kl: 3 attentions",
    ]
    assert {"results", "results-2", "measured"} <= data_of(page)["csv"].keys()


# --- files of others
# --------------------------------------------------------------------------------------


def test_what_no_command_wrote_is_left_alone(tmp_path):
    folder = repair_folder(tmp_path)
    before = write_report(folder, tmp_path / "before.html").read_text()
    records_lines.append(
        folder / "mine.jsonl", {"provenance": "here", "value": 10**400}
    )
    assert write_report(folder, tmp_path / "after.html").read_text() == before


# --- comparisons of several
# --------------------------------------------------------------------------------------


BY_COMPARE = Provenance(
    what={"model": "tiny", "text_sha256": "t"}, where={"command": "notall compare tiny"}
)


def comparison_of(folder, *rows, about=BY_COMPARE):
    """A folder of what each criterion of `rows` loses without 2 attentions."""
    records = [
        result_folders.compared(criterion, "attention", 2, lost)
        for criterion, lost in rows
    ]
    result_folders.write(
        folder,
        *(
            one.model_copy(update={"provenance": about, "behind": 0.1})
            for one in records
        ),
    )
    return folder


def test_comparisons_of_several_folders_are_ranked_together(tmp_path):
    ours = comparison_of(tmp_path / "ours", ("cosine", 0.3), ("greedy", 0.1))
    theirs = comparison_of(tmp_path / "theirs", ("mine:good", 0.2))
    page = write_report(ours, tmp_path / "r.html", [theirs]).read_text()
    lines = list(csv.DictReader(io.StringIO(data_of(page)["csv"]["results"])))
    assert {row["criterion"]: row["folder"] for row in lines} == {
        "cosine": str(ours),
        "greedy": str(ours),
        "mine:good": str(theirs),
    }
    shown = re.findall(
        r"<tr.*?</tr>", markup(page).partition('id="table-results"')[2], re.S
    )
    criteria = [re.search("cosine|greedy|mine:good", line) for line in shown]
    assert [one[0] for one in criteria if one] == ["greedy", "mine:good", "cosine"]
    assert "behind" not in "".join(shown)
    assert "<bdi>folder</bdi>" in page
    told = {plan["name"]: plan["told"] for plan in data_of(page)["plans"]}
    assert f"notall reproduce {theirs} --row " in told["mine:good by kl: 2 attentions"]
    assert f"notall reproduce {ours} --row " in told["greedy by kl: 2 attentions"]


def test_a_criterion_of_two_folders_is_drawn_as_two(tmp_path):
    ours = comparison_of(tmp_path / "ours", ("cosine", 0.3), ("greedy", 0.1))
    theirs = comparison_of(tmp_path / "theirs", ("cosine", 0.2))
    points = comparison_points(
        joined([results_of(ours), results_of(theirs)]).of(ComparisonRecord)
    )
    assert [point.colour for point in points] == [
        f"cosine, {ours}",
        "greedy",
        f"cosine, {theirs}",
    ]
    assert [
        point.colour
        for point in comparison_points(results_of(ours).of(ComparisonRecord))
    ] == ["cosine", "greedy"]


def test_alone_a_comparison_has_no_column_of_folders(tmp_path):
    page = write_report(
        comparison_of(tmp_path / "ours", ("cosine", 0.3)), tmp_path / "r.html"
    ).read_text()
    assert "folder" not in data_of(page)["csv"]["results"]
    assert "<bdi>folder</bdi>" not in page


@pytest.mark.parametrize(
    ("what", "where", "says"),
    [
        (
            {"text_sha256": "other"},
            {},
            "ours and .*theirs differ in text_sha256: t and other$",
        ),
        ({"revision": "sha256:1"}, {}, "differ in revision: None and sha256:1$"),
        ({"model": "a folder that is called otherwise", "by": "kl 1"}, {}, None),
        (
            {},
            {"command": "notall sweep"},
            "theirs holds no results of notall compare, and only those are joined$",
        ),
    ],
)
def test_only_what_was_measured_alike_is_ranked_together(tmp_path, what, where, says):
    about = Provenance(
        what={**BY_COMPARE.what, **what}, where={**BY_COMPARE.where, **where}
    )
    ours = comparison_of(tmp_path / "ours", ("cosine", 0.3))
    theirs = comparison_of(tmp_path / "theirs", ("cosine", 0.2), about=about)
    if says is None:
        write_report(ours, tmp_path / "r.html", [theirs])
        return
    with pytest.raises(UsageError, match=says):
        write_report(ours, tmp_path / "r.html", [theirs])
    assert not (tmp_path / "r.html").exists()


def test_other_numbers_of_windows_are_not_ranked_together(tmp_path):
    ours = comparison_of(tmp_path / "ours", ("cosine", 0.3))
    (one,) = results_of(comparison_of(tmp_path / "some", ("cosine", 0.3))).files[
        "comparison"
    ]
    few = one.model_copy(
        update={"quality": one.quality.model_copy(update={"sequences": 3})}
    )
    with pytest.raises(UsageError, match=r"differ in sequences: \d+ and 3$"):
        write_report(
            ours, tmp_path / "r.html", [result_folders.write(tmp_path / "few", few)]
        )


def test_what_is_no_comparison_is_not_joined(tmp_path):
    ours = comparison_of(tmp_path / "ours", ("cosine", 0.3))
    with pytest.raises(UsageError, match="holds no results of notall compare"):
        write_report(ours, tmp_path / "r.html", [repair_folder(tmp_path)])
    begun = result_folders.write(
        tmp_path / "begun", *result_folders.evaluations(), about=BY_COMPARE
    )
    with pytest.raises(UsageError, match="begun holds no results of notall compare"):
        write_report(ours, tmp_path / "r.html", [begun])


# --- what it withstands
# --------------------------------------------------------------------------------------


def test_a_browser_reads_figures_of_what_is_very_large(tmp_path):
    found = tuple(
        PageStep(
            one.name,
            one.plan,
            one.quality.model_copy(update={"delta_nll": 1e308, "delta_nll_se": 1e308}),
            one.times,
        )
        for one in shown_pages.steps()
    )
    assert data_of(shown_pages.page(tmp_path, shown_pages.swept(found)).read_text())[
        "specs"
    ]


@pytest.mark.parametrize(
    "write",
    [
        shown_pages.nasty,
        lambda path: write_report(result_folders.write_nasty(path), path / "r.html"),
        lambda path: write_report(
            result_folders.write_nasty_comparison(path), path / "r.html"
        ),
    ],
)
def test_hostile_text_is_text(tmp_path, write):
    whole = write(tmp_path).read_text(encoding="utf-8")
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
        (
            {"healing": [{"record": "header", "of": "healing"}]},
            "line 1 of .*healing.jsonl: provenance",
        ),
        (
            {"bench": [{}]},
            (
                r"line 1 of .*bench.jsonl: record: None is no kind of ours; repair or"
                r" delete that line$"
            ),
        ),
        (
            {"answers": [{"record": "answers", "plans": []}]},
            "line 1 of .*answers.jsonl: answers",
        ),
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


def test_a_folder_of_folders_names_one_that_holds_results(tmp_path):
    repair_folder(tmp_path / "demo")
    with pytest.raises(UsageError, match=r"holds no results; .*demo does"):
        results_of(tmp_path)


def test_a_repair_that_was_killed_shows_what_is_refit(tmp_path):
    page = write_report(repair_folder(tmp_path), tmp_path / "r.html").read_text()
    assert list(data_of(page)["specs"]) == ["refits"]
    assert "What <bdi>tiny</bdi> can do without" in page  # as the first line says


def test_a_layer_that_no_model_has_is_refused(tmp_path):
    repair_folder(tmp_path)
    far = {
        "record": "refit",
        "sublayers": ["mlp.40000000"],
        "ridge": 0.3,
        "left": 0.5,
        "seconds": 0.1,
    }
    records_lines.append(tmp_path / "refits.jsonl", far)
    with pytest.raises(UsageError, match=r"line 7 of .*refits.jsonl: sublayers.0: "):
        write_report(tmp_path, tmp_path / "r.html")


# --- where it is written
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return repair_folder(tmp_path_factory.mktemp("results"))


def test_a_page_that_cannot_be_written_is_one_clear_line(folder):
    with pytest.raises(UsageError, match=r"cannot write .*choose another -o"):
        write_report(folder, folder / "refits.jsonl" / "report.html")


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_the_page_that_was_there_and_nothing_beside_it(
    folder, tmp_path
):
    path = write_report(folder, tmp_path / "report.html")
    whole = path.read_bytes()
    with (
        room_for(1000),
        pytest.raises(
            UsageError, match=r"cannot write .*File too large; choose another -o"
        ),
    ):
        write_report(folder, path)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(whole[:20_000])
    assert write_report(folder, path).read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "refits.jsonl",
            r"refits.jsonl is no name of a page: choose one that ends in .html",
        ),
        (
            "notes.html",
            r"notes.html is there, and is no page of notall: choose another -o",
        ),
    ],
)
def test_what_is_no_page_is_never_written_over(tmp_path, name, says):
    repair_folder(tmp_path)
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
