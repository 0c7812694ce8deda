"""The command line as people type it: what it prints, and one clear line with exit code 2 for bad input."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import typer
from safetensors.torch import load_file

import forked
import notall
from api import (
    TIMED_ONCE,
    MeasuredRecord,
    cli,
    comparison,
    digest_of,
    extras,
    load_repaired,
    quality,
    read,
    refitting,
    side_by_side,
    two_texts,
    warn_if_worse,
)
from api import cli_inspecting as inspecting
from api import cli_measuring as measuring
from families import family
from notall import Plan, UsageError
from tiny_checkpoint import save_tiny_checkpoint
from tiny_tasks import TASKS, write_tasks
from tiny_tokenizer import byte_tokenizer

pytestmark = pytest.mark.usefixtures("short_prose")
QUICK = ["--sequences", "2", "--length", "16", "--batch-size", "2", "--dtype", "float32"]
MLPS = ["--skip", "mlp"]
FAST = ["--prompt", "4", "--new", "2", "--rounds", "1", "--dtype", "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=6)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `notall ARGUMENTS...`; answers (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["notall", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
        return code, *capsys.readouterr()

    return run


def caption_and_rows(text, start, count):
    """The text, which has so many lines that start so."""
    assert not count or sum(line.startswith(start) for line in text.splitlines()) == count
    return text


def test_sweep_writes_results_and_figures_and_prints_the_table(run, folder, tmp_path):
    code, out, err = run("sweep", folder, "--out", tmp_path / "r", *QUICK, *FAST[:-2])
    assert (code, err) == (0, "")
    assert (tmp_path / "r" / "results.jsonl").read_text().count("\n") == 19
    for figure in ("similarity", "tradeoff"):
        for suffix in ("png", "svg", "html"):
            assert (tmp_path / "r" / f"{figure}.{suffix}").stat().st_size > 1000
    with open(tmp_path / "r" / "table.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["variant"] for row in table] == ["dense", *["attention"] * 6, *["mlp"] * 6, *["block"] * 6]
    assert "tiny without its deepest attentions, MLPs or blocks, beside the dense model" in caption_and_rows(
        (tmp_path / "r" / "table.md").read_text(encoding="utf-8"), "| ", 19 + 2
    )
    latex = caption_and_rows((tmp_path / "r" / "table.tex").read_text(encoding="utf-8"), "", 0)
    assert latex.count(" \\\\\n") == 19 + 1
    assert f"{float(table[1]['delta_nll']):.3f} $\\pm$" in latex.replace("$-$", "-")
    rows = [line.split("│")[1].split()[0] for line in out.splitlines() if line.startswith("│")]
    assert rows == ["dense", *["attention"] * 6, *["MLP"] * 6, *["block"] * 6]
    record = json.loads((tmp_path / "r" / "results.jsonl").read_text().splitlines()[0])
    assert {"model", "revision", "text", "text_sha256", "dtype", "seed"} <= set(record["provenance"]["what"])
    assert {"device", "threads", "versions", "machine", "command", "date"} == set(record["provenance"]["where"])
    assert record["provenance"]["where"]["command"].startswith("notall sweep ")
    assert str(folder.parent) not in json.dumps(record)
    for name, lines in (("similarity", 18), ("samples", 4), ("leave_one_out", 12)):
        assert (tmp_path / "r" / f"{name}.jsonl").read_text().count("\n") == lines
    code, out, err = run("report", tmp_path / "r", "-o", tmp_path / "report.html")
    assert (code, err) == (0, "")
    assert str(tmp_path / "report.html") in out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The capital of France is" in page


def test_inspect_needs_only_a_config(run, folder, tmp_path):
    alone = tmp_path / "config.json"
    alone.write_text((folder / "config.json").read_text())
    code, out, _ = run("inspect", alone, "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["sublayer"] for row in rows[:4]] == ["attn.0", "mlp.0", "attn.1", "mlp.1"]
    model = family("llama").build(num_hidden_layers=6)
    assert rows[1]["parameters"] == sum(
        p.numel()
        for p in (
            *model.model.layers[0].mlp.parameters(),
            model.model.layers[0].post_attention_layernorm.weight,
        )
    )


def test_bytes_say_of_which_dtype_they_are(run, folder, tmp_path):
    for command in (["inspect", folder], ["plan", folder, "-o", tmp_path / "plan.json"]):
        code, out, _ = run(*command)
        assert code == 0
        assert "in float32" in " ".join(out.split())


@pytest.mark.slow
def test_bytes_are_counted_in_the_checkpoint_s_own_dtype_or_another(run, folder, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    settings = json.loads((half / "config.json").read_text())
    own = next(name for name in ("dtype", "torch_dtype") if name in settings)
    (half / "config.json").write_text(json.dumps(settings | {own: "bfloat16"}))

    def counted(model, *options):
        plan = json.loads(run("plan", model, *options, "-o", tmp_path / "plan.json", "--json")[1])
        inspected = json.loads(run("inspect", model, *options, "--json")[1])
        return [row[name] for row in (*plan, *inspected) for name in ("weight_bytes", "kv_bytes_per_token")]

    whole = counted(folder)
    assert counted(half) == counted(folder, "--dtype", "float16") == [count // 2 for count in whole]
    assert counted(half, "--dtype", "float32") == whole
    assert "in bfloat16" in " ".join(run("plan", half, "-o", tmp_path / "plan.json")[1].split())
    assert (
        run("inspect", folder, "--dtype", "auto")[2] == "error: unknown dtype 'auto': give float32, bfloat16, float16\n"
    )


def test_plan_eval_bench_and_generate_work_together(run, folder, tmp_path):
    path = tmp_path / "plan.json"
    code, out, _ = run("plan", folder, "--skip", "attention", "--fraction", "0.33", "--keep-last", "-o", path, "--json")
    assert code == 0
    assert Plan.load(path).attention == (3, 4)
    dense, skipped = json.loads(out)
    assert skipped["kv_bytes_per_token"] == dense["kv_bytes_per_token"] * 4 // 6
    code, out, _ = run("eval", folder, "--plan", path, *QUICK, "--json")
    dense, skipped = json.loads(out)["quality"]
    assert code == 0
    assert dense["delta_nll"] == 0 != skipped["delta_nll"]
    code, out, _ = run("bench", folder, "--plan", path, *FAST, "--json")
    dense, skipped = json.loads(out)
    assert code == 0
    assert dense["speedup_decode"] == 1 != skipped["speedup_decode"]
    code, out, _ = run("generate", folder, "--plan", path, "--max-new-tokens", "5", "abc")
    assert code == 0
    assert out.strip()


@pytest.mark.parametrize("fraction", [[], ["--fraction", "0.5"]])
def test_what_is_skipped_may_be_said_without_a_plan_file(run, folder, tmp_path, fraction):
    """As a plan file of the same says it."""
    path = tmp_path / "plan.json"
    skip = ["--skip", "attention", *fraction, "--keep-last"]
    assert run("plan", folder, *skip, "-o", path)[0] == 0
    for command in (["eval", folder, *QUICK, "--json"], ["generate", folder, "abc", "--max-new-tokens", "9"]):
        code, out, err = run(*command, *skip)
        assert code == 0, err
        if command[0] == "eval":
            found, planned = json.loads(out), json.loads(run(*command, "--plan", path)[1])
            assert found["quality"] == planned["quality"]
            assert str(path) in planned["verdict"]["next"]
            assert "--skip attention" in found["verdict"]["next"] or "--kind attention" in found["verdict"]["next"]
        else:
            assert out == run(*command, "--plan", path)[1] != run(*command)[1]
    skipped = json.loads(run("bench", folder, *FAST, *skip, "--json")[1])[1]
    assert skipped["plan"]["attention"] == list(Plan.load(path).attention)


def test_a_bench_ends_with_what_a_whole_answer_takes(run, folder, tmp_path):
    code, told, _ = run("bench", folder, *FAST, "--skip", "attention", "--fraction", "0.5", "-o", tmp_path / "times")
    assert code == 0
    lines = (tmp_path / "times" / "bench.jsonl").read_text().splitlines()
    dense, skipped = (
        row["prefill_ms"] + row["new_tokens"] * row["decode_ms_per_token"] for row in map(json.loads, lines)
    )
    assert (
        f"take {skipped:,.0f} ms, where the dense model takes {dense:,.0f}: {dense / skipped:.2f} times as fast"
        in " ".join(told.split())
    )
    assert "Without" not in run("bench", folder, *FAST)[1]


def test_generate_shows_both_answers_side_by_side(run, folder, monkeypatch):
    """In a pipe one below the other; at a terminal in columns, as they come."""
    command = ["generate", folder, "abc", "--max-new-tokens", "12"]
    dense, skipped = (run(*command, *more)[1].strip("\n") for more in ([], MLPS))
    assert dense != skipped
    code, out, err = run(*command, *MLPS, "--beside")
    assert (code, err) == (0, "")
    shown = re.fullmatch("dense:\n(.*)\n\nskipped:\n(.*)\n\n", out, re.S)
    assert shown.groups() == tuple(side_by_side._lines(text, side_by_side.Console()) for text in (dense, skipped))
    code, _, err = run(*command, "--beside")
    assert (code, "say what to leave out" in err) == (2, True)


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_at_a_terminal_columns_grow_as_they_are_written_to(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    with side_by_side.side_by_side(["dense", "skipped"]) as write:
        write("dense", "the \x1b[31mriver")
        assert "river" in screen.getvalue()
        write("skipped", "a stone\n[bold]x")
    last = screen.getvalue().rpartition("dense")[2]
    assert re.search("\\\\x1b\\[31mriver +│ a stone", last)
    assert re.search(r"│ +│ \[bold\]x", last)


REPAIR = ["--sequences", "8", "--length", "16", "--batch-size", "4", "--dtype", "float32", "--json"]


def test_repair_eval_generate_bench_and_export_work_together(run, folder, tmp_path, monkeypatch):
    path, out = tmp_path / "plan.json", tmp_path / "repaired"
    Plan([2, 4], [3]).save(path)
    code, shown, err = run("repair", folder, "--plan", path, "--out", out, *REPAIR)
    assert (code, err) == (0, "")
    found = json.loads(shown)
    names = [name for refit in found["refits"] for name in refit["sublayers"]]
    assert names == ["attn.1", "mlp.1", "mlp.2", "attn.3", "mlp.4", "attn.5", "mlp.5"]
    assert [row["model"] for row in found["quality"]] == ["skipped", "repaired"]
    verdict = found["verdict"]
    assert verdict["said"].startswith("Without 2 of 6 attentions and 1 of 6 MLPs: ")
    assert verdict["delta_nll"] == found["quality"][1]["delta_nll"]
    assert (verdict["text"], verdict["usable"]) == ("prose, other windows", False)
    assert verdict["next"] == f"notall heal {folder} --plan {out} --out healed"
    lines = [json.loads(line) for line in (out / "refits.jsonl").read_text().splitlines()]
    assert [line["sublayers"] for line in lines[1:]] == [refit["sublayers"] for refit in found["refits"]]
    assert str(tmp_path) not in (out / "refits.jsonl").read_text()
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert read(out / "measured.jsonl", MeasuredRecord)[1].row() == found["quality"][1]
    with monkeypatch.context() as patched:  # it goes on, with nothing left
        for module in (quality, refitting):
            patched.setattr(module, "record", lambda *_, **__: pytest.fail("a forward pass"))
        code, again, _ = run("repair", folder, "--plan", path, "--out", out, *REPAIR)
    assert (code, json.loads(again)) == (0, found)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    code, shown, warned = run("eval", folder, "--plan", out, *QUICK, "--json")
    assert "repaired with prose, where it looks better than it is; measure on another --text" in warned
    other = tmp_path / "other.txt"
    other.write_text("What it was not repaired with. " * 50)
    assert "prose" not in run("eval", folder, "--plan", out, *QUICK, "--text", other)[2]
    dense, skipped, repaired = json.loads(shown)["quality"]
    assert code == 0
    assert [row["model"] for row in (dense, skipped, repaired)] == ["dense", "skipped", "repaired"]
    assert len({row["nll"] for row in (dense, skipped, repaired)}) == 3
    code, shown, _ = run("bench", folder, "--plan", out, *FAST, "--json")
    assert (code, len(json.loads(shown))) == (0, 2)
    said = [run("generate", folder, "--plan", plan, "--max-new-tokens", "8", "abc") for plan in (path, out)]
    assert [code for code, *_ in said] == [0, 0]
    assert said[0][1] != said[1][1]
    code, _, err = run("export", folder, "--plan", out, "--to", "nemotron-nas", "--out", tmp_path / "e", "--no-verify")
    assert code == 0, err
    sound = run("export", folder, "--plan", path, "--to", "nemotron-nas", "--out", tmp_path / "p", "--no-verify")
    assert sound[0] == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("e", "p")]
    assert weights[0] != weights[1]


def test_repair_measures_on_the_texts_it_is_given(run, folder, tmp_path):
    path, out = tmp_path / "plan.json", tmp_path / "repaired"
    Plan([4]).save(path)
    for name, words in (("one", "the river runs "), ("two", "a green bird sings "), ("three", "old winter light ")):
        (tmp_path / f"{name}.txt").write_text(words * 200)
    texts = [word for name in ("one", "two") for word in ("--text", tmp_path / f"{name}.txt")]
    held_out = ["--held-out", tmp_path / "three.txt"]
    code, shown, err = run("repair", folder, "--plan", path, "--out", out, *texts, *held_out, *REPAIR)
    assert (code, err) == (0, "")
    rows = json.loads(shown)["quality"]
    assert [(row["model"], row["sequences"]) for row in rows] == [("skipped", 16), ("repaired", 16)]
    assert {row["text"] for row in rows} == {"three.txt"}
    what = json.loads((out / "refits.jsonl").read_text().splitlines()[0])["provenance"]["what"]
    assert [text["text"] for text in what["texts"]] == ["one.txt", "two.txt"]


def untimed(line):
    """A record without what differs from run to run."""
    return {name: value for name, value in line.items() if name not in ("provenance", "seconds")}


def test_what_is_killed_while_it_measures_has_lost_nothing(run, folder, tmp_path):
    path, out = tmp_path / "plan.json", tmp_path / "repaired"
    Plan([4]).save(path)
    (tmp_path / "book.txt").write_text("the river runs under the old bridge " * 100)
    command = ["repair", folder, "--plan", path, "--out", out, "--text", tmp_path / "book.txt", *REPAIR]
    dies = "import os; from api import measured; measured.evaluate = lambda *_: os._exit(9)"
    assert forked.run(f"{dies}; {forked.NOTALL}", *command).returncode == 9
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert "plan.json" in before
    assert "measured.jsonl" not in before
    code, shown, err = run(*command)
    assert (code, err) == (0, "")
    assert {name: (out / name).read_bytes() for name in before} == before
    fresh = json.loads(run(*command[:5], tmp_path / "fresh", *command[6:])[1])
    tables = [name for name in fresh if name != "verdict"]
    assert [[untimed(row) for row in json.loads(shown)[table]] for table in tables] == [
        [untimed(row) for row in fresh[table]] for table in tables
    ]


@pytest.mark.slow
def test_heal_keeps_what_it_measured(run, folder, tmp_path, monkeypatch):
    path, repaired, out = tmp_path / "plan.json", tmp_path / "repaired", tmp_path / "healed"
    Plan([4]).save(path)
    assert run("repair", folder, "--plan", path, "--out", repaired, *REPAIR)[0] == 0
    heal = ["--tokens", "64", "--length", "16", "--dtype", "float32", "--json"]
    for plan, before in ((path, "skipped"), (repaired, "repaired")):
        command = ["heal", folder, "--plan", plan, "--out", out / before, *heal]
        code, shown, err = run(*command)
        assert (code, err) == (0, "")
        rows = json.loads(shown)["quality"]
        assert [row["model"] for row in rows] == [before, "healed"]
        verdict = json.loads(shown)["verdict"]
        assert verdict["delta_nll"] == rows[1]["delta_nll"]
        assert verdict["next"].startswith(f"notall export {folder} --plan {out / before} ")
        assert [one.row() for one in read(out / before / "measured.jsonl", MeasuredRecord)] == rows
        with monkeypatch.context() as patched:
            patched.setattr(quality, "record", lambda *_, **__: pytest.fail("it was measured again"))
            assert run(*command)[1] == shown
        assert run("eval", folder, "--plan", out / before, *QUICK)[0] == 0


@pytest.mark.slow
def test_heal_trains_what_it_is_told_to_on_text_that_the_model_wrote(run, folder, tmp_path):
    path, out = tmp_path / "plan.json", tmp_path / "healed"
    Plan([4]).save(path)
    heal = ["--tokens", "64", "--length", "16", "--dtype", "float32", "--json"]
    command = ["heal", folder, "--plan", path, *heal]
    asked = ["--sample", "--train", "lora", "--rank", "2", "--warm-up", "0.5"]
    code, shown, err = run(*command, "--out", out, *asked)
    assert (code, err) == (0, "")
    looks = json.loads(shown)["healing"]
    assert all({"held_out_kl", "held_out_nll", "held_out_agreement"} <= look.keys() for look in looks)
    (step,) = load_repaired(out).history
    assert (step.sampled, step.train, step.rank, step.warm_up) == (True, "lora", 2, 0.5)
    assert "16 tokens that it wrote itself from the first words of prose" in str(step)
    (text,) = out.glob("sampled-*.safetensors")
    assert digest_of([load_file(text)["ids"]]) == step.training
    assert run(*command, "--out", out, *asked)[1] == shown
    assert "another" in run(*command, "--out", out)[2]
    for words, said in (
        (["--rank", "4"], "give 1 or more, with --train lora"),
        (["--train", "lora", "--rank", "0"], "give 1 or more, with --train lora"),
        (["--warm-up", "2"], "give one from 0 to 1"),
    ):
        code, _, err = run(*command, "--out", tmp_path / "n", *words)
        assert (code, err.count("\n")) == (2, 1)
        assert said in err


@pytest.mark.slow
def test_search_keeps_what_the_repair_of_its_choice_gives_back(run, folder, tmp_path):
    path = tmp_path / "plan.json"
    command = ["search", folder, "--kind", "attention", "--count", "1", "--criterion", "deepest", "--repair"]
    size = ["-o", path, "--sequences", "4", "--length", "16", "--dtype", "float32", "--json"]
    code, shown, err = run(*command, *size, "--held-out", "prose")
    assert (code, err) == (0, "")
    rows = json.loads(shown)["quality"]
    assert [row["model"] for row in rows] == ["skipped", "repaired"]
    assert [one.row() for one in read(tmp_path / "plan.search" / "measured.jsonl", MeasuredRecord)] == rows
    assert json.loads(run(*command, *size, "--held-out", "prose")[1])["quality"] == rows
    other = json.loads(run(*command, *size)[1])["quality"]  # windows of the same text
    assert [(row["text"], row["model"]) for row in other] == [
        ("prose, other windows", "skipped"),
        ("prose, other windows", "repaired"),
    ]


def test_what_repair_cannot_take_is_one_line(run, folder, tmp_path):
    plan, nothing, unfinished = tmp_path / "plan.json", tmp_path / "nothing.json", tmp_path / "unfinished"
    Plan([4]).save(plan)
    Plan().save(nothing)
    out = tmp_path / "repaired"
    assert run("repair", folder, "--plan", plan, "--out", out, *REPAIR)[0] == 0
    shutil.copytree(out, unfinished)
    (unfinished / "plan.json").unlink()
    other = tmp_path / "other"
    other.mkdir()
    (other / "bench.jsonl").write_text('{"model": "dense"}\n')
    torn = tmp_path / "torn"
    shutil.copytree(out, torn)
    next(torn.glob("*.safetensors")).write_bytes(b"torn")
    cases = {
        "no plan": (["repair", folder, "--out", tmp_path / "n", *REPAIR], "with --plan"),
        "a plan of nothing": (
            ["repair", folder, "--plan", nothing, "--out", tmp_path / "n", *REPAIR],
            "skips nothing",
        ),
        "one window": (
            ["repair", folder, "--plan", plan, "--out", tmp_path / "n", *REPAIR, "--sequences", "1"],
            "too few",
        ),
        "other settings": (["repair", folder, "--plan", plan, "--out", out, *REPAIR, "--seed", "1"], "another"),
        "a folder of another command": (["repair", folder, "--plan", plan, "--out", other, *REPAIR], "notall bench"),
        "a repair that is not finished": (["eval", folder, "--plan", unfinished, *QUICK], "was not finished"),
        "a folder of something else": (["eval", folder, "--plan", other, *QUICK], "is no repaired plan"),
        "torn weights": (["eval", folder, "--plan", torn, *QUICK], "is damaged"),
    }
    for case, (arguments, says) in cases.items():
        code, _, err = run(*arguments)
        assert (code, len(err.strip().splitlines())) == (2, 1), (case, err)
        assert says in err, (case, err)
        assert len(err) < 300 + len(str(tmp_path)), (case, err)


def test_similarity_prints_and_draws(run, folder, tmp_path):
    code, out, _ = run("similarity", folder, *QUICK, "--out", tmp_path / "fig1", "--json")
    assert code == 0
    assert len(json.loads(out)) == 18
    assert (tmp_path / "fig1.png").exists()


def test_bench_keeps_its_records_for_a_report(run, folder, tmp_path):
    out, page = tmp_path / "b", tmp_path / "report.html"
    for batch in ("1", "2"):
        code, shown, err = run(
            *("bench", folder, "--skip", "mlp", "--fraction", "0.5", *FAST, "--batch-size", batch, "-o", out, "--json")
        )
        assert (code, err) == (0, "")
    dense, skipped = [json.loads(line) for line in (out / "bench.jsonl").read_text().splitlines()][2:]
    assert dense["beside"] == skipped["plan"]
    for line, row in zip((dense, skipped), json.loads(shown), strict=True):
        del row["provenance"]
        assert row.items() <= line.items()
    assert (dense["plan"]["mlp"], skipped["plan"]["mlp"]) == ([], [3, 4, 5])
    assert (skipped["batch_size"], skipped["prompt_tokens"]) == (2, 4)
    assert {"model", "revision", "dtype", "seed", "dummy_weights"} <= skipped["provenance"]["what"].keys()
    assert str(tmp_path) not in (out / "bench.jsonl").read_text()
    assert run("report", out, "-o", page)[0] == 0
    assert "3 MLP" in page.read_text(encoding="utf-8")


def test_draft_tells_what_a_plan_brings_and_keeps_it_for_a_report(run, folder, tmp_path):
    out, page, path = tmp_path / "d", tmp_path / "report.html", tmp_path / "plan.json"
    Plan([4]).save(path)
    small = ["--sequences", "2", "--prompt", "8", "--new", "6", "--most", "2", "--rounds", "1", "--dtype", "float32"]
    code, shown, err = run("draft", folder, "--plan", path, *small, "-o", out, "--json")
    assert (code, err) == (0, "")
    found = json.loads(shown)
    assert [(row["decoding"], row["drafted"]) for row in found["drafts"]] == [
        *(("greedy", 1), ("greedy", 2), ("sampled", 1), ("sampled", 2)),
    ]
    assert found["verdict"]["said"].startswith("Drafting with it would be ")
    best = found["verdict"]["best"]["greedy"]["drafted"]
    assert [row.get("same_texts") for row in found["drafts"]] == [
        2 if place == best - 1 else None for place in range(4)
    ]
    about = found["drafts"][0]["provenance"]
    assert (about["prompt"], about["new"], about["length"], about["repair"]) == (8, 6, 14, "none")
    kept = [json.loads(line) for line in (out / "drafts.jsonl").read_text().splitlines()]
    assert [row["predicted"] for row in kept] == [row["predicted"] for row in found["drafts"]]
    assert str(tmp_path) not in (out / "drafts.jsonl").read_text()
    code, shown, _ = run("draft", folder, "--skip", "mlp", "--fraction", "0.17", *small, "-o", out)
    assert code == 0
    assert "Drafting with it would be " in shown.splitlines()[-1]
    assert run("report", out, "-o", page)[0] == 0
    told = page.read_text(encoding="utf-8")
    assert "As a draft model" in told
    assert "Below 1, drafting is" in told
    assert told.count("1 MLP") >= 4 <= told.count("1 attention")
    code, _, err = run("draft", folder, *small)
    assert (code, "say what to leave out" in err) == (2, True)


@pytest.mark.parametrize("command", ["sweep", "compare", "search", "paper", "bench", "draft", "eval"])
def test_a_folder_of_another_command_is_refused_before_any_work(run, tmp_path, command):
    other = "results.jsonl" if command == "bench" else "bench.jsonl"
    out = tmp_path / ("plan.search" if command == "search" else "out")
    out.mkdir()
    (out / other).write_text('{"variant": "dense"}\n' if command == "bench" else '{"model": "dense"}\n')
    given = tmp_path / "plan.json" if command == "search" else out
    code, _, err = run(command, tmp_path / "no-model", "--out", given)
    assert code == 2
    assert "holds results of notall " in err
    assert err.rstrip().endswith(f"choose another folder for notall {command}")


def test_bench_times_nothing_where_it_may_not_write(monkeypatch, tmp_path):
    from api import plan_times
    from api import records_lines as lines

    monkeypatch.setattr(plan_times, "time_plan", lambda *_, **__: pytest.fail("it was timed"))
    model = family("llama").build()
    with lines.lock(tmp_path), pytest.raises(UsageError, match="another run is working"):
        plan_times.bench(model, Plan([1]), plan_times.Timed(), {}, out=tmp_path)


def test_bench_of_a_shape_with_dummy_weights(run, folder, tmp_path):
    config = tmp_path / "config.json"
    config.write_text((folder / "config.json").read_text())
    code, out, _ = run(
        "bench", "--shape", config, "--dummy-weights", "--skip", "block", "--fraction", "0.5", *FAST, "--json"
    )
    assert code == 0
    dense, skipped = json.loads(out)
    assert skipped["params"] < dense["params"]
    assert skipped["peak_bytes"] is None


def bad_inputs(folder, tmp_path):
    plan, other, everything, torn = (tmp_path / name for name in ("plan", "other", "everything", "torn"))
    Plan([1, 77]).save(plan)
    Plan([1], fingerprint="llama-2x8-00000000").save(other)
    Plan(range(6), range(6)).save(everything)
    torn.write_text('{"attention": [1, ')
    empty, short, results = tmp_path / "empty.txt", tmp_path / "short.txt", tmp_path / "results"
    empty.write_text("")
    short.write_text("too short")
    results.mkdir()
    (results / "results.jsonl").write_text('{"variant": "dense"\n{"variant": "mlp"}\n')
    file = tmp_path / "file"
    file.write_text("")
    return {
        "an unknown model": (["eval", "no/such-model", *MLPS], "no/such-model"),
        "a folder that holds no model": (["eval", tmp_path, *MLPS], "config.json"),
        "an unknown variant": (["plan", folder, "--skip", "heads"], "heads"),
        "a fraction outside 0..1": (["plan", folder, "--fraction", "1.5"], "outside 0..1"),
        "a plan that names no layer of the model": (["eval", folder, "--plan", plan, *QUICK], "0 to 5"),
        "a plan for another model": (["eval", folder, "--plan", other, *QUICK], "made for llama-2x8"),
        "a plan that skips everything": (["eval", folder, "--plan", everything, *QUICK], "keep at least one"),
        "nothing to leave out": (["eval", folder], "--plan plan.json (notall search writes one), or --skip attention"),
        "two things to leave out": (["generate", folder, "a", "--plan", plan, *MLPS], "give one of them"),
        "a fraction of less than a layer": (["plan", folder, "--fraction", "0.01"], "none of them: give a larger"),
        "a fraction of nothing": (["bench", folder, "--fraction", "0.5"], "add --skip"),
        "a truncated plan": (["eval", folder, "--plan", torn], "not valid JSON"),
        "a missing plan": (["eval", folder, "--plan", tmp_path / "absent"], "cannot read"),
        "an empty text": (["eval", folder, *MLPS, "--text", empty, *QUICK], "empty"),
        "a short text": (["eval", folder, *MLPS, "--text", short, *QUICK], "tokens"),
        "a missing text": (["eval", folder, *MLPS, "--text", tmp_path / "absent", *QUICK], "cannot read"),
        "malformed results": (["sweep", folder, "--out", results, *QUICK, *FAST[:-2]], "line 1"),
        "an unwritable folder": (["sweep", folder, "--out", file, *QUICK, *FAST[:-2]], "cannot"),
        "an unknown dtype": (["eval", folder, "--dtype", "float13", *MLPS], "float13"),
        "an unknown device": (["eval", folder, "--device", "tpu9", *MLPS], "tpu9"),
        "a shape with no weights": (["bench", "--shape", "llama-2-7b"], "--dummy-weights"),
        "a report of no results": (["report", tmp_path / "absent"], "notall sweep"),
        "an unwritable plan": (["plan", folder, "-o", file / "plan.json"], "cannot write"),
        "a misspelt command": (["serach", folder], "'search'"),
        "a misspelt option": (["eval", folder, "--sed", "3"], "--seed"),
        "an option without its value": (["eval", folder, "--seed"], "requires an argument"),
        "a word for a number": (["eval", folder, "--length", "long"], "--length"),
        "a word too long": (["eval", folder, "--length", "long" * 999], "--length"),
        "a word too many": (["inspect", folder, folder], "see `notall inspect --help`"),
        "a misspelt value": (
            ["search", folder, "--kind", "atention", "--count", 1],
            "'atention' (did you mean attention?): give",
        ),
        "a misspelt dtype": (["eval", folder, "--dtype", "bfloat", *MLPS], "(did you mean bfloat16?)"),
        "a misspelt model": (["inspect", "smolm2"], "(did you mean smollm2?)"),
        "no prompt": (["generate", folder], "see `notall generate --help`"),
    }


def test_tasks_are_listed_by_a_word_of_their_name(run, tmp_path, own_tasks_only):
    path = ["--task-path", write_tasks(tmp_path / "tasks")]
    code, out, err = run("tasks", "CHOICE", *path, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == [{"task": "tiny_choice", "kind": "task", "num_fewshot": None}]
    rows = {row["task"]: row for row in json.loads(run("tasks", *path, "--json")[1])}
    assert rows["openllm"]["kind"] == rows["tiny_group"]["kind"] == "group"
    assert set(TASKS) < set(rows)
    code, out, _ = run("tasks", "tiny_w", *path)
    assert (code, "1 name for --tasks" in out, "tiny_words" in out) == (0, True, True)
    code, _, err = run("tasks", "tiny_chioce", *path)
    assert (code, err) == (
        2,
        "error: no task's name holds 'tiny_chioce' (did you mean tiny_choice?): give a shorter word, or none\n",
    )


def test_bad_input_is_one_line_that_names_the_fix_and_exit_code_2(run, folder, tmp_path):
    for case, (arguments, says) in bad_inputs(folder, tmp_path).items():
        code, _, err = run(*arguments)
        assert code == 2, (case, code, err)
        assert says in err, (case, err)
        assert "Traceback" not in err, case
        assert err.startswith("error: "), (case, err)
        assert len(err.strip().splitlines()) == 1, (case, err)
        assert len(err) < 300 + len(str(tmp_path)), (case, err)


@pytest.mark.parametrize("how", ["Ctrl-C", "a signal"])
def test_an_interrupted_command_says_so_in_one_line(run, folder, monkeypatch, how):
    def interrupt(*_):
        if how == "a signal":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        raise KeyboardInterrupt

    monkeypatch.setattr(inspecting, "empty_model", interrupt)
    code, out, err = run("inspect", folder)
    assert (code, out) == (130, "")
    assert err == "interrupted: what is finished is kept; run the same command again to go on\n"


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_what_was_written_stays(run, folder, tmp_path, monkeypatch):
    out = tmp_path / "r"
    assert run("sweep", folder, "--out", out, *QUICK, *FAST[:-2])[0] == 0
    path = out / "results.jsonl"
    kept = "".join(path.read_text().splitlines(keepends=True)[:5])
    path.write_text(kept)

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = run("sweep", folder, "--out", out, *QUICK, *FAST[:-2])
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "No space left" in err
    assert path.read_text() == kept


@pytest.mark.parametrize(
    ("lacks", "command"),
    [
        ("vl_convert", ["similarity", "--out", "OUT"]),
        ("vl_convert", ["search", "--count", "1", "--front", "-o", "OUT"]),
        ("vl_convert", ["paper", "--out", "OUT"]),
        ("vl_convert", ["report", "-o", "OUT"]),
        ("tabulate", ["paper", "--out", "OUT"]),
        ("lm_eval", ["eval", "--tasks", "arc_easy", "--out", "OUT"]),
        ("lm_eval", ["eval", "--battery", "--out", "OUT"]),
        ("lm_eval", ["search", "--count", "1", "--objective", "kl + task:arc_easy", "-o", "OUT"]),
        ("lm_eval", ["compare", "--tasks", "arc_easy", "-o", "OUT"]),
        ("scipy", ["search", "--count", "1", "--criterion", "quadratic", "-o", "OUT"]),
        ("scipy", ["compare", "--criterion", "quadratic", "-o", "OUT"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_an_extra_that_lacks_is_named_before_any_work(run, folder, tmp_path, monkeypatch, lacks, command):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == lacks else find_spec(name))
    name, *options = [tmp_path / "out" if word == "OUT" else word for word in command]
    code, out, err = run(name, folder, *options)
    assert (code, out) == (2, "")
    assert err == f"error: this needs {lacks}: pip install 'notall[{extras.EXTRAS[lacks]}]'\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lacks", ["scipy", None])
def test_all_criteria_are_compared_but_those_whose_extra_lacks(run, folder, tmp_path, monkeypatch, lacks):
    def stop(model, questions, *_, **__):
        raise UsageError(" ".join(question.criterion for question in questions))

    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == lacks else find_spec(name))
    monkeypatch.setattr(comparison, "compare_criteria", stop)
    code, _, err = run("compare", folder, "--budget", "attention:1", "-o", tmp_path / "c", *QUICK)
    assert code == 2
    assert "cosine" in err
    assert ("quadratic" in err) == (not lacks)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({"delta_nll": 0.5, "delta_nll_se": 0.02}, {"delta_nll": 0.53, "delta_nll_se": 0.02}, ""),
        ({"delta_nll": 0.5, "delta_nll_se": 0.02}, {"delta_nll": 0.4, "delta_nll_se": 0.02}, ""),
        (
            {"delta_nll": 0.5, "delta_nll_se": None},
            {"delta_nll": 0.53, "delta_nll_se": None},
            "0.530 nats",
        ),
        (
            {"delta_nll": 0.5, "delta_nll_se": 0.02},
            {"delta_nll": 0.6, "delta_nll_se": 0.02},
            "0.600 nats",
        ),
        ({"delta_nll": None, "delta_nll_se": None}, {"delta_nll": 0.6, "delta_nll_se": 0.02}, ""),
    ],
)
def test_a_repair_that_makes_it_worse_is_told(capsys, before, after, told):
    rows = [{"model": state, "text": "b.txt", **row} for state, row in (("skipped", before), ("repaired", after))]
    warn_if_worse([{"model": "dense", "delta_nll": 0.0, "delta_nll_se": 0.0}, *rows])
    said = capsys.readouterr().err
    assert said.startswith(f"warning: the repair makes it worse on b.txt: {told}") if told else said == ""


def test_a_warning_is_one_line_without_code(run, monkeypatch):
    before = warnings.formatwarning
    said = "the kept times\nno longer hold \x1b[31m"
    monkeypatch.setattr(
        cli, "app", lambda **_: print(warnings.formatwarning(said, UserWarning, "latency.py", 9), end="")
    )
    assert run()[1] == "warning: the kept times no longer hold \\x1b[31m\n"
    assert warnings.formatwarning is before


def test_notall_alone_says_what_to_do_first(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "notall sweep --out results" in out
    assert "notall report results" in out
    assert run("--version")[1] == f"notall {notall.__version__}\n"


def commands():
    return typer.main.get_command(cli.app).commands


def test_the_help_is_a_tour_with_an_example_for_each_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for words in (
        "Look at a model",
        "Choose what to skip",
        "Measure what",
        "Show what",
        "Exit codes: 0 done; 2 bad input, named in one line with the fix; 3 done, but the budget was missed",
    ):
        assert words in " ".join(out.split())
    for name, command in commands().items():
        assert f" {name} " in out
        assert command.rich_help_panel in out, name
        assert f"notall {name} " in command.epilog, name
        example = shlex.split(command.epilog.partition("Example:")[2])[2:]
        command.make_context(name, example)  # every option of the example exists


@pytest.mark.parametrize("width", ["80", "1000"])
def test_no_word_of_the_help_is_lost_as_markup_or_cut(run, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    for name, command in commands().items():
        shown = run(name, "--help")[1]
        options = [word for param in command.params if param.param_type_name == "option" for word in param.opts]
        for text in (command.help, command.epilog, *options, *(param.help or "" for param in command.params)):
            for word in text.replace("[bold]", "").replace("[/bold]", "").split():
                assert word in shown, (name, word)
        assert not re.findall("<[^>\n]*$", shown, re.M), name


def test_every_command_that_prints_a_table_has_json(run):
    without = {
        name for name, command in commands().items() if "--json" not in {o for p in command.params for o in p.opts}
    }
    assert without == {"generate", "report"}


def test_no_color_means_none():
    """Of help, which is the most colourful, and needs no torch."""
    command = [sys.executable, "-m", "notall", "report", "--help"]
    coloured, plain = (
        subprocess.run(command, env={**os.environ, "FORCE_COLOR": "1", **more}, capture_output=True, check=True).stdout
        for more in ({}, {"NO_COLOR": "1"})
    )
    colours = rb"\x1b\[[0-9;]*3[0-9][0-9;]*m"
    assert re.search(colours, coloured)
    assert not re.search(colours, plain)


def test_importing_notall_is_light():
    code = "import sys, notall; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'altair')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_search_writes_a_plan_and_goes_on(run, folder, tmp_path):
    path = tmp_path / "plan.json"
    chosen = ["search", folder, "--kind", "attention", "--count", "2", "--keep-last", "-o", path, *QUICK, "--json"]
    code, out, err = run(*chosen, "--held-out", "prose")
    assert (code, err) == (0, "")
    (row,) = json.loads(out)
    assert list(Plan.load(path).attention) == row["plan"]["attention"]
    assert len(row["order"]) == 2
    assert row["evaluations"] > 5
    assert row["delta_nll"] is not None
    assert str(tmp_path) not in (tmp_path / "plan.search" / "evaluations.jsonl").read_text()
    before = (tmp_path / "plan.search" / "evaluations.jsonl").read_bytes()
    code, out, _ = run(*chosen)
    assert json.loads(out)[0]["plan"] == row["plan"]
    assert (tmp_path / "plan.search" / "evaluations.jsonl").read_bytes() == before
    code, _, err = run(*[word if word != "attention" else "block" for word in chosen], "--sequences", "3")
    assert code == 2
    assert "results with sequences 2, not 3" in err


@pytest.mark.parametrize(
    ("criterion", "kept", "skipped"), [("shallowest", "--keep-first", 1), ("deepest", "--keep-last", 4)]
)
def test_search_keeps_the_layer_that_is_named(run, folder, tmp_path, criterion, kept, skipped):
    """Of six: the first, where it would go first, and the last likewise."""
    path = tmp_path / "plan.json"
    chosen = ["search", folder, "--kind", "attention", "--count", "1", "--criterion", criterion, "-o", path, *QUICK]
    assert run(*chosen, kept)[0] == 0
    assert Plan.load(path).attention == (skipped,)


def test_a_search_with_more_patience_goes_on_and_is_no_worse(run, folder, tmp_path):
    command = ["search", folder, "--count", "3", "-o", tmp_path / "plan.json", *QUICK, "--json", "--patience"]
    kept = tmp_path / "plan.search" / "evaluations.jsonl"
    found, files = [], []
    for patience in ("0", "99"):
        code, out, err = run(*command, patience)
        assert code == 0
        assert not err or ("note: " in err and "before, and is replaced" in err)
        found.append(json.loads(out)[0])
        files.append(kept.read_bytes())
    assert files[1].startswith(files[0])
    assert found[1]["evaluations"] > found[0]["evaluations"]
    assert found[1]["cost"] <= found[0]["cost"]
    assert run(*command, "-1")[0] == 2


def test_search_keeps_what_it_chose_once_for_a_report(run, folder, tmp_path):
    command = ["search", folder, "--kind", "attention", "-o", tmp_path / "plan.json", *QUICK, "--json"]
    kept, page = tmp_path / "plan.search" / "chosen.jsonl", tmp_path / "report.html"
    for count, lines, replaced in (("2", 1, False), ("2", 1, False), ("1", 2, True)):
        code, shown, err = run(*command, "--count", count)
        assert code == 0
        assert ("skipped attention 4, 5 before, and is replaced" in err, bool(err)) == (replaced, replaced)
        assert kept.read_text().count("\n") == lines
    assert run(*command, "--count", "1", "--held-out", "prose")[0] == 0  # measured on another text
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [line["quality"] is not None for line in lines] == [True, True, True]
    assert [line["provenance"]["what"]["held_out"] for line in lines[:2]] == ["other windows"] * 2
    assert lines[2]["provenance"]["what"]["held_out"] == "prose"
    (row,) = json.loads(shown)
    given = {name: value for name, value in row.items() if name not in ("seconds", "provenance", "verdict")}
    assert given.items() <= (lines[1] | lines[1]["quality"] | lines[1]["weighed"]).items()
    assert str(tmp_path) not in kept.read_text()
    assert run("report", tmp_path / "plan.search", "-o", page)[0] == 0
    told = page.read_text(encoding="utf-8")
    assert "search by kl: 1 attention" in told
    assert "KL added, nats per token" in told


@pytest.mark.parametrize(
    "budget",
    [["--params", "0.1"], ["--weights", "20000"], ["--kv", "0.4"], ["--max-nll", "0.3"], ["--max-kl", "0.3"]],
    ids=lambda budget: budget[0],
)
def test_search_by_other_budgets(run, folder, tmp_path, budget):
    code, out, err = run("search", folder, *budget, "-o", tmp_path / "plan.json", *QUICK, "--json")
    assert (code, err) == (0, "")
    (row,) = json.loads(out)
    assert row["plan"]["attention"] or row["plan"]["mlp"]
    assert row["chosen"].startswith("search by nll: " if budget[0] == "--max-nll" else "search by kl: ")
    if "max" in budget[0]:
        assert row["cost"] - row["dense_cost"] <= 0.3


@pytest.fixture
def text(tmp_path):
    """As little as will do: the default takes a second to tokenize."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(map(str, range(300))))
    return path


