"""notall repair and heal: plans with weights, what they are measured on, and what
cannot be repaired.
"""

import json
import shutil

import pytest
from safetensors.torch import load_file

import forked
from api import (
    SEAL,
    MeasuredRecord,
    Quality,
    RefitRecord,
    RepairedPlan,
    digests,
    quality,
    read,
    streams,
    warn,
)
from command_line import FAST, QUICK
from notall import Plan

pytestmark = [
    pytest.mark.usefixtures("short_prose"),
    # of words, files and exit codes; the repair itself is tested on both
    pytest.mark.any_transformers,
]
REPAIR = [
    "--sequences",
    "8",
    "--length",
    "16",
    "--batch-size",
    "4",
    "--dtype",
    "float32",
    "--json",
]


def as_records(rows, kind):
    """What `--json` prints, as records."""
    return [kind.model_validate_json(json.dumps(row)) for row in rows]


def test_repair_eval_generate_bench_and_export_work_together(
    run, folder, tmp_path, monkeypatch
):
    path, out = tmp_path / "plan.json", tmp_path / "repaired"
    Plan([2, 4], [3]).save(path)
    code, shown, err = run(
        "repair", folder, "--plan", path, "--out", out, *REPAIR, "--text", "prose"
    )
    assert (code, err) == (0, "")
    found = json.loads(shown)
    names = [name for refit in found["refits"] for name in refit["sublayers"]]
    assert names == ["attn.1", "mlp.1", "mlp.2", "attn.3", "mlp.4", "attn.5", "mlp.5"]
    assert [row["model"] for row in found["quality"]] == ["skipped", "repaired"]
    verdict = found["verdict"]
    assert verdict["said"].startswith("Without 2 of 6 attentions and 1 of 6 MLPs: ")
    assert verdict["delta_nll"] == found["quality"][1]["quality"]["delta_nll"]
    assert (verdict["text"], verdict["usable"]) == ("prose, other windows", False)
    assert verdict["next"] == f"notall heal {folder} --plan {out} --out healed"
    assert as_records(found["refits"], RefitRecord) == read(
        out / "refits.jsonl", RefitRecord
    )
    assert str(tmp_path) not in (out / "refits.jsonl").read_text()
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert read(out / "measured.jsonl", MeasuredRecord) == as_records(
        found["quality"], MeasuredRecord
    )
    with monkeypatch.context() as patched:  # it goes on, with nothing left
        for module in (quality, streams):
            patched.setattr(
                module, "record", lambda *_, **__: pytest.fail("a forward pass")
            )
        code, again, _ = run(
            "repair", folder, "--plan", path, "--out", out, *REPAIR, "--text", "prose"
        )
    assert (code, json.loads(again)) == (0, found)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    code, shown, warned = run("eval", folder, "--plan", out, *QUICK, "--json")
    assert (
        not warned
    )  # on windows of prose that it was not repaired with: test_apart.py
    other = tmp_path / "other.txt"
    other.write_text("What it was not repaired with. " * 50)
    assert "prose" not in run("eval", folder, "--plan", out, *QUICK, "--text", other)[2]
    dense, skipped, repaired = json.loads(shown)["quality"]
    assert code == 0
    assert [row["model"] for row in (dense, skipped, repaired)] == [
        "dense",
        "skipped",
        "repaired",
    ]
    assert len({row["quality"]["nll"] for row in (dense, skipped, repaired)}) == 3
    code, shown, _ = run("bench", folder, "--plan", out, *FAST, "--json")
    (timed,) = json.loads(shown)["bench"]
    assert (code, timed["plan"]) == (0, {"attention": [2, 4], "mlp": [3]})
    said = [
        run("generate", folder, "--plan", plan, "--max-new-tokens", "8", "abc")
        for plan in (path, out)
    ]
    assert [code for code, *_ in said] == [0, 0]
    assert said[0][1] != said[1][1]
    code, _, err = run(
        "export",
        folder,
        "--plan",
        out,
        "--to",
        "nemotron-nas",
        "--out",
        tmp_path / "e",
        "--no-verify",
    )
    assert code == 0, err
    sound = run(
        "export",
        folder,
        "--plan",
        path,
        "--to",
        "nemotron-nas",
        "--out",
        tmp_path / "p",
        "--no-verify",
    )
    assert sound[0] == 0
    weights = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("e", "p")
    ]
    assert weights[0] != weights[1]


