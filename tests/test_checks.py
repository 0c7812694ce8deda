"""Everything is checked before anything is computed: what cannot be done is refused
without a forward pass.
"""

import os
import shutil
from collections import namedtuple
from importlib.util import find_spec

import pytest
from transformers import LlamaForCausalLM

from api import ModelOptions, latency, records_lines as lines, texts_mix
from command_line import FAST, QUICK
from notall import Plan, UsageError
from tiny_tasks import write_tasks

pytestmark = [
    pytest.mark.usefixtures("short_prose"),
    pytest.mark.any_transformers,
]  # before transformers is asked
needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm_eval is absent"
)


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan-to-read.json"
    Plan([2], [4]).save(path)
    return path


@pytest.fixture
def no_model(monkeypatch):
    """Nothing may be loaded."""
    monkeypatch.setattr(
        ModelOptions, "load", lambda *_: pytest.fail("a model was loaded")
    )


@pytest.fixture
def no_forward(monkeypatch):
    """The model may be looked at, with eight tokens, but compute nothing: what it
    writes itself is there already.
    """
    forward = LlamaForCausalLM.forward

    def looked_at(self, input_ids=None, **more):
        assert input_ids.numel() <= 8, "a forward pass was run"
        return forward(self, input_ids, **more)

    monkeypatch.setattr(LlamaForCausalLM, "forward", looked_at)
    river = "The river runs under the old stone bridge. " * 100
    monkeypatch.setattr(texts_mix._Author, "_written", lambda *_: [river])


TEXTS = {
    "search": ["--skip", "mlp:1", "--text", "NONE"],
    "search, held out": ["--skip", "mlp:1", "--held-out", "NONE"],
    "compare": ["--held-out", "NONE"],
    "eval": ["--plan", "PLAN", "--text", "NONE"],
    "eval, repair": ["--plan", "PLAN", "--repair", "refit", "--repair-text", "NONE"],
    "repair": ["--plan", "PLAN", "--held-out", "NONE"],
    "heal": ["--plan", "PLAN", "--text", "NONE"],
    "sweep": ["--text", "NONE"],
    "similarity": ["--text", "NONE"],
    "export": ["--plan", "PLAN", "--to", "hf", "--out", "OUT", "--measure", "NONE"],
    "export, repair": [
        "--plan",
        "PLAN",
        "--to",
        "hf",
        "--out",
        "OUT",
        "--repair",
        "refit",
        "--repair-text",
        "NONE",
    ],
}


def spelled(words, **names):
    return [names.get(word, word) for word in words]


@pytest.mark.parametrize("case", TEXTS)
def test_an_unreadable_text_is_refused_before_a_model_is_loaded(
    run, folder, plan, tmp_path, no_model, case
):
    words = spelled(
        TEXTS[case], NONE=tmp_path / "none.txt", PLAN=plan, OUT=tmp_path / "out"
    )
    code, _, err = run(case.partition(",")[0], folder, *words)
    assert code == 2
    assert err.startswith("error: cannot read the text ")
    assert err.count("\n") == 1


WRITING = {
    "search": ["--skip", "mlp:1", "-o", "FILE/plan.json"],
    "compare": ["-o", "FILE/out"],
    "eval": ["--plan", "PLAN", "-o", "FILE/out"],
    "bench": ["--plan", "PLAN", "-o", "FILE/out"],
    "repair": ["--plan", "PLAN", "-o", "FILE/out"],
    "heal": ["--plan", "PLAN", "-o", "FILE/out"],
    "sweep": ["-o", "FILE/out"],
    "paper": ["-o", "FILE/out"],
    "export": ["--plan", "PLAN", "--to", "hf", "-o", "FILE/out", "--measure", "prose"],
}


