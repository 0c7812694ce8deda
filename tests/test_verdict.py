"""What a plan comes to in words, and when a model counts as no longer usable."""

import json
import math
import shlex
import sys

import pytest

from api import Verdict, cli, conclude, footprint, in_bytes, left_out_of, mending, next_command
from api import speed_Spread as Spread
from families import family
from notall import Plan
from test_cli import QUICK, folder, run  # noqa: F401

pytestmark = pytest.mark.any_transformers  # it says what was measured

PLAN = Plan([1, 3], [2])


@pytest.fixture(scope="module")
def left_out():
    return left_out_of(family("llama").build(num_hidden_layers=6), PLAN)


def quality(nats=0.36, agreement=0.66):
    return {"delta_nll": nats, "delta_nll_se": 0.01, "top1_agreement": agreement}


def test_it_says_what_is_left_out_what_that_costs_and_what_it_brings(left_out):
    model = family("llama").build(num_hidden_layers=6)
    dense, left = footprint(model, Plan()), footprint(model, PLAN)
    (line,) = Verdict(*left_out, quality(), "book.txt", Spread(1.3, 1.28, 1.32, 4)).lines()
    smaller = 1 - left.weight_bytes / dense.weight_bytes
    assert line == (
        "Without 2 of 6 attentions and 1 of 6 MLPs: +0.360 ± 0.010 nats a token (perplexity × 1.43) on book.txt; "
        "66% of the first choices are the same; 1.30 ± 0.02 times as fast; "
        f"weights {smaller:.0%} smaller ({in_bytes(left.weight_bytes)}); "
        f"KV cache 33% smaller ({in_bytes(left.kv_bytes_per_token)} a token)."
    )
    for error in (None, math.nan):  # of one window alone
        (line,) = Verdict(*left_out, quality() | {"delta_nll_se": error}, "book.txt").lines()
        assert "MLPs: +0.360 nats a token (perplexity" in line
    (line,) = Verdict(*left_out_of(model, Plan(mlp=[0]))).lines()
    assert line.startswith("Without 1 of 6 MLPs: what that costs was not measured on other text: give --held-out; ")
    assert line.endswith("; the same KV cache.")


@pytest.mark.parametrize(
    ("nats", "agreement", "says"),
    [
        (math.log(2) - 1e-6, 0.5, None),
        (math.log(2) + 1e-6, 0.5, "perplexity has more than doubled"),
        (-0.1, 0.499, "over half of its first choices have changed"),
        (None, 0.9, "perplexity has more than doubled"),
        (math.nan, 0.1, "perplexity has more than doubled and over half of its first choices have changed"),
    ],
)
def test_a_model_that_is_of_no_use_is_said_to_be_so(left_out, nats, agreement, says):
    verdict = Verdict(*left_out, quality(nats, agreement), "book.txt")
    warnings = [line for line in verdict.lines() if line.startswith("Warning")]
    assert warnings == ([f"Warning: the model is no longer usable: {says}."] if says else [])
    assert verdict.usable == (says is None)
    json.dumps(verdict.row(), allow_nan=False)


def test_the_next_command_makes_up_for_what_is_of_no_use(left_out):
    fine, bad = (Verdict(*left_out, quality(nats), "x") for nats in (0.1, 3.0))
    assert fine.then("mend", "go on").next == "go on"
    assert bad.then("mend", "go on").next == "mend"
    assert Verdict(*left_out).then("mend", "go on").next == "go on"
    assert mending("m", "my p.json", False) == "notall repair m --plan 'my p.json' --out repaired"
    assert mending("m", "r", True) == "notall heal m --plan r --out healed"
    assert (
        next_command("eval", "m", **{"keep-last": True, "fraction": 0.5}) == "notall eval m --keep-last --fraction 0.5"
    )


@pytest.mark.parametrize("as_json", [False, True])
def test_what_missed_a_budget_leaves_with_3_and_a_word(left_out, capsys, as_json):
    with pytest.raises(cli.typer.Exit) as leaving:
        conclude(Verdict(*left_out, quality(), "x", missed="1.3x: 1.16 is what was reached"), as_json=as_json)
    assert leaving.value.exit_code == 3
    out, err = capsys.readouterr()
    assert "issed 1.3x: 1.16 is what was reached" in (err if as_json else out)
    conclude(Verdict(*left_out, quality(), "x"), as_json=as_json)
    assert bool(capsys.readouterr().out) != as_json


def type_next(command, monkeypatch, *more):
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), *more])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    return leaving.value.code or 0