def test_search_refuses_in_one_line(run, folder, text, tmp_path):
    refusals = {
        "give one budget": [],
        "give one budget: --count or --kv": ["--count", "2", "--kv", "0.2"],
        "no criterion 'luck': choose": ["--count", "2", "--criterion", "luck"],
        "no criterion 'serch' (did you mean search?)": ["--count", "2", "--criterion", "serch"],
        "no objective 'joy': give": ["--count", "2", "--objective", "joy"],
        "no objective 'answer' (did you mean answers?)": ["--count", "2", "--objective", "answer"],
        "needs --prompts": ["--count", "2", "--objective", "answers"],
        "is no weight": ["--count", "2", "--objective", "x*kl"],
        "'nan' is no weight": ["--count", "2", "--objective", "nan*kl"],
        "even number": ["--count", "3", "--portable"],
        "cannot skip nan of them": ["--count", "nan"],
        "cannot skip inf of them": ["--count", "inf"],
        "is out of reach": ["--count", "1e300"],
        "cannot save nan params": ["--params", "nan"],
        "cannot save inf weight_bytes": ["--weights", "inf"],
        "cannot save -1.0 kv_bytes_per_token": ["--kv", "-1"],
        "less is out of reach: ask for at most": ["--params", "1e300"],
        "not nan: give a limit": ["--max-nll", "nan"],
        "not inf: give a limit": ["--max-kl", "inf"],
        "end after nan minutes": ["--count", "2", "--max-minutes", "nan"],
        "end after -1.0 minutes": ["--count", "2", "--max-minutes", "-1"],
        "--seed 1180591620717411303424 is none": ["--count", "2", "--seed", str(2**70)],
        "--seed -1 is none": ["--count", "2", "--seed", "-1"],
    }
    for says, options in refusals.items():
        code, _, err = run("search", folder, *options, "-o", tmp_path / "plan.json", *QUICK, "--text", text)
        assert code == 2, says
        assert says in err
        assert err.count("\n") == 1
        assert len(err) < 300