def test_repair_measures_on_the_texts_it_is_given(run, folder, tmp_path):
    path, out = tmp_path / "plan.json", tmp_path / "repaired"
    Plan([4]).save(path)
    for name, words in (
        ("one", "the river runs "),
        ("two", "a green bird sings "),
        ("three", "old winter light "),
    ):
        (tmp_path / f"{name}.txt").write_text(words * 200)
    texts = [
        word for name in ("one", "two") for word in ("--text", tmp_path / f"{name}.txt")
    ]
    held_out = ["--held-out", tmp_path / "three.txt"]
    code, shown, err = run(
        "repair", folder, "--plan", path, "--out", out, *texts, *held_out, *REPAIR
    )
    assert (code, err) == (0, "")
    rows = json.loads(shown)["quality"]
    assert [(row["model"], row["quality"]["sequences"]) for row in rows] == [
        ("skipped", 16),
        ("repaired", 16),
    ]
    assert {row["text"] for row in rows} == {"three.txt"}
    what = json.loads((out / "refits.jsonl").read_text().splitlines()[0])["provenance"][
        "what"
    ]
    assert [text["text"] for text in what["texts"]] == ["one.txt", "two.txt"]
    code, shown, _ = run(
        "repair", folder, "--plan", path, "--out", out, *texts, *REPAIR
    )
    found = json.loads(shown)
    lost = {
        row["text"]: row["quality"]["delta_nll"]
        for row in found["quality"]
        if row["model"] == "repaired"
    }
    assert [*lost] == ["one.txt, other windows", "two.txt, other windows"]
    said = found["verdict"]["said"]
    assert all(f" on {text}; " in said for text in lost), (
        "the last sentence tells of each text"
    )
    assert (found["verdict"]["text"], found["verdict"]["delta_nll"]) == next(
        iter(lost.items())
    )


def untimed(line):
    """A record without what differs from run to run."""
    return {
        name: value
        for name, value in line.items()
        if name not in ("provenance", "seconds")
    }


@pytest.mark.slow
def test_what_is_killed_while_it_measures_has_lost_nothing(run, folder, tmp_path):
    path, out = tmp_path / "plan.json", tmp_path / "repaired"
    Plan([4]).save(path)
    (tmp_path / "book.txt").write_text("the river runs under the old bridge " * 100)
    command = [
        "repair",
        folder,
        "--plan",
        path,
        "--out",
        out,
        "--text",
        tmp_path / "book.txt",
        *REPAIR,
    ]
    dies = (
        "import os; from api import repair_texts; repair_texts.evaluate = lambda *_:"
        " os._exit(9)"
    )
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
    path, repaired, out = (
        tmp_path / "plan.json",
        tmp_path / "repaired",
        tmp_path / "healed",
    )
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
        assert verdict["delta_nll"] == rows[1]["quality"]["delta_nll"]
        write, look = (
            f"notall export {folder} --plan {out / before} ",
            f"notall search {folder} --max-nll ",
        )
        assert verdict["next"].startswith(write if verdict["usable"] else look)
        assert read(out / before / "measured.jsonl", MeasuredRecord) == as_records(
            rows, MeasuredRecord
        )
        with monkeypatch.context() as patched:
            patched.setattr(
                quality, "record", lambda *_, **__: pytest.fail("it was measured again")
            )
            assert run(*command)[1] == shown
        assert run("eval", folder, "--plan", out / before, *QUICK)[0] == 0


@pytest.mark.slow
def test_heal_trains_what_it_is_told_to_on_text_that_the_model_wrote(
    run, folder, tmp_path
):
    path, out = tmp_path / "plan.json", tmp_path / "healed"
    Plan([4]).save(path)
    heal = ["--tokens", "64", "--length", "16", "--dtype", "float32", "--json"]
    command = ["heal", folder, "--plan", path, *heal]
    asked = ["--sample", "--train", "lora", "--rank", "2", "--warm-up", "0.5"]
    code, shown, err = run(*command, "--out", out, *asked)
    assert (code, err) == (0, "")
    looks = json.loads(shown)["healing"]
    assert all(
        {"held_out_kl", "held_out_nll", "held_out_agreement"} <= look.keys()
        for look in looks
    )
    (step,) = RepairedPlan.load(out).history
    assert (step.sampled, step.train, step.rank, step.warm_up) == (True, "lora", 2, 0.5)
    assert "16 tokens that it wrote itself from the first words of mix" in str(step)
    (text,) = out.glob("sampled-*.safetensors")
    assert digests.digest_of([load_file(text)["ids"]])[:16] == step.training
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