def test_search_and_eval_end_with_a_verdict_on_text_that_was_not_chosen_by(run, folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(300))))
    search = ["search", folder, "--count", "1", "--text", "text.txt", *QUICK]
    code, out, err = run(*search)
    assert (code, err) == (0, "")
    assert "nats a token" in out
    assert "on other windows of text.txt; " in out
    verdict = json.loads(run(*search, "--json")[1])[0]["verdict"]
    assert verdict["said"] in " ".join(out.split())
    (tmp_path / "short.txt").write_text("0123456789" * 4)  # two windows and a half
    verdict = json.loads(run(*search[:-6], *QUICK[:-2], "--text", "short.txt", "-o", "s.json", "--json")[1])[0][
        "verdict"
    ]
    assert (verdict["text"], verdict["delta_nll"], verdict["usable"]) == (None, None, None)
    code, out, err = run("eval", folder, "--plan", "plan.json", "--text", "text.txt", *QUICK, "--json")
    found = json.loads(out)
    told = "note: the plan was chosen by text.txt, where it looks better than it is; measure on another --text\n"
    assert (code, err) == (0, told)
    assert found["verdict"]["delta_nll"] == found["quality"][1]["delta_nll"]
    assert found["verdict"]["text"] == "text.txt"
    fast = ["--prompt", "4", "--new", "2", "--rounds", "1"] if " bench " in found["verdict"]["next"] else []
    if fast:
        assert type_next(found["verdict"]["next"], monkeypatch, *fast) == 0


def test_a_plan_that_skips_nothing_and_a_search_cut_short_are_told():
    model = family("llama").build(num_hidden_layers=6)
    (line,) = Verdict(*left_out_of(model, Plan()), quality(0.0, 1.0), "book.txt").lines()
    assert line == "Nothing is left out: this is the dense model."
    *_, line = Verdict(*left_out_of(model, PLAN), late=True).lines()
    assert line == "The time was up before the search was done: with more --max-minutes it may find better."


def test_after_a_search_that_left_out_nothing_comes_one_that_asks_for_less(run, folder, tmp_path, short_prose):  # noqa: F811
    none = ["search", folder, "--max-nll", "0", "--max-minutes", "0", "-o", tmp_path / "none.json", *QUICK, "--json"]
    verdict = json.loads(run(*none)[1])[0]["verdict"]
    assert verdict["said"].startswith("Nothing is left out: this is the dense model. The time was up ")
    asked = shlex.split(verdict["next"])
    assert asked[1:3] == ["search", str(folder)]
    assert asked[asked.index("--max-nll") + 1] == "0.1"
    written = ["export", folder, "--plan", tmp_path / "none.json", "--to", "hf", "--out", tmp_path / "e", "--repair"]
    assert "note: the plan skips nothing, so " in run(*written, "--no-verify")[2]


def test_the_command_after_a_search_repairs_with_the_text_that_it_went_by(run, folder, tmp_path, short_prose):  # noqa: F811
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(300))))
    for text, words in ((tmp_path / "text.txt", ["--repair-text", str(tmp_path / "text.txt")]), ("prose", [])):
        out = tmp_path / f"{len(words)}.json"
        mild = ["search", folder, "--kind", "mlp", "--count", "1", "--text", text, "-o", out, *QUICK, "--json"]
        command = shlex.split(json.loads(run(*mild)[1])[0]["verdict"]["next"])
        if "export" in command:
            assert ("--repair-text" in command) == bool(words)
            assert command[command.index("--repair") + 1 :][: len(words)] == words


def test_an_export_that_repairs_says_what_the_plan_costs_before_and_after(run, folder, tmp_path, short_prose):  # noqa: F811
    Plan([1], [1]).save(tmp_path / "plan.json")
    command = ["export", folder, "--plan", tmp_path / "plan.json", "--to", "hf", "--no-verify", "--repair"]
    code, out, _ = run(*command, "--repair-sequences", "4", "--out", tmp_path / "e", "--json")
    assert code == 0
    rows = json.loads(out)["quality"]
    assert [row["model"] for row in rows] == ["skipped", "repaired"]
    assert {row["text"] for row in rows} == {"prose, other windows"}
    assert len({row["delta_nll"] for row in rows}) == 2


def test_export_says_what_it_measured(run, folder, tmp_path, short_prose):  # noqa: F811
    Plan([1], [1]).save(tmp_path / "plan.json")
    command = ["export", folder, "--plan", tmp_path / "plan.json", "--to", "hf", "--no-verify", "--measure", "prose"]
    code, out, _ = run(*command, "--out", tmp_path / "a")
    assert code == 0
    assert "Without 1 of 6 attentions and 1 of 6 MLPs: " in out
    assert "nats per token" in (tmp_path / "a" / "README.md").read_text()
    found = json.loads(run(*command, "--out", tmp_path / "b", "--json")[1])
    assert found["verdict"]["text"] == "prose"
    assert "config.json" in {row["file"] for row in found["files"]}
