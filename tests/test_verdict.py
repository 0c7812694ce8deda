"""What a plan comes to in words, and when a model counts as no longer usable."""

import json
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from gguf import GGMLQuantizationType as Kind

from api import (
    Message,
    Quality,
    Quartiles,
    Verdict,
    cli,
    conclude,
    fastest,
    footprint,
    in_bytes,
    mending,
    mildest,
    next_command,
    read_gguf,
    what_next,
)
from command_line import FAST, QUICK
from families import family
from notall import Plan
from tiny_gguf import WORDS, write_gguf as write_tiny

pytestmark = pytest.mark.any_transformers  # it says what was measured

PLAN = Plan([1, 3], [2])


@pytest.fixture(scope="module")
def model():
    return family("llama").build(num_hidden_layers=6)


def quality(nats=0.36, agreement=0.66, error=0.01):
    figures = dict.fromkeys(Quality.model_fields, 0.0) | {
        "sequences": 8,
        "delta_nll_se": error,
    }
    return Quality(**figures | {"delta_nll": nats, "top1_agreement": agreement})


def test_it_says_what_is_left_out_what_that_costs_and_what_it_brings(model):
    dense, left = footprint(model, Plan()), footprint(model, PLAN)
    timed = Quartiles(median=1.3, low=1.28, high=1.32, n=4)
    (line,) = replace(
        Verdict.on(model, PLAN, quality(), "book.txt"), speedup=timed
    ).lines()
    smaller = 1 - left.weight_bytes / dense.weight_bytes
    assert (
        line == "Without 2 of 6 attentions and 1 of 6 MLPs: +0.36 ± 0.01 nats a token"
        " (perplexity × 1.43) on book.txt; top-1 agreement 66%;"
        f" decodes 1.30× as fast (quartiles 1.28 to 1.32); weights {smaller:.0%}"
        f" smaller ({in_bytes(left.weight_bytes)}); KV cache 33% smaller"
        f" ({in_bytes(left.kv_bytes_per_token)} a token)."
    )
    (line,) = Verdict.on(
        model, PLAN, quality(error=None), "book.txt"
    ).lines()  # of one window alone
    assert "MLPs: +0.36 nats a token (perplexity" in line
    (line,) = Verdict.on(model, Plan(mlp=[0])).lines()
    assert line.startswith("Without 1 of 6 MLPs: what that costs was not measured; ")
    assert line.endswith("; the same KV cache.")


@pytest.mark.parametrize(
    ("nats", "agreement", "says"),
    [
        (math.log(2) - 1e-6, 0.5, None),
        (math.log(2) + 1e-6, 0.5, "perplexity has more than doubled"),
        (-0.1, 0.499, "top-1 agreement is below one half"),
        (None, 0.9, "perplexity has more than doubled"),
        (0.1, None, "top-1 agreement is below one half"),
        (
            math.nan,
            0.1,
            ("perplexity has more than doubled and top-1 agreement is below one half"),
        ),
    ],
)
def test_a_model_that_is_of_no_use_is_said_to_be_so(model, nats, agreement, says):
    verdict = Verdict.on(model, PLAN, quality(nats, agreement), "book.txt")
    warnings = [line for line in verdict.lines() if line.startswith("Warning")]
    assert warnings == (
        [f"Warning: the model is no longer usable: {says}."] if says else []
    )
    assert verdict.usable == verdict.in_numbers()["usable"] == (says is None)


def test_a_verdict_on_a_gguf_file_has_the_sizes_of_its_types_too(tmp_path):
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 16,
    }
    net = family("llama").build(**sizes)
    file = read_gguf(write_tiny(net, tmp_path / "m.gguf", kind=Kind.Q8_0))
    verdict = Verdict.on(
        net, Plan([1], [1]), quality(0.1), "book.txt", spec=str(file.path)
    )
    whole = sum(tensor.size for tensor in file.tensors.values())
    left = whole - sum(tensor.size for tensor in file.block(1).values())
    assert verdict.in_numbers()["file_bytes"] == {"dense": whole, "skipped": left}
    assert f"unpacked, {in_bytes(left)} in the file's types)" in verdict.sentence
    assert "file_bytes" not in Verdict.on(net, Plan([1], [1])).in_numbers()


