"""The command line as people type it: its help, and one clear line with exit code 2 for
bad input.
"""

import inspect
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from importlib.util import find_spec

import pytest
import typer

import notall
from api import CRITERIA, ModelOptions, RayOptions, cli, compare_module, extras
from command_line import MLPS, QUICK, TIMED
from notall import Plan, UsageError

pytestmark = [
    pytest.mark.usefixtures("short_prose"),
    # of words and exit codes; what cannot be loaded is tested on both
    pytest.mark.any_transformers,
]


# --- bad input
# --------------------------------------------------------------------------------------


def bad_inputs(folder, tmp_path):
    plan, other, everything, torn = (
        tmp_path / name for name in ("plan", "other", "everything", "torn")
    )
    Plan([1, 77]).save(plan)
    Plan([1], fingerprint="llama-2x8-00000000").save(other)
    Plan(range(6), range(6)).save(everything)
    torn.write_text('{"attention": [1, ')
    empty, short, results = (
        tmp_path / "empty.txt",
        tmp_path / "short.txt",
        tmp_path / "results",
    )
    empty.write_text("")
    short.write_text("too short")
    results.mkdir()
    (results / "results.jsonl").write_text('{"record": "sweep"\n{"record": "sweep"}\n')
    file = tmp_path / "file"
    file.write_text("")
    sweep = ["sweep", folder, *QUICK, *TIMED, "--out"]
    return {
        "an unknown model": (["eval", "no/such-model", *MLPS], "no/such-model"),
        "a folder that holds no model": (["eval", tmp_path, *MLPS], "config.json"),
        "an unknown kind": (["plan", folder, "--skip", "heads"], "heads"),
        "a number that is none": (
            ["plan", folder, "--skip", "mlp:-1"],
            "--skip mlp:-1 is no kind and number",
        ),
        "two numbers": (
            ["eval", folder, "--skip", "mlp:1,2", *QUICK],
            "asks for several plans: give one number",
        ),
        "more than all": (
            ["plan", folder, "--skip", "mlp:7"],
            "cannot skip 7 of 6 MLPs: give",
        ),
        "a kind that has no deepest": (
            ["plan", folder, "--skip", "portable:4"],
            "`notall search --skip portable:4`",
        ),
        "half a layer": (
            ["plan", folder, "--skip", "mlp:1.5"],
            "give a whole one, or a share below 1",
        ),
        "a plan that names no layer of the model": (
            ["eval", folder, "--plan", plan, *QUICK],
            "0 to 5",
        ),
        "a plan for another model": (
            ["eval", folder, "--plan", other, *QUICK],
            "made for llama-2x8",
        ),
        "a plan that skips everything": (
            ["eval", folder, "--plan", everything, *QUICK],
            "keep at least one",
        ),
        "nothing to leave out": (
            ["eval", folder],
            "--plan plan.json (of notall search), or --skip attention",
        ),
        "two things to leave out": (
            ["generate", folder, "a", "--plan", plan, *MLPS],
            "give one of them",
        ),
        "a share of less than a layer": (
            ["plan", folder, "--skip", "mlp:0.01"],
            "none of them: give a larger",
        ),
        "a last layer of nothing": (["bench", folder, "--keep-last"], "add --skip"),
        "a truncated plan": (["eval", folder, "--plan", torn], "not valid JSON"),
        "a missing plan": (
            ["eval", folder, "--plan", tmp_path / "absent"],
            "cannot read",
        ),
        "an empty text": (["eval", folder, *MLPS, "--text", empty, *QUICK], "empty"),
        "a short text": (["eval", folder, *MLPS, "--text", short, *QUICK], "tokens"),
        "a missing text": (
            ["eval", folder, *MLPS, "--text", tmp_path / "absent", *QUICK],
            "cannot read",
        ),
        "no prompts to answer": (
            [
                "heal",
                folder,
                "--plan",
                plan,
                "--text",
                f"answers:{tmp_path / 'absent'}",
            ],
            "give a file of prompts",
        ),
        "malformed results": ([*sweep, results], "line 1"),
        "an unwritable folder": ([*sweep, file], "cannot"),
        "an unknown dtype": (["eval", folder, "--dtype", "float13", *MLPS], "float13"),
        "an unknown device": (["eval", folder, "--device", "tpu9", *MLPS], "tpu9"),
        "a shape with no weights": (
            ["bench", "--shape", "llama-2-7b"],
            "--dummy-weights",
        ),
        "a report of no results": (["report", tmp_path / "absent"], "notall sweep"),
        "an unwritable plan": (
            ["plan", folder, "-o", file / "plan.json"],
            "cannot write",
        ),
        "a misspelt command": (["serach", folder], "'search'"),
        "a misspelt option": (["eval", folder, "--sed", "3"], "--seed"),
        "an option without its value": (
            ["eval", folder, "--seed"],
            "requires an argument",
        ),
        "a word for a number": (["eval", folder, "--length", "long"], "--length"),
        "a word too long": (["eval", folder, "--length", "long" * 999], "--length"),
        "a word too many": (["inspect", folder, folder], "see `notall inspect --help`"),
        "a misspelt kind": (
            ["search", folder, "--skip", "atention:1"],
            "'atention' (did you mean attention?)",
        ),
        "a misspelt value": (
            ["heal", folder, "--train", "lra"],
            "(did you mean lora?)",
        ),
        "a misspelt dtype": (
            ["eval", folder, "--dtype", "bfloat", *MLPS],
            "(did you mean bfloat16?)",
        ),
        "a misspelt model": (["inspect", "smolm2"], "(did you mean smollm2?)"),
        "no prompt": (["generate", folder], "see `notall generate --help`"),
    }


