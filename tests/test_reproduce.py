"""A results folder is made again from its records alone: equal, within a tolerance,
differing, or refused.
"""

import json
import shlex
import sys
from pathlib import Path
from shutil import copytree

import pytest
import torch

from api import (
    MISSED,
    REPRODUCED_KINDS,
    cli,
    compare_module,
    methods,
    quality,
    read_folder,
    shown_comparison,
    speed,
)
from notall import Plan
from tiny_checkpoint import save_tiny_checkpoint

pytestmark = pytest.mark.any_transformers  # it compares runs on one release

ROOT = Path(__file__).parent.parent
MINE = """
def by_depth(setting):
    return {unit: abs(int(unit[0].partition(".")[2]) - 2) for unit in setting.space.units}

def halved(model, plan, batches, progress=None):
    from notall import RepairedPlan

    path = "model.layers.0.mlp.down_proj.weight"
    return RepairedPlan.of(plan, weights={path: model.get_parameter(path).detach() * 0.9})
"""
SIZE = "--sequences 4 --length 32 --batch-size 2 --dtype float32"
TIMED = "--prompt-tokens 4 --generation-tokens 2 --rounds 1"
MADE = {
    "compared": (
        "compare tiny --text a.txt --held-out b.txt --skip attention:1,2 --criterion"
        " cosine --criterion search --criterion mine:by_depth --repair refit --repair"
        f" mine:halved {SIZE} --out compared"
    ),
    "swept": f"sweep tiny --text a.txt {SIZE} {TIMED} --out swept",
    "measured": f"eval tiny --plan plan.json --text a.txt {SIZE} --out=measured",
    "timed": f"bench tiny --skip block:1 --dtype float32 {TIMED} -o timed",
    "chosen.search": (
        "search tiny --skip attention:2 --text a.txt --held-out b.txt --patience 1"
        f" {SIZE} -o chosen.json"
    ),
    "repaired": (
        f"repair tiny --plan plan.json --text a.txt --held-out b.txt {SIZE} --out"
        " repaired"
    ),
    "healed": (
        f"heal tiny --plan plan.json --text a.txt --tokens 64 {SIZE} --out healed".replace(
            "--sequences 4", ""
        )
    ),
    "drafted": (
        "draft tiny --plan plan.json --text a.txt --sequences 2 --prompt-tokens 4"
        " --generation-tokens 4 --most 2 --rounds 1 --dtype float32 --out drafted"
    ),
}
ROW = "mine:by_depth, refit: 2 attentions"
OWN = ("--functions", ".")  # `compared` names functions of mine.py


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, texts, a plan and a module, for results that are made when
    they are first asked for.
    """
    place = tmp_path_factory.mktemp("place")
    save_tiny_checkpoint(place / "tiny", num_hidden_layers=4)
    (place / "a.txt").write_text(
        "The quick brown fox jumps over the lazy dog, and a river runs to the sea. "
        * 40
    )
    (place / "b.txt").write_text(
        "A green bird sings under the old stone bridge while the winter light fades. "
        * 40
    )
    (place / "mine.py").write_text(MINE)
    Plan([1]).save(place / "plan.json")
    return place


def make(place, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.chdir(place)
        patch.setattr(sys, "argv", ["notall", *MADE[name].split()])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code
    sys.modules.pop("mine", None)


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """Go to a copy of it with these results, as a clone of a repository would be."""

    def go(*names):
        for name in names:
            if not (made / name).exists():
                make(made, name)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.chdir(copytree(made, tmp_path / "clone"))

    yield go
    sys.modules.pop("mine", None)


@pytest.fixture
def no_work(monkeypatch):
    """From this call on, whatever takes long fails."""

    def fail():
        for module, name in (
            *((compare_module, "compare_criteria"), (quality, "evaluate")),
            *((speed, "time_plans"), (methods, "repair_into")),
        ):
            monkeypatch.setattr(module, name, None)

    return fail


def rewritten(file, change):
    """Lines of a file with `change` made to each, without their digests."""
    lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
    for line in lines:
        line.pop("sealed", None)
        change(line)
    Path(file).write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def commanded(file, command):
    """Records of a file, as if this had been typed."""
    rewritten(file, lambda line: line["provenance"]["where"].update(command=command))


OFTEN = ("measured", "timed")


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=[pytest.mark.slow] * (one not in OFTEN)) for one in MADE],
)
def test_on_the_same_machine_each_record_is_equal_to_the_last_digit(
    place, answered, name
):
    place(name)
    found = answered("reproduce", name, *OWN, "--out", "again")
    assert {one["agreement"] for one in found["reproduced"]} == {"equal"}
    files = [Path(name) / kind.file for kind in REPRODUCED_KINDS]
    assert (
        len(found["reproduced"])
        == sum(len(file.read_text().splitlines()) for file in files if file.exists())
        > 0
    )
    assert ("not judged" in found["verdict"]) == (name in ("swept", "timed"))


@pytest.mark.slow
def test_which_draft_is_the_fastest_is_not_judged(place, answered):
    place("drafted")

    def change(line):
        line.setdefault("measured", {"median": 1.0, "low": 1.0, "high": 1.0, "n": 1})
        line.setdefault("same_texts", 0)

    rewritten("drafted/drafts.jsonl", change)
    found = answered("reproduce", "drafted", "--out", "again")["reproduced"]
    assert [one["agreement"] for one in found] == ["equal"] * 4


def test_what_was_made_again_can_be_made_again(place, answered):
    place("measured")
    answered("reproduce", "measured", "--out", "again")
    line = json.loads((Path("again") / "measured.jsonl").read_text().splitlines()[0])
    assert line["provenance"]["where"]["command"].startswith(
        "notall eval tiny --plan plan.json --text a.txt"
    )
    assert (
        answered("reproduce", "again", "--out", "third")["reproduced"][0]["agreement"]
        == "equal"
    )


@pytest.mark.parametrize(
    ("errors", "agreement"), [(0.4, "within tolerance"), (0.6, "differs")]
)
def test_a_figure_is_held_against_half_of_its_standard_error(
    place, run, errors, agreement
):
    place("measured")

    def change(line):
        line["quality"]["delta_nll"] += errors * line["quality"]["delta_nll_se"]

    rewritten("measured/measured.jsonl", change)
    code, out, _ = run("reproduce", "measured", "--out", "again", "--json")
    assert code == (MISSED if agreement == "differs" else 0)
    (one,) = json.loads(out)["reproduced"]
    assert (one["agreement"], one["differs_most"]) == (agreement, "delta_nll")
    assert one["recorded"] != one["made_again"]


@pytest.mark.parametrize(
    ("factor", "agreement"), [(1.049, "within tolerance"), (1.06, "differs")]
)
def test_a_figure_without_an_error_is_held_against_a_part_of_it(
    place, run, factor, agreement
):
    place("measured")
    rewritten(
        "measured/measured.jsonl",
        lambda line: line["quality"].update(
            perplexity=line["quality"]["perplexity"] * factor
        ),
    )
    code, out, _ = run("reproduce", "measured", "--out", "again", "--json")
    one = json.loads(out)["reproduced"][0]
    assert (code, one["agreement"], one["differs_most"]) == (
        MISSED if agreement == "differs" else 0,
        agreement,
        "perplexity",
    )


@pytest.mark.parametrize(
    ("factor", "agreement"), [(1.9, "within tolerance"), (2.1, "differs")]
)
def test_an_error_is_held_against_half_of_itself(place, run, factor, agreement):
    place("measured")
    rewritten(
        "measured/measured.jsonl",
        lambda line: line["quality"].update(kl_se=line["quality"]["kl_se"] * factor),
    )
    one = json.loads(run("reproduce", "measured", "--out", "again", "--json")[1])[
        "reproduced"
    ][0]
    assert (one["agreement"], one["differs_most"]) == (agreement, "kl_se")


@pytest.mark.slow
def test_another_plan_differs_and_a_record_that_is_not_made_again_is_told(place, run):
    place("compared")

    def change(line):
        if line["criterion"] == "cosine":
            line["plan"] = {
                "attention": [3] if line["plan"]["attention"] != [3] else [0],
                "mlp": [],
            }
        if line["criterion"] == "search" and line["count"] == 1:
            line["count"] = 3

    rewritten("compared/comparison.jsonl", change)
    code, out, _ = run("reproduce", "compared", *OWN, "--out", "again", "--json")
    assert code == MISSED
    found = json.loads(out)["reproduced"]
    by = {one["row"]: one for one in found}
    assert by["cosine: 1 attention"]["agreement"] == "differs"
    assert by["cosine: 1 attention"]["differs_most"] == "skipped"
    assert [
        one["agreement"]
        for one in found
        if one["row"].startswith("search") and ": 3 " in one["row"]
    ] == ["not made"] * 3
    code, out, _ = run(
        "reproduce", "compared", *OWN, "--out", "again"
    )  # which has all, and is read
    assert code == MISSED
    assert "3 not made" in " ".join(out.split())


def test_a_changed_digit_of_a_sealed_line_is_refused(place, run):
    place("measured")
    file = Path("measured/measured.jsonl")
    file.write_text(file.read_text().replace('"nll": ', '"nll": 1', 1))
    code, _, err = run("reproduce", "measured", "--out", "again")
    assert (code, err.count("\n")) == (2, 1)
    assert "was changed since it was written" in err


@pytest.mark.parametrize("name", ["compared", "measured"])
@pytest.mark.parametrize("changed", ["text", "weights"])
def test_another_text_or_model_is_refused_before_any_work(
    place, run, no_work, name, changed
):
    place(name)
    no_work()
    if changed == "text":
        Path("a.txt").write_text(Path("a.txt").read_text().replace("fox", "dog"))
    else:
        save_tiny_checkpoint(Path("tiny"), num_hidden_layers=4, rms_norm_eps=0.5)
    code, out, err = run("reproduce", name, *OWN, "--out", "again")
    assert (code, out) == (2, "")
    assert (
        f"{name} holds results with"
        f" {'text_sha256' if changed == 'text' else 'revision'}" in err
    )
    assert "give it as it was" in err
    assert not Path("again/comparison.jsonl").exists()


@pytest.mark.parametrize("name", ["measured", "timed", "repaired"])
def test_another_plan_file_is_refused_before_any_work(place, run, no_work, name):
    place(name)
    no_work()
    if name == "timed":
        commanded(
            "timed/bench.jsonl",
            f"notall bench tiny --plan plan.json --dtype float32 {TIMED} --out timed",
        )
    Plan([2]).save("plan.json")
    code, out, err = run("reproduce", name, *OWN, "--out", "again")
    assert (code, out) == (2, "")
    assert (
        f"plan.json skips attention 2, and {name} holds records of another plan" in err
    )


@pytest.mark.slow
def test_weights_that_the_run_fits_are_judged_by_their_figures(place, answered):
    """Another processor fits others, by their last digits."""
    place("repaired")

    def change(line):
        if line["model"] == "repaired":
            line["provenance"]["what"]["weights"] = "0" * 16

    rewritten("repaired/measured.jsonl", change)
    found = answered("reproduce", "repaired", "--out", "again")["reproduced"]
    assert [one["agreement"] for one in found] == ["equal"] * 2


def test_another_function_is_refused(place, run):
    place("compared")
    Path("mine.py").write_text(MINE.replace("- 2", "- 3"))
    code, _, err = run(
        "reproduce",
        "compared",
        "--row",
        "mine:by_depth: 1 attention",
        *OWN,
        "--out",
        "again",
    )
    assert code == 2
    assert "mine.py is not the file that mine:by_depth was recorded with" in err


def test_a_row_of_a_comparison_is_made_alone(place, answered):
    place("compared")
    (found,) = answered("reproduce", "compared", "--row", ROW, *OWN, "--out", "again")[
        "reproduced"
    ]
    assert (found["row"], found["agreement"]) == (ROW, "equal")
    lines = [
        json.loads(line)
        for line in Path("again/comparison.jsonl").read_text().splitlines()
    ]
    assert {
        (line["criterion"], line["count"], line.get("repair", "none")) for line in lines
    } == {
        ("mine:by_depth", 2, "none"),
        ("mine:by_depth", 2, "refit"),
    }
    (other,) = answered(
        "reproduce",
        "compared",
        "--row",
        "search by kl, mine:halved: 1",
        *OWN,
        "--out",
        "again",
    )["reproduced"]
    assert other["agreement"] == "equal"


@pytest.mark.slow
def test_several_rows_are_those_that_begin_with_these_words(place, answered):
    place("compared")
    found = answered(
        "reproduce", "compared", "--row", "cosine", *OWN, "--out", "again"
    )["reproduced"]
    assert len(found) == 2 * 3
    assert {one["agreement"] for one in found} == {"equal"}


def test_with_another_number_of_threads_it_is_within_the_tolerance(place, answered):
    place("measured")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        found = answered("reproduce", "measured", "--out", "again")["reproduced"]
    finally:
        torch.set_num_threads(before)
    assert {one["agreement"] for one in found} <= {"equal", "within tolerance"}


def test_files_that_are_elsewhere_are_named(place, run, answered, tmp_path):
    place("measured")
    Path("a.txt").rename(tmp_path / "a.txt")
    code, _, err = run("reproduce", "measured", "--out", "again")
    assert code == 2
    assert "cannot read the text a.txt" in err
    assert err.startswith(
        "making again: notall eval tiny --plan plan.json --text a.txt"
    )
    assert err.endswith("; --replace WORD=OTHER changes a word of that command\n")
    found = answered(
        "reproduce",
        "measured",
        "--replace",
        f"a.txt={tmp_path / 'a.txt'}",
        "--out",
        "again",
    )
    assert found["reproduced"][0]["agreement"] == "equal"


def test_a_dtype_that_suits_another_machine_is_that_of_the_records(place, run):
    place("measured")

    def change(line):
        line["provenance"]["what"]["dtype"] = "bfloat16"
        line["provenance"]["where"]["command"] = line["provenance"]["where"][
            "command"
        ].replace("--dtype float32", "")

    rewritten("measured/measured.jsonl", change)
    _, _, err = run("reproduce", "measured", "--out", "again")
    assert "--dtype bfloat16" in err.splitlines()[0]


def test_what_can_not_be_tried_is_one_line(place, run, no_work):
    place("measured", "compared")
    no_work()
    unsafe = {
        "--trust-remote-code": "which no record may ask for",
        "--ray": "what no record may ask for (No such option: --ray",
        "--task-path=tasks": "made with --task-path, which no record may ask for",
    }
    cases = {
        ("measured", "--out", "measured"): "choose another folder (--out)",
        ("absent", "--out", "again"): "absent has no records to make again",
        (
            "compared",
            "--row",
            "fisher",
            "--out",
            "again",
        ): "compared has no row fisher to make again",
        ("measured", "--row", "cosine", "--out", "again"): "measured has no row cosine",
        (
            "measured",
            "--replace",
            "a.txt",
            "--out",
            "again",
        ): "write wiki.txt=data/wiki.txt",
        (
            ROOT / "benchmarks" / "comparison",
            "--out",
            "again",
        ): "give a folder of notall compare, notall sweep",
        (
            ROOT / "benchmarks" / "paper",
            "--out",
            "again",
        ): "was made by notall paper smollm2: give a folder of",
    }
    for words, says in cases.items():
        code, out, err = run("reproduce", *words)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert says in err
    for word, says in unsafe.items():
        commanded("measured/measured.jsonl", f"notall eval tiny {word}")
        code, _, err = run("reproduce", "measured", "--out", "again")
        assert (code, err.count("\n")) == (2, 1)
        assert says in err
    assert not Path("again").exists()


@pytest.mark.slow
def test_a_table_has_all_rows_and_of_similarities_those_that_differ(place, run):
    place("swept")

    def change(line):
        if (line["layer"], line["kind"]) == (2, "mlp"):
            line["cosine"] += 1

    rewritten("swept/similarity.jsonl", change)
    code, out, err = run("reproduce", "swept", "--out", "again")
    assert code == MISSED
    assert err.startswith("making again: notall sweep tiny --text a.txt")
    assert "similarity 2 mlp" in out
    assert "similarity 1 mlp" not in out
    assert "attention 25%" in out
    assert "1 differs" in " ".join(out.split())


@pytest.mark.slow
def test_the_page_of_a_comparison_has_the_command_of_each_row(place, run):
    place("compared")
    steps = shown_comparison(read_folder(Path("compared"))).steps
    commands = {
        step.name: shlex.split(step.description.partition("Reproduce with: notall ")[2])
        for step in steps
    }
    assert len(commands) == 2 * 3 * 3
    for name in (ROW, "search by kl, mine:halved: 1 attention"):
        code, out, _ = run(*commands[name], *OWN)
        assert code == 0
        assert name in out
        assert "1 equal" in " ".join(out.split())
