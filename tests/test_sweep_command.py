"""notall sweep and compare: tables and figures of many plans, and what they refuse."""

import csv
import json

import pytest

from api import TIMED_ONCE, ComparisonRecord, SweepRecord, read
from command_line import QUICK, TIMED

pytestmark = [
    pytest.mark.usefixtures("short_prose"),
    # of tables, figures and pages; what skipping does is the same on both
    pytest.mark.any_transformers,
]


def test_sweep_writes_results_and_figures_and_prints_the_table(run, folder, tmp_path):
    out = tmp_path / "r"
    code, shown, err = run("sweep", folder, "--out", out, *QUICK, *TIMED)
    assert (code, err) == (0, "")
    records = read(out / "results.jsonl", SweepRecord)
    variants = ["dense", *["attention"] * 6, *["mlp"] * 6, *["block"] * 6]
    assert [one.variant for one in records] == variants
    for figure in ("similarity", "tradeoff"):
        for suffix in ("png", "svg", "html"):
            assert (out / f"{figure}.{suffix}").stat().st_size > 1000
    with open(out / "table.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["variant"] for row in table] == variants
    assert [float(row["delta_nll"]) for row in table] == [
        one.quality.delta_nll for one in records
    ]
    markdown = (out / "table.md").read_text(encoding="utf-8")
    assert (
        "tiny without its deepest attentions, MLPs or blocks, beside the original model"
        in markdown
    )
    assert sum(line.startswith("| ") for line in markdown.splitlines()) == 19 + 2
    latex = (out / "table.tex").read_text(encoding="utf-8")
    assert latex.count(" \\\\\n") == 19 + 1
    assert f"{records[1].quality.delta_nll:.3f} $\\pm$" in latex.replace("$-$", "-")
    rows = [
        line.split("│")[1].split()[0]
        for line in shown.splitlines()
        if line.startswith("│")
    ]
    assert rows == ["dense", *["attention"] * 6, *["MLP"] * 6, *["block"] * 6]
    about = records[0].provenance
    assert {"model", "revision", "text", "text_sha256", "dtype", "seed"} <= set(
        about.what
    )
    assert {"device", "threads", "versions", "machine", "command", "date"} == set(
        about.where
    )
    assert about.where["command"].startswith("notall sweep ")
    assert str(folder.parent) not in (out / "results.jsonl").read_text()
    for name, lines in (("similarity", 18), ("samples", 4), ("leave_one_out", 12)):
        assert (out / f"{name}.jsonl").read_text().count("\n") == lines
    code, shown, err = run("report", out, "-o", tmp_path / "report.html")
    assert (code, err) == (0, "")
    assert str(tmp_path / "report.html") in shown
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The capital of France is" in page
    printed = json.loads(
        run("sweep", folder, "--out", out, *QUICK, *TIMED, "--json")[1]
    )["results"]
    assert [
        SweepRecord.model_validate_json(json.dumps(one)) for one in printed
    ] == records


@pytest.mark.slow
def test_compare_writes_results_a_table_and_a_figure(run, folder, tmp_path):
    out = tmp_path / "c"
    command = [
        "compare",
        folder,
        "--skip",
        "attention:1,2",
        "--skip",
        "portable:2",
        "--criterion",
        "cosine",
    ]
    command += [
        "--criterion",
        "search",
        "--objective",
        "nll",
        "--objective",
        "kl",
        "-o",
        out,
        *QUICK,
    ]
    code, shown, err = run(*command, *TIMED, "--json")
    assert (code, err) == (0, "")
    assert len(json.loads(shown)["comparison"]) == 9
    records = read(out / "comparison.jsonl", ComparisonRecord)
    assert len(records) == 9
    assert str(tmp_path) not in (out / "comparison.jsonl").read_text()
    assert (out / "table.md").read_text().count("###") == 3
    assert TIMED_ONCE in (out / "table.md").read_text()
    assert (out / "front.png").stat().st_size > 1000
    code, shown, _ = run(*command)
    assert (code, "Plans that leave equal" in shown) == (
        0,
        False,
    )  # no times, nothing to say of them
    assert TIMED_ONCE not in (out / "table.md").read_text()
    _, shown, _ = run(*command, *TIMED)
    assert TIMED_ONCE in shown
    code, _, err = run("report", out, "-o", tmp_path / "report.html")
    assert (code, err) == (0, "")
    assert "search by nll: 2 portable sublayers" in (
        tmp_path / "report.html"
    ).read_text(encoding="utf-8")


def test_compare_refuses_in_one_line(run, folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(map(str, range(300))))
    for says, options in {
        "--skip 'heads' is nothing to choose among": ["--skip", "heads:3"],
        "--skip attention:² is no kind and number": ["--skip", "attention:²"],
        "--skip attention:4,,8 is no kind and number": ["--skip", "attention:4,,8"],
        "--skip attention:999": ["--skip", "attention:" + "9" * 5000],
        "is no kind and counts: write attention:4,8": ["--skip", "attention:0.5"],
        "--skip attention is no kind and counts": ["--skip", "attention"],
        "no criterion": ["--criterion", "luck"],
        "no repair": ["--repair", "luck"],
        "at most": ["--skip", "attention:6"],
        "tokens": ["--skip", "attention:2", "--sequences", "9999999"],
    }.items():
        code, _, err = run(
            "compare", folder, "-o", tmp_path / "c", *QUICK, *options, "--text", text
        )
        assert code == 2, says
        assert says in err
        assert err.count("\n") == 1
        assert len(err) < 300