def test_a_verdict_for_programs_has_what_was_said_in_numbers(model):
    dense, left = footprint(model, Plan()), footprint(model, PLAN)
    told = Verdict.on(model, PLAN, quality(), "book.txt").in_numbers()
    assert (told["text"], told["delta_nll"], told["top1_agreement"]) == (
        "book.txt",
        0.36,
        0.66,
    )
    assert told["perplexity_factor"] == math.exp(0.36)
    for kind in ("weight_bytes", "kv_bytes_per_token"):
        assert told[kind] == {
            "dense": getattr(dense, kind),
            "skipped": getattr(left, kind),
        }
    unknown = json.loads(
        json.dumps(Verdict.on(model, PLAN).in_numbers(), allow_nan=False)
    )
    assert {name for name, value in unknown.items() if value is None} == {
        *(
            "usable",
            "missed",
            "text",
            "delta_nll",
            "perplexity_factor",
            "top1_agreement",
            "speedup",
        ),
    }
    overflown = Verdict.on(model, PLAN, quality(None), "book.txt").in_numbers()
    assert (
        overflown["delta_nll"],
        overflown["perplexity_factor"],
        overflown["usable"],
    ) == (None, None, False)


def test_the_next_command_makes_up_for_what_is_of_no_use(model):
    fine, bad = (Verdict.on(model, PLAN, quality(nats), "x") for nats in (0.1, 3.0))
    assert fine.then("mend", "go on").next == "go on"
    assert bad.then("mend", "go on").next == "mend"
    assert Verdict.on(model, PLAN).then("mend", "go on").next == "go on"
    assert (
        mending("m", "my p.json", False)
        == "notall repair m --plan 'my p.json' --out repaired"
    )
    assert mending("m", "r", True) == "notall heal m --plan r --out healed"
    assert (
        next_command("eval", "m", keep_last=True, skip="mlp:0.5", plan=None)
        == "notall eval m --keep-last --skip mlp:0.5"
    )


@pytest.mark.parametrize("as_json", [False, True])
def test_what_missed_a_budget_leaves_with_3_and_a_word(model, capsys, as_json):
    met = Verdict.on(model, PLAN, quality(), "x")
    missed = replace(met, missed="1.3x: 1.16 is what was reached")
    with pytest.raises(typer.Exit) as leaving:
        conclude(missed, as_json=as_json)
    assert leaving.value.exit_code == 3
    out, err = capsys.readouterr()
    assert "issed 1.3x: 1.16 is what was reached" in (err if as_json else out)
    conclude(met, as_json=as_json)
    assert bool(capsys.readouterr().out) != as_json


def test_a_plan_that_skips_nothing_and_a_search_cut_short_are_told(model):
    (line,) = Verdict.on(model, Plan(), quality(0.0, 1.0), "book.txt").lines()
    assert line == "Nothing is left out: this is the original model."
    *_, line = replace(Verdict.on(model, PLAN), late=True).lines()
    assert (
        line
        == "The time was up before the search was done: with more --max-minutes it may"
        " find better."
    )


# --- which of several
# --------------------------------------------------------------------------------------


def candidate(number, nats, median=None, spread=0.0, size=100):
    speedup = (
        Quartiles(median=median, low=median - spread, high=median + spread, n=5)
        if median
        else None
    )
    times = speedup and SimpleNamespace(speedup_decode=speedup)
    return SimpleNamespace(
        plan=Plan([number]),
        quality=quality(nats),
        times=times,
        footprint=SimpleNamespace(weight_bytes=size),
    )


def test_of_those_that_may_be_as_fast_as_the_fastest_the_one_that_loses_least_is_taken():
    slow, near, fast = (
        candidate(0, 0.1, 1.1),
        candidate(1, 0.2, 1.28),
        candidate(2, 0.3, 1.3, spread=0.05),
    )
    unusable = candidate(3, 2.0, 2.0)
    assert fastest([slow, near, fast, unusable]) is near
    assert fastest([slow, fast, unusable]) is fast
    assert fastest([unusable]) is None
    assert mildest([unusable, fast, slow]) is slow
    assert mildest([candidate(4, None)]) is None