@pytest.mark.parametrize("command", WRITING)
def test_where_nothing_can_be_written_no_model_is_loaded(
    run, folder, plan, tmp_path, no_model, command
):
    if command == "paper" and not find_spec("lm_eval"):
        pytest.skip("lm_eval is absent")
    (tmp_path / "file").write_text("")
    words = [
        str(word).replace("FILE", str(tmp_path / "file"))
        for word in spelled(WRITING[command], PLAN=plan)
    ]
    code, _, err = run(command, folder, *words)
    assert code == 2
    assert "cannot write" in err
    assert "choose another folder" in err
    assert err.count("\n") == 1


def test_a_folder_that_may_not_be_written_is_refused_and_none_is_made(
    tmp_path, monkeypatch
):
    lines.refuse_unwritable(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UsageError, match=r"cannot write .*Permission denied"):
        lines.refuse_unwritable(tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "give one budget: --skip sublayer:N"),
        (["--speedup", "0.5"], "a speedup of 0.5 is none"),
        (["--speedup", "1.1", "--max-nll", "nan"], "not nan: give a limit"),
        (["--skip", "mlp:1", "--max-minutes", "-1"], "end after -1.0 minutes"),
        (["--skip", "mlp:1", "--objective", "joy"], "no objective 'joy'"),
        (
            ["--skip", "mlp:1", "--objective", "answers", "--prompts", "none.txt"],
            "cannot read the text none.txt",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_search_refuses_what_it_is_asked_before_a_model_is_loaded(
    run, folder, tmp_path, no_model, options, says
):
    code, _, err = run("search", folder, *options, "-o", tmp_path / "plan.json")
    assert (code, says in err) == (2, True), err


def test_a_speedup_is_timed_when_all_else_is_known_to_be_possible(
    run, folder, tmp_path, no_forward, monkeypatch
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("x" * 500)
    monkeypatch.setattr(
        latency, "measure_times", lambda *_, **__: pytest.fail("it was timed")
    )
    command = [
        "search",
        folder,
        "--speedup",
        "1.1",
        "-o",
        tmp_path / "plan.json",
        *QUICK,
    ]
    for options, says in (
        (["--prompt-tokens", "9999"], "exceed the model's 64 positions"),
        (
            [
                "--prompt-tokens",
                "8",
                "--generation-tokens",
                "2",
                "--objective",
                "answers",
                "--prompts",
                prompts,
            ],
            "exceed the model's 64",
        ),
    ):
        code, _, err = run(*command, *options)
        assert (code, says in err) == (2, True), err


IMPOSSIBLE = {
    "eval, another's plan": ["--plan", "DEEP", "--repair", "refit"],
    "repair, another's plan": ["--plan", "DEEP"],
    "heal, another's plan": ["--plan", "DEEP"],
    "sweep, too long to time": ["--prompt-tokens", "9999"],
    "paper, too long to time": ["--prompt-tokens", "9999", "--tasks", "tiny_choice"],
    "compare, too long to time": [
        "--rounds",
        "1",
        "--prompt-tokens",
        "9999",
        "--skip",
        "attention:1",
    ],
    "compare, too many": ["--skip", "attention:1", "--skip", "mlp:9"],
    "export, another's plan": ["--plan", "DEEP", "--to", "hf", "--measure", "prose"],
    "export, no such form": ["--plan", "PLAN", "--to", "gguf", "--repair", "refit"],
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_the_model_cannot_do_is_refused_before_a_forward_pass(
    run,
    folder,
    plan,
    tmp_path,
    no_forward,
    own_tasks_only,
    case,
):
    deep = tmp_path / "deep.json"
    Plan([40]).save(deep)
    command, _, _ = case.partition(",")
    if command == "paper" and not find_spec("lm_eval"):
        pytest.skip("lm_eval is absent")
    words = spelled(IMPOSSIBLE[case], PLAN=plan, DEEP=deep)
    if command == "paper":
        words += ["--task-path", write_tasks(tmp_path / "tasks")]
    code, _, err = run(command, folder, *words, "--out", tmp_path / "out")
    assert code == 2, err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@needs_harness
@pytest.mark.parametrize("command", ["eval", "paper", "compare", "search"])
def test_an_unknown_task_is_refused_before_a_model_is_loaded(
    run,
    folder,
    plan,
    tmp_path,
    no_model,
    own_tasks_only,
    command,
):
    words = {
        "eval": ["--plan", plan],
        "search": ["--skip", "mlp:1", "--objective", "task:tiny_chioce"],
    }.get(command, [])
    if command != "search":
        words += ["--tasks", "tiny_chioce"]
    code, _, err = run(
        command,
        folder,
        *words,
        "--task-path",
        write_tasks(tmp_path / "t"),
        "-o",
        tmp_path / "out",
    )
    assert code == 2
    assert "the harness has no task 'tiny_chioce'; did you mean tiny_choice" in err


@needs_harness
@pytest.mark.usefixtures("no_model", "own_tasks_only")
@pytest.mark.parametrize("command", ["eval", "paper"])
def test_a_limit_of_a_task_that_is_not_run_is_refused(
    run, folder, plan, tmp_path, command
):
    words = ["--plan", plan] if command == "eval" else []
    words += [
        "--tasks",
        "tiny_choice",
        "--task-path",
        write_tasks(tmp_path / "t"),
        "--limit",
        "tiny_choise=2",
    ]
    code, _, err = run(command, folder, *words, "-o", tmp_path / "out")
    said = (
        "error: --limit tiny_choise=2 is of no task that is run (did you mean"
        " tiny_choice?): tiny_choice\n"
    )
    assert (code, err) == (2, said)


@pytest.mark.parametrize("command", ["sweep", "eval", "search", "similarity", "paper"])
def test_windows_longer_than_the_model_reads_are_refused_before_a_forward_pass(
    run,
    folder,
    plan,
    tmp_path,
    no_forward,
    command,
):
    words = {
        "eval": ["--plan", plan],
        "search": ["--skip", "mlp:1"],
        "paper": ["--tasks", ""],
    }.get(command, [])
    if command == "paper" and find_spec("lm_eval") is None:
        pytest.skip("needs lm_eval")
    code, _, err = run(
        command,
        folder,
        *words,
        "--length",
        "65",
        "--sequences",
        "2",
        "-o",
        tmp_path / "out",
    )
    assert (code, err) == (
        2,
        "error: windows of 65 tokens exceed the model's 64 positions: lower --length\n",
    )


@needs_harness
@pytest.mark.parametrize("command", ["eval", "paper", "compare"])
def test_tasks_without_data_are_refused_before_a_forward_pass_and_the_folder_takes_other_settings(
    run,
    folder,
    plan,
    tmp_path,
    no_forward,
    own_tasks_only,
    command,
):
    tasks, out = write_tasks(tmp_path / "tasks"), tmp_path / "out"
    for file in tasks.glob("*.jsonl"):
        file.unlink()
    words = {"eval": ["--plan", plan], "compare": ["--skip", "attention:1"]}.get(
        command, []
    )
    short = [*QUICK[:4], *(FAST[:4] if command == "paper" else [])]
    code, _, err = run(
        command,
        folder,
        *words,
        "--tasks",
        "tiny_choice",
        "--task-path",
        tasks,
        "-o",
        out,
        *short,
    )
    assert code == 2
    assert "cannot build the requests of tiny_choice" in err
    assert not list(out.glob("*.jsonl"))


@pytest.mark.parametrize("target", ["hf", "nemotron-nas"])
@pytest.mark.parametrize("more", [[], ["--measure", "prose"]], ids=["", "measure"])
def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    run,
    folder,
    plan,
    tmp_path,
    no_forward,
    monkeypatch,
    target,
    more,
):
    disk = namedtuple("disk", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk(1 << 30, 1 << 30, 1 << 10))
    code, _, err = run(
        "export",
        folder,
        "--plan",
        plan,
        "--to",
        target,
        "--out",
        tmp_path / "out",
        *more,
    )
    assert code == 2
    assert "the export takes " in err
    assert "has 1.0 KiB left; free some, or choose another disk" in err
    assert not (tmp_path / "out").exists()