def test_what_repair_cannot_take_is_one_line(run, folder, tmp_path):
    plan, nothing, unfinished = (
        tmp_path / "plan.json",
        tmp_path / "nothing.json",
        tmp_path / "unfinished",
    )
    Plan([4]).save(plan)
    Plan().save(nothing)
    out = tmp_path / "repaired"
    assert run("repair", folder, "--plan", plan, "--out", out, *REPAIR)[0] == 0
    shutil.copytree(out, unfinished)
    (unfinished / SEAL).unlink()
    bare = tmp_path / "bare"
    shutil.copytree(out, bare)
    (bare / "plan.json").unlink()
    other = tmp_path / "other"
    other.mkdir()
    (other / "bench.jsonl").write_text('{"record": "bench"}\n')
    torn = tmp_path / "torn"
    shutil.copytree(out, torn)
    next(torn.glob("*.safetensors")).write_bytes(b"torn")
    cases = {
        "no plan": (
            ["repair", folder, "--out", tmp_path / "n", *REPAIR],
            "with --plan",
        ),
        "a plan of nothing": (
            ["repair", folder, "--plan", nothing, "--out", tmp_path / "n", *REPAIR],
            "skips nothing",
        ),
        "one window": (
            [
                "repair",
                folder,
                "--plan",
                plan,
                "--out",
                tmp_path / "n",
                *REPAIR,
                "--sequences",
                "1",
            ],
            "too few",
        ),
        "other settings": (
            ["repair", folder, "--plan", plan, "--out", out, *REPAIR, "--seed", "1"],
            "another",
        ),
        "a folder of another command": (
            ["repair", folder, "--plan", plan, "--out", other, *REPAIR],
            "notall bench",
        ),
        "a repair that is not finished": (
            ["eval", folder, "--plan", unfinished, *QUICK],
            "was not finished",
        ),
        "a repair without its plan": (
            ["eval", folder, "--plan", bare, *QUICK],
            "lacks plan.json",
        ),
        "a folder of something else": (
            ["eval", folder, "--plan", other, *QUICK],
            "is no repaired plan",
        ),
        "torn weights": (["eval", folder, "--plan", torn, *QUICK], "is damaged"),
    }
    for case, (arguments, says) in cases.items():
        code, _, err = run(*arguments)
        assert (code, len(err.strip().splitlines())) == (2, 1), (case, err)
        assert says in err, (case, err)
        assert len(err) < 300 + len(str(tmp_path)), (case, err)


def of(model, lost, error, text="b.txt"):
    """A measurement of a plan that loses so many nats."""
    figures = dict.fromkeys(Quality.model_fields, 0.0) | {
        "delta_nll": lost,
        "delta_nll_se": error,
        "sequences": 8,
    }
    return MeasuredRecord(
        text=text, model=model, plan=Plan([1]), quality=Quality(**figures)
    )


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ((0.5, 0.02), (0.53, 0.02), ""),
        ((0.5, 0.02), (0.4, 0.02), ""),
        ((0.5, None), (0.53, None), ""),  # of one window nothing is known
        ((0.5, 0.02), (0.56, 0.02), ""),  # 2.1 errors of eight windows
        ((0.5, 0.02), (0.6, 0.02), "0.600 nats where it was 0.500"),
        ((0.5, 0.02), (None, None), "inf nats where it was 0.500"),  # it overflows
        ((None, None), (0.6, 0.02), ""),
        ((None, None), (None, None), ""),
    ],
)
def test_a_repair_that_makes_it_worse_is_told(capsys, before, after, told):
    warn(
        [
            of("skipped", *before),
            of("repaired", *after),
            of("repaired", 9.0, 0.1, "another.txt"),
        ]
    )
    said = capsys.readouterr().err
    assert (
        said.startswith(f"warning: the repair makes it worse on b.txt: {told}")
        if told
        else said == ""
    )