def test_where_nothing_was_timed_the_smallest_is_taken_and_then_the_best():
    large, small, worse = (
        candidate(0, 0.1, size=90),
        candidate(1, 0.2, size=80),
        candidate(2, 0.3, size=80),
    )
    assert fastest([large, small, worse]) is small
    small.plan = large.plan = worse.plan = Plan()
    assert fastest([large, small, worse]) is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "Without 2 attentions and 1 MLP, tiny: what that costs was not measured."),
        (
            {"quality": quality(3.0), "layers": 6},
            "MLP of its 6 layers, tiny: +3.00 ± 0.01 nats a token (perplexity × 20.1",
        ),
        (
            {
                "quality": quality(),
                "text": "a",
                "also": {"b": quality(0.05, agreement=0.9)},
            },
            (
                "tiny: +0.36 ± 0.01 nats a token (perplexity × 1.43) on a; top-1 agreement 66%; +0.05 ± 0.01 nats a token (perplexity ×"
                " 1.05) on b; top-1 agreement 90%."
            ),
        ),
        (
            {"quality": quality(), "also": {"b": quality(3.0)}},
            "usable: perplexity has more than doubled.",
        ),
        (
            {"quality": quality(3.0)},
            "Warning: the model is no longer usable: perplexity has more than doubled.",
        ),
        (
            {"quality": quality(), "state": "healed"},
            "MLP, the healed tiny: +0.36 ± 0.01 nats a token",
        ),
        ({"quality": quality(error=0.001)}, "tiny: +0.360 ± 0.001 nats a token"),
        (
            {"quality": quality(agreement=math.nan)},
            "(perplexity × 1.43). Warning: the model is no longer usable: top-1 agreement",
        ),
        (
            {
                "quality": quality(),
                "speedup": Quartiles(median=1.2, low=1.1, high=1.3, n=5),
                "verb": "runs",
            },
            ("top-1 agreement 66%; runs 1.20× as fast (quartiles 1.10 to 1.30)."),
        ),
        (
            {
                "quality": quality(),
                "speedup": Quartiles(median=1.2, low=1.2, high=1.2, n=1),
                "verb": "runs",
            },
            "runs 1.20× as fast (of one round, which has no spread).",
        ),
    ],
)
def test_on_a_page_a_verdict_names_the_model(given, says):
    verdict = Verdict(PLAN, model="tiny", **given)
    message = Message.of(verdict, "go on", "notall x")
    assert says in message.sentence
    assert message.usable == Verdict(PLAN, **given).usable


@pytest.mark.parametrize(
    ("nats", "state", "command"),
    [
        (None, "skipped", "eval m --plan p.json"),
        (
            0.1,
            "skipped",
            (
                "export m --plan p.json --repair refit --repair-text a.txt --to hf"
                " --out p-pruned"
            ),
        ),
        (0.1, "healed", "export m --plan p.json --to hf --out p-pruned"),
        (3.0, "skipped", "repair m --plan p.json --out repaired"),
        (3.0, "repaired", "heal m --plan p.json --out healed"),
        (3.0, "healed", "search m --max-nll 0.1 --out plan.json"),
    ],
)
def test_what_comes_next_goes_by_what_the_plan_costs_and_what_was_done_about_it(
    nats, state, command
):
    verdict = Verdict(PLAN, None if nats is None else quality(nats), state=state)
    assert what_next(verdict, "m", Path("p.json"), "a.txt")[1] == f"notall {command}"


@pytest.mark.parametrize("state", ["skipped", "repaired", "healed"])
def test_of_a_gguf_file_the_next_export_is_one_too(state):
    """transformers has no checkpoint of it: `hf` would be a copy in 16 bits."""
    verdict = Verdict(PLAN, quality(0.1), state=state)
    for model, form in (
        ("a b/m.Q4_K_M.gguf", "gguf"),
        ("smollm2", "hf"),
        ("gguf", "hf"),
    ):
        command = shlex.split(what_next(verdict, model, Path("p.json"))[1])
        assert command[:3] == ["notall", "export", model]
        assert command[command.index("--to") + 1] == form


# --- how commands end
# --------------------------------------------------------------------------------------


def verdict_in(shown):
    return json.loads(shown)["verdict"]


def type_next(command, monkeypatch, *more):
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), *more])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    return leaving.value.code or 0


