"""notall slim: the steps of other commands in turn, what it shows in the end, going on
after each of them, and what it refuses before any of them.
"""

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip(
        "lm_eval is absent: pip install 'notall[eval]'", allow_module_level=True
    )

from api import (
    BenchRecord,
    Search,
    SlimRecord,
    Verdict,
    read,
    search_steps,
    slim_module,
)
from command_line import FAST, QUICK
from notall import Plan, UsageError, load
from tiny_checkpoint import save_tiny_checkpoint

# What a release of transformers may change of a step is in that step's own tests.
pytestmark = [
    pytest.mark.slow,  # minutes of other commands
    pytest.mark.any_transformers,
    pytest.mark.usefixtures("own_tasks_only", "short_prose"),
]
TEXTS = ["--text", "prose", "--repair-text", "prose", "--repair-sequences", "4"]
SMALL = [*TEXTS, *QUICK, *FAST[:-2], "--tasks", "answers", "--limit", "4"]
ASKED = ["slim", "tiny", *SMALL, "--max-minutes", "1", "--out", "out"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a checkpoint that has room for an answer."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_checkpoint(
        folder / "tiny", num_hidden_layers=4, max_position_embeddings=512
    )
    return folder


@pytest.fixture
def place(models, tmp_path, monkeypatch):
    """The working folder, with the checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(models / "tiny")
    return tmp_path


@pytest.fixture
def searched(models, place, run, monkeypatch):
    """The working folder with a run that was interrupted before it timed anything; what
    it printed on stderr.
    """
    with monkeypatch.context() as patch:
        patch.setattr(slim_module.benching, "bench", interrupt)
        if not (kept := models / "kept").exists():
            code, out, err = run(*ASKED)
            assert (code, out) == (130, ""), err
            shutil.copytree("out", kept)
            (models / "err.txt").write_text(err)
    shutil.copytree(kept, "out", dirs_exist_ok=True)
    return (models / "err.txt").read_text()


def interrupt(*_, **__):
    raise KeyboardInterrupt


def never(*_, **__):
    pytest.fail("it was done again")


def steps_in(err):
    """The commands that the steps are said to be."""
    return [
        shlex.split(line)[2:] for line in err.splitlines() if line.startswith("doing: ")
    ]


def test_it_searches_times_and_exports_and_goes_on(searched, run, monkeypatch):
    """A first run ends before the times, a second one before the second export."""
    assert [words[0] for words in steps_in(searched)] == ["search", "bench"]
    assert "engines here: " in searched
    assert re.search("about [0-9]+ to [0-9]+ minutes here: ", searched)
    monkeypatch.setattr(Search, "run", never)
    exports = []

    def first_alone(*given, **how):
        exports.append(given[3])
        return interrupt() if len(exports) > 1 else export(*given, **how)

    export = slim_module.export
    with monkeypatch.context() as patch:
        patch.setattr(slim_module, "export", first_alone)
        code, _, err = run(*ASKED)
    assert code == 130, err
    assert [words[0] for words in steps_in(err)] == [
        "bench",
        "bench",
        "export",
        "export",
    ]
    assert Path("out/model").is_dir()
    assert not Path("out/model-prefill").exists()
    monkeypatch.setattr(slim_module.benching, "bench", never)
    code, shown, err = run(*ASKED, "--json")
    assert code in (0, 3), err
    cards = [f"out/{name}.bench" for name in ("plan", "plan-prefill")]
    assert [words[-1] for words in steps_in(err)] == ["out/model-prefill", *cards]
    check_told(json.loads(shown))
    code, shown, err = run(*ASKED)
    assert [words[0] for words in steps_in(err)] == ["card", "card"]
    told = " ".join(shown.split())
    assert "For every token: out/model. Check: transformers" in told
    assert "For the prompt: out/model-prefill. Check: transformers" in told
    assert "Next: notall generate out/model 'The capital of France is'" in told
    prompt = "'The capital of France is' --plan out/plan-prefill.repaired"
    assert f"Next: notall generate tiny {prompt}" in told
    assert "Report: notall report out -o out/report.html" in told
    assert run("report", "out", "-o", "out/report.html")[0] == 0
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert "What is kept of what the original model can do" in page
    card = Path("out/model/README.md").read_text(encoding="utf-8")
    for shown in ("| answers |", "first token speedup", "notall export tiny"):
        assert shown in card


def check_told(told):
    """Against the files that the steps wrote."""
    every, prompt = told["gained"]
    assert (every["skipped_for"], prompt["skipped_for"]) == (
        "every token",
        "the prompt",
    )
    for row, name in ((every, "plan"), (prompt, "plan-prefill")):
        (timed,) = read(Path(f"out/{name}.bench") / BenchRecord.file, BenchRecord)
        assert row["times"] == timed.skipped.times.model_dump(mode="json")
        plan = Plan.load(f"out/{name}.json")
        assert timed.plan.indices == plan.indices
        assert row["skipped"] == plan.in_words()
        assert 0 < row["share"] < 1
    assert {one["skipped_for"] for one in told["kept"]} == {"every token", "the prompt"}
    assert {one["score"]["model"] for one in told["kept"]} == {"repaired"}
    assert told["verdict_plan"]["speedup"] == every["times"]["speedup_decode"]["median"]
    speedup = prompt["times"]["speedup_prefill"]["median"]
    assert told["verdict_plan-prefill"]["speedup"] == speedup
    net, _ = load("out/model", trust_remote_code=True)
    assert net.num_parameters() == every["footprint"]["params"]


def test_the_commands_that_it_names_ask_for_the_same(searched, run, monkeypatch):
    asked = []

    def catch(search, progress):
        asked.append(search)
        raise UsageError("caught")

    monkeypatch.setattr(Search, "run", catch)
    shutil.rmtree("out")
    more = ["--device", "cpu", "--keep-last", "--seed", "3", "--task-batch-size", "2"]
    code, _, err = run(*ASKED, *more, "--limit", "answers=2")
    assert code == 2, err
    (search,) = steps_in(err)
    assert run(*search)[0] == 2
    ours, theirs = asked
    assert vars(ours) | {"workload": None} == vars(theirs) | {"workload": None}


def test_a_step_records_the_command_that_it_is(searched):
    (record,) = read(Path("out") / SlimRecord.file, SlimRecord)
    assert record.found == ("plan", "plan-prefill")
    assert record.provenance.command[:2] == ["notall", "slim"]
    chosen = json.loads(
        Path("out/plan.search/chosen.jsonl").read_text().splitlines()[0]
    )
    search, _ = steps_in(searched)
    assert shlex.split(chosen["provenance"]["where"]["command"]) == ["notall", *search]


def test_a_set_that_is_of_no_use_is_not_exported(searched, run, monkeypatch):
    monkeypatch.setattr(Verdict, "usable", False)
    monkeypatch.setattr(Verdict, "faults", ["perplexity has more than doubled"])
    code, shown, err = run(*ASKED)
    assert code in (0, 3), err
    told = " ".join(shown.split())
    assert "For the prompt: not exported, as perplexity has more than doubled." in told
    assert "Next: notall heal tiny --plan out/plan.repaired --out healed" in told
    assert not Path("out/model").exists()


def test_an_export_without_a_form_for_prompts_is_of_every_token(
    place, run, monkeypatch
):
    searches = []

    def catch(search, progress):
        searches.append(search.space.phase)
        raise UsageError("caught")

    monkeypatch.setattr(Search, "run", catch)
    code, _, err = run(*ASKED, "--to", "nemotron-nas")
    assert (code, searches) == (2, ["all"]), err
    assert "note: for every token alone: " in err
    code, _, err = run(*ASKED, "--to", "nemotron-nas", "--phase", "prefill")
    assert (code, searches) == (2, ["all"]), err
    assert err.startswith("error: ")


def lay(path, text="theirs"):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


REFUSED = {
    "no share": (["--recovery", "1.5"], "--recovery 1.5 is no share"),
    "no form": (["--to", "hff"], "'hff'"),
    "no task": (["--tasks", "answer"], "answer"),
    "no text": (["--repair-text", "absent.txt"], "absent.txt"),
    "no method": (["--repair", "refitt"], "refitt"),
    "no time": (["--max-minutes", "-1"], "-1"),
    "no kind": (["--skip", "atention"], "'atention' (did you mean attention?)"),
    "too long a prompt": (
        ["--prompt-tokens", "4000"],
        "exceed the model's 512 positions",
    ),
    "another's folder": (["--out", "bench"], "holds results of notall bench"),
    "a folder in place": (["--out", "there"], "exists already"),
    "a plan in place": (["--out", "file"], "plan.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_refuses_before_anything_is_loaded(place, run, monkeypatch, case):
    monkeypatch.setattr("notall.models.loading.load", never)
    lay("bench/bench.jsonl", '{"record": "bench"}\n')
    lay("there/model/theirs.txt")
    lay("file/plan.json")
    words, says = REFUSED[case]
    code, out, err = run(*ASKED, *words)
    assert (code, out) == (2, ""), err
    error = err.splitlines()[-1]
    assert error.startswith("error: ")
    assert says in error
    assert not Path("out").exists()


def test_another_run_in_its_folder_is_refused(searched, run, monkeypatch):
    monkeypatch.setattr("notall.models.loading.load", never)
    code, _, err = run(*ASKED, "--recovery", "0.9")
    assert code == 2
    assert "out holds results with recovery 0.95, not 0.9; choose another folder" in err


def test_what_is_no_export_of_its_set_is_refused(searched, run):
    lay("out/model/notall.json", '{"plan": {"attention": []}, "files": {}}')
    code, _, err = run(*ASKED)
    assert code == 2
    assert "out/model exists already" in err


def test_it_takes_longer_for_both_phases_and_before_the_mix_is_written(place):
    net, tokenizer = load("tiny")

    def steps(**changed):
        how = {"phase": None, "text": "prose", "repair": "refit"} | changed
        asked = slim_module.Slim.of(
            slim_module.ModelOptions("tiny"),
            slim_module.SpaceOptions(phase=how["phase"]),
            slim_module.HeldOutOptions(text=how["text"]),
            slim_module.RecoveryOptions(tasks=("answers",), limit=("2",), recovery=0.9),
            slim_module.RepairOptions(how["repair"], ("prose",)),
            slim_module.Workload(),
            slim_module.SlimOptions(),
            Path("out"),
        ).search
        return search_steps(asked, net, tokenizer, asked.tasks.check())

    assert steps() == pytest.approx(steps(phase="all") + steps(phase="prefill"))
    assert steps(text="mix") > steps() > steps(repair="none") > 0