def test_bad_input_is_one_line_that_names_the_fix_and_exit_code_2(
    run, folder, tmp_path
):
    for case, (arguments, says) in bad_inputs(folder, tmp_path).items():
        code, _, err = run(*arguments)
        assert code == 2, (case, code, err)
        assert says in err, (case, err)
        assert "Traceback" not in err, case
        assert err.startswith("error: "), (case, err)
        assert len(err.strip().splitlines()) == 1, (case, err)
        assert len(err) < 300 + len(str(tmp_path)), (case, err)


KINDS_OF = {
    "sweep": "bench",
    "compare": "bench",
    "search": "bench",
    "paper": "bench",
    "bench": "sweep",
}
KINDS_OF |= {"draft": "bench", "eval": "bench", "pareto": "bench"}


@pytest.mark.parametrize("command", KINDS_OF)
def test_a_folder_of_another_command_is_refused_before_any_work(run, tmp_path, command):
    out = tmp_path / ("plan.search" if command == "search" else "out")
    out.mkdir()
    (out / "other.jsonl").write_text(f'{{"record": "{KINDS_OF[command]}"}}\n')
    given = tmp_path / "plan.json" if command == "search" else out
    code, _, err = run(command, tmp_path / "no-model", "--out", given)
    assert code == 2
    assert f"holds results of notall {KINDS_OF[command]} (other.jsonl)" in err
    assert err.rstrip().endswith(f"choose another folder for notall {command}")