def test_search_and_eval_end_with_a_verdict_on_text_that_was_not_chosen_by(
    run, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(300))))
    search = ["search", folder, "--skip", "sublayer:1", *QUICK, "--text"]
    code, out, err = run(*search, "text.txt")
    assert (code, err) == (0, "")
    assert "nats a token" in out
    assert "on other windows of text.txt; " in out
    assert verdict_in(run(*search, "text.txt", "--json")[1])["said"] in " ".join(
        out.split()
    )
    (tmp_path / "short.txt").write_text("0123456789" * 4)  # two windows and a half
    verdict = verdict_in(run(*search, "short.txt", "-o", "s.json", "--json")[1])
    assert (verdict["text"], verdict["delta_nll"], verdict["usable"]) == (
        None,
        None,
        None,
    )
    code, out, err = run(
        "eval", folder, "--plan", "plan.json", "--text", "text.txt", *QUICK, "--json"
    )
    assert (code, err) == (
        0,
        "",
    )  # on windows of it that it was not chosen by: test_apart.py
    said = json.loads(Path("plan.search/chosen.jsonl").read_text().splitlines()[-1])
    del (
        said["sealed"],
        said["provenance"]["what"]["length"],
    )  # of a record that lacks what tells the windows
    Path("plan.search/chosen.jsonl").write_text(f"{json.dumps(said)}\n")
    note = (
        "note: the plan was chosen by text.txt, where it looks better than it is;"
        " measure on another --text\n"
    )
    code, out, err = run(
        "eval", folder, "--plan", "plan.json", "--text", "text.txt", *QUICK, "--json"
    )
    assert (code, err) == (0, note)
    assert (
        verdict_in(out)["delta_nll"]
        == json.loads(out)["quality"][1]["quality"]["delta_nll"]
    )
    assert verdict_in(out)["text"] == "text.txt"
    if " bench " in verdict_in(out)["next"]:
        assert type_next(verdict_in(out)["next"], monkeypatch, *FAST) == 0


@pytest.mark.usefixtures("short_prose")
def test_after_a_search_that_left_out_nothing_comes_one_that_asks_for_less(
    run, folder, tmp_path
):
    none = [
        "search",
        folder,
        "--max-nll",
        "0",
        "--max-minutes",
        "0",
        "-o",
        tmp_path / "none.json",
        *QUICK,
        "--json",
    ]
    verdict = verdict_in(run(*none)[1])
    assert verdict["said"].startswith(
        "Nothing is left out: this is the original model. The time was up "
    )
    asked = shlex.split(verdict["next"])
    assert asked[1:3] == ["search", str(folder)]
    assert asked[asked.index("--max-nll") + 1] == "0.1"
    written = [
        "export",
        folder,
        "--plan",
        tmp_path / "none.json",
        "--to",
        "hf",
        "--out",
        tmp_path / "e",
    ]
    assert (
        "note: the plan skips nothing, so "
        in run(*written, "--repair", "refit", "--no-verify")[2]
    )


@pytest.mark.usefixtures("short_prose")
def test_the_command_after_a_search_repairs_with_the_text_that_it_went_by(
    run, folder, tmp_path
):
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(300))))
    for text, words in (
        (tmp_path / "text.txt", ["--repair-text", str(tmp_path / "text.txt")]),
        ("mix", []),
    ):
        out = tmp_path / f"{len(words)}.json"
        mild = [
            "search",
            folder,
            "--skip",
            "mlp:1",
            "--text",
            text,
            "-o",
            out,
            *QUICK,
            "--json",
        ]
        command = shlex.split(verdict_in(run(*mild)[1])["next"])
        if "export" in command:
            assert command[command.index("--repair") + 1] == "refit"
            assert ("--repair-text" in command) == bool(words)
            assert command[command.index("--repair") + 2 :][: len(words)] == words


@pytest.mark.usefixtures("short_prose")
def test_an_export_that_repairs_says_what_the_plan_costs_before_and_after(
    run, folder, tmp_path
):
    Plan([1], [1]).save(tmp_path / "plan.json")
    command = [
        "export",
        folder,
        "--plan",
        tmp_path / "plan.json",
        "--to",
        "hf",
        "--no-verify",
        "--repair",
        "refit",
    ]
    code, out, err = run(
        *command, "--repair-sequences", "4", "--out", tmp_path / "e", "--json"
    )
    assert code == 0, err
    rows = json.loads(out)["quality"]
    assert [row["model"] for row in rows] == ["skipped", "repaired"]
    assert {row["text"] for row in rows} == {"mix, other windows"}
    assert len({row["quality"]["delta_nll"] for row in rows}) == 2


@pytest.mark.usefixtures("short_prose")
def test_export_says_what_it_measured(run, folder, tmp_path):
    Plan([1], [1]).save(tmp_path / "plan.json")
    command = [
        "export",
        folder,
        "--plan",
        tmp_path / "plan.json",
        "--to",
        "hf",
        "--no-verify",
        "--measure",
        "prose",
    ]
    code, out, _ = run(*command, "--out", tmp_path / "a")
    assert code == 0
    assert "Without 1 of 6 blocks: " in out
    assert "nats per token" in (tmp_path / "a" / "README.md").read_text()
    found = json.loads(run(*command, "--out", tmp_path / "b", "--json")[1])
    assert found["verdict"]["text"] == "prose"
    assert "config.json" in {one["file"] for one in found["files"]}