def test_criteria_are_listed(run):
    code, out, _ = run("criteria")
    assert code == 0
    assert "gate-norm" in out


def test_compare_writes_results_a_table_and_the_front(run, folder, tmp_path):
    out = tmp_path / "c"
    command = ["compare", folder, "--budget", "attention:1,2", "--budget", "portable:2", "--criterion", "cosine"]
    command += ["--criterion", "search", "--objective", "nll", "--objective", "kl", "-o", out, *QUICK]
    code, shown, err = run(*command, "--rounds", "1", "--prompt", "4", "--new", "2", "--json")
    assert (code, err) == (0, "")
    records = json.loads(shown)
    assert len(records) == 9
    assert (out / "comparison.jsonl").read_text().count("\n") == 9
    assert str(tmp_path) not in (out / "comparison.jsonl").read_text()
    assert (out / "table.md").read_text().count("###") == 3
    assert TIMED_ONCE in (out / "table.md").read_text()
    assert (out / "front.png").stat().st_size > 1000
    code, shown, _ = run(*command)
    assert (code, "Plans that leave equal" in shown) == (0, False)  # no times, nothing to say of them
    assert TIMED_ONCE not in (out / "table.md").read_text()
    _, shown, _ = run(*command, "--rounds", "1", "--prompt", "4", "--new", "2")
    assert TIMED_ONCE in shown
    code, _, err = run("report", out, "-o", tmp_path / "report.html")
    assert (code, err) == (0, "")
    assert "search by nll: 2 portable" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("sequences", "batch_size"), [(1, 2), (3, 2), (4, 2), (2, 9)])