@pytest.mark.parametrize(
    ("lacks", "command"),
    [
        ("vl_convert", ["similarity", "--out", "OUT"]),
        ("vl_convert", ["paper", "--out", "OUT"]),
        ("vl_convert", ["report", "-o", "OUT"]),
        ("lm_eval", ["paper", "--out", "OUT"]),
        ("lm_eval", ["eval", "--skip", "mlp", "--tasks", "arc_easy", "--out", "OUT"]),
        (
            "lm_eval",
            [
                "search",
                "--skip",
                "mlp:1",
                "--objective",
                "kl + task:arc_easy",
                "-o",
                "OUT",
            ],
        ),
        ("lm_eval", ["compare", "--tasks", "arc_easy", "-o", "OUT"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_an_extra_that_lacks_is_named_before_any_work(
    run, folder, tmp_path, monkeypatch, lacks, command
):
    monkeypatch.setattr(
        extras, "find_spec", lambda name: None if name == lacks else find_spec(name)
    )
    name, *options = [tmp_path / "out" if word == "OUT" else word for word in command]
    code, out, err = run(name, folder, *options)
    assert (code, out) == (2, "")
    assert (
        err
        == f"error: this needs {lacks}: pip install 'notall[{extras.EXTRAS[lacks]}]'\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lacks", ["vl_convert", None])
def test_all_criteria_are_compared_but_those_whose_extra_lacks(
    run, folder, tmp_path, monkeypatch, lacks
):
    def stop(subject, runs, *_, **__):
        raise UsageError(" ".join(one.criterion for one in runs))

    monkeypatch.setattr(
        extras, "find_spec", lambda name: None if name == lacks else find_spec(name)
    )
    monkeypatch.setitem(
        CRITERIA, "quadratic", replace(CRITERIA["quadratic"], needs=("vl_convert",))
    )
    monkeypatch.setattr(compare_module, "compare_criteria", stop)
    code, _, err = run(
        "compare", folder, "--skip", "attention:1", "-o", tmp_path / "c", *QUICK
    )
    assert code == 2
    assert "cosine" in err
    assert ("quadratic" in err) == (not lacks)


# --- how a command ends
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["Ctrl-C", "a signal"])
def test_an_interrupted_command_says_so_in_one_line(run, folder, monkeypatch, how):
    def interrupt(*_):
        if how == "a signal":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        raise KeyboardInterrupt

    monkeypatch.setattr(ModelOptions, "empty", interrupt)
    code, out, err = run("inspect", folder)
    assert (code, out) == (130, "")
    assert (
        err == "interrupted: what is finished is kept; run the same command again to go"
        " on\n"
    )


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_what_was_written_stays(
    run, folder, tmp_path, monkeypatch
):
    out = tmp_path / "r"
    sweep = ["sweep", folder, "--out", out, *QUICK, *TIMED]
    assert run(*sweep)[0] == 0
    path = out / "results.jsonl"
    kept = "".join(path.read_text().splitlines(keepends=True)[:5])
    path.write_text(kept)

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = run(*sweep)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "No space left" in err
    assert path.read_text() == kept


def test_a_warning_is_one_line_without_code(run, monkeypatch):
    before = warnings.formatwarning
    said = "the kept times\nno longer hold \x1b[31m"
    monkeypatch.setattr(
        cli,
        "app",
        lambda **_: print(
            warnings.formatwarning(said, UserWarning, "latency.py", 9), end=""
        ),
    )
    assert run()[1] == "warning: the kept times no longer hold \\x1b[31m\n"
    assert warnings.formatwarning is before


def test_what_python_says_of_the_syntax_of_others_code_is_dropped(monkeypatch):
    """Of a package whose files are compiled where it is first imported."""
    monkeypatch.setattr(cli, "app", lambda **_: compile("1 is 1", "<task>", "eval"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        with pytest.raises(SystemExit):
            cli.main()
    assert not seen


@pytest.mark.parametrize(
    ("words", "address"),
    [
        ("", None),
        ("--ray", "any"),
        ("--ray --ray-gpus 2", "any"),
        ("--ray local", "local"),
        ("--ray=auto", "auto"),
    ],
)
def test_ray_may_stand_without_an_address(
    run, folder, tmp_path, monkeypatch, words, address
):
    asked = []

    def no_cluster(given, *_):
        asked.append(given.ray)
        raise UsageError("there is no cluster in this test")

    monkeypatch.setattr(RayOptions, "workers", no_cluster)
    code, _, said = run("sweep", folder, "--out", tmp_path, *QUICK, *words.split())
    assert (code, asked) == (2, [address]), said


# --- the help
# --------------------------------------------------------------------------------------


def test_notall_alone_says_what_to_do_first(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    for line in (
        "notall search MODEL --recovery 0.95 --tasks passkey,answers",
        "notall report plan.search -o report.html",
        "notall sweep --out results",
    ):
        assert f"  {line}\n" in out
    assert run("--version")[1] == f"notall {notall.__version__}\n"


def commands():
    return {
        name: one.loaded()
        for name, one in typer.main.get_command(cli.app).commands.items()
    }


def test_the_help_is_a_tour_with_an_example_for_each_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for words in (
        "Look at a model",
        "Choose what to skip",
        "Measure what",
        "Show results",
        (
            "Exit codes: 0 done; 2 bad input, named in one line with the fix; 3 done,"
            " but the budget was missed"
        ),
    ):
        assert words in " ".join(out.split())
    for name, command in commands().items():
        assert f" {name} " in out
        assert command.rich_help_panel in out, name
        assert f"notall {name} " in command.epilog, name
        example = shlex.split(command.epilog.partition("Example:")[2])[2:]
        command.make_context(name, example)  # every option of the example exists


def test_no_command_has_more_than_ten_parameters_of_its_own():
    for name, command in commands().items():
        assert (
            len(inspect.signature(inspect.unwrap(command.callback)).parameters) <= 10
        ), name


@pytest.mark.parametrize("width", ["80", "1000"])
def test_no_word_of_the_help_is_lost_as_markup_or_cut(run, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    for name, command in commands().items():
        shown = run(name, "--help")[1]
        options = [
            word
            for param in command.params
            if param.param_type_name == "option"
            for word in param.opts
        ]
        for text in (
            command.help,
            command.epilog,
            *options,
            *(param.help or "" for param in command.params),
        ):
            for word in text.replace("[bold]", "").replace("[/bold]", "").split():
                assert word in shown, (name, word)
        assert not re.findall("<[^>\n]*$", shown, re.M), name


def test_every_command_that_prints_a_table_has_json(run):
    without = {
        name
        for name, command in commands().items()
        if "--json" not in {o for p in command.params for o in p.opts}
    }
    assert without == {"generate", "recipe", "report"}  # which print none


def test_no_color_means_none():
    """Of help, which is the most colourful, and needs no torch."""
    command = [sys.executable, "-m", "notall", "report", "--help"]
    coloured, plain = (
        subprocess.run(
            command,
            env={**os.environ, "FORCE_COLOR": "1", **more},
            capture_output=True,
            check=True,
        ).stdout
        for more in ({}, {"NO_COLOR": "1"})
    )
    colours = rb"\x1b\[[0-9;]*3[0-9][0-9;]*m"
    assert re.search(colours, coloured)
    assert not re.search(colours, plain)


def test_the_list_of_commands_imports_none_of_them():
    """Each is imported when it is called: the list would take twice as long."""
    told = (
        "import sys, runpy; sys.argv = ['notall', '--help']\ntry:"
        " runpy.run_module('notall', run_name='__main__')\n"
    )
    told += (
        "finally: print([name for name in sys.modules if name.split('.')[0] in"
        " ('pydantic', 'numpy', 'torch')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", told], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("module", ["notall", "notall.cli"])
def test_importing_it_is_light(module):
    code = (
        f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch',"
        " 'transformers', 'altair')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_closed_stdout_is_no_fault(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notall", "criteria"])
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert not leaving.value.code


def test_a_path_is_absolute_for_processes_elsewhere_and_a_name_stays_one(
    tmp_path, monkeypatch
):
    """The default model also where a folder is called as it is, and what may be a hub
    id.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2", "mine"):
        (tmp_path / name).mkdir()
    asked = {
        name: ModelOptions(name).for_workers["spec"]
        for name in ("smollm2", "mine", "./mine", "some/one")
    }
    mine = str(tmp_path / "mine")
    assert asked == {
        "smollm2": "smollm2",
        "mine": mine,
        "./mine": mine,
        "some/one": "some/one",
    }
    assert (
        ModelOptions("mine", dtype="float32").for_workers
        == ModelOptions(mine, dtype="float32").arguments
    )