def test_calibration_and_held_out_windows_are_as_many_and_others(text, sequences, batch_size):
    """Also where a batch would hold windows of both."""
    config = SimpleNamespace(get_text_config=lambda **_: None)
    model, tokenizer = SimpleNamespace(device="cpu", config=config), byte_tokenizer()
    ours, others, about = two_texts(model, tokenizer, str(text), None, sequences, 16, batch_size, seed=0)
    assert [sum(map(len, part)) for part in (ours, others)] == [sequences, sequences]
    assert max(map(len, (*ours, *others))) <= batch_size
    assert about["sequences"] == sequences
    assert not {tuple(row) for row in torch.cat(ours).tolist()} & {tuple(row) for row in torch.cat(others).tolist()}


def test_compare_refuses_in_one_line(run, folder, text, tmp_path):
    for says, options in {
        "is no budget": ["--budget", "heads:3"],
        "'attention:²' is no budget": ["--budget", "attention:²"],
        "'attention:4,,8' is no budget": ["--budget", "attention:4,,8"],
        "'attention:999": ["--budget", "attention:" + "9" * 5000],
        "no criterion": ["--criterion", "luck"],
        "no repair": ["--repair", "luck"],
        "at most": ["--budget", "attention:6"],
        "tokens": ["--sequences", "9999999"],
    }.items():
        code, _, err = run("compare", folder, "-o", tmp_path / "c", *QUICK, *options, "--text", text)
        assert code == 2, says
        assert says in err
        assert err.count("\n") == 1
        assert len(err) < 300


def test_search_draws_the_front(run, folder, tmp_path):
    command = ["search", folder, "--kind", "block", "--count", "2", "--front", "-o", tmp_path / "plan.json", *QUICK]
    code, _, err = run(*command)
    assert (code, err) == (0, "")
    assert (tmp_path / "plan.search" / "front" / "front.svg").exists()
    assert run("report", tmp_path / "plan.search" / "front", "-o", tmp_path / "report.html")[0] == 0
    assert "angular" in (tmp_path / "plan.search" / "front" / "table.md").read_text()


@pytest.mark.parametrize(
    ("words", "address"),
    [("", None), ("--ray", "any"), ("--ray --ray-gpus 2", "any"), ("--ray local", "local"), ("--ray=auto", "auto")],
)
def test_ray_may_stand_without_an_address(run, folder, tmp_path, monkeypatch, words, address):
    asked = []

    def no_cluster(given, *_, **__):
        asked.append(given)
        raise UsageError("there is no cluster in this test")

    monkeypatch.setattr(measuring, "workers_on", no_cluster)
    code, _, said = run("sweep", folder, "--out", tmp_path, *QUICK, *words.split())
    assert (code, asked) == (2, [address]), said
