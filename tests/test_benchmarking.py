"""Benchmarks in a folder: the records are what `run_tasks` says, and what is finished
is never done again.
"""

import importlib.util
from functools import partial

import pytest

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip(
        "lm_eval is absent: pip install 'notall[eval]'", allow_module_level=True
    )

import forked
from api import (
    BenchmarkRecord,
    Limits,
    Provenance,
    Scorer,
    Stages,
    TaskChoice,
    TaskShelf,
    benchmark,
    driver_Subject as Subject,
    paper_grid,
    read,
    records_lines as lines,
    tasks,
)
from notall import UsageError, locate
from tiny_tasks import byte_tokenizer, run_tasks, tiny_llama, write_tasks

pytestmark = [
    pytest.mark.usefixtures("own_tasks_only"),
    # of what a folder keeps; the answers themselves are tested on both, with the
    # harness
    pytest.mark.any_transformers,
]
ABOUT = {"model": "tiny", "revision": "none", "dtype": "float32", "threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def run_benchmarks(
    model,
    rows,
    names,
    out,
    about,
    *,
    task_path,
    limits,
    generating_rows=None,
    stages=None,
    **how,
):
    choice = TaskChoice(TaskShelf(task_path), tuple(names), limits=limits, **how)
    subject = Subject(model, byte_tokenizer(), [], out, Provenance.of(about))
    return benchmark(subject, rows, choice, generating_rows, stages)


@pytest.fixture
def run(model, folder):
    rows = paper_grid(locate(model))
    thirds = [row for row in rows if row.fraction in (0.0, 0.33)]
    limits = Limits(6, {"tiny_words": 2})
    return partial(
        run_benchmarks,
        model,
        rows,
        generating_rows=thirds,
        limits=limits,
        task_path=folder,
    )


@pytest.fixture
def nothing_computed(monkeypatch):
    def forbid(*_, **__):
        raise AssertionError("something finished is computed again")

    return lambda: [
        monkeypatch.setattr(Scorer, "score", forbid),
        monkeypatch.setattr(tasks.TaskShelf, "build", forbid),
    ]


def test_tasks_add_what_they_take_to_the_count_of_the_whole(
    run, model, folder, tmp_path
):
    told = []
    stages = Stages(lambda done, total, doing: told.append((done, total)), 1000)
    run(["tiny_choice", "tiny_words"], tmp_path, ABOUT, stages=stages)
    count = len(paper_grid(locate(model)))
    jobs = [
        TaskShelf(folder).build(name, None, limit).steps(plans)
        for name, limit, plans in (
            ("tiny_choice", 6, count),
            ("tiny_words", 2, 7),
        )  # dense and six of a third
    ]
    assert stages.steps == pytest.approx(1000 + sum(jobs))
    assert {total for _, total in told} == {stages.steps}
    assert told == sorted(told)
    assert stages.given == pytest.approx(stages.steps - 1000)


def test_records_are_the_results_of_the_same_run(run, model, folder, tmp_path):
    records = run(["tiny_choice"], tmp_path, ABOUT)
    assert read(tmp_path / BenchmarkRecord.file, BenchmarkRecord) == records
    rows = paper_grid(locate(model))
    plans = [row.plan for row in rows]
    expected = run_tasks(
        model, byte_tokenizer(), plans, ["tiny_choice"], limit=6, task_path=folder
    )
    by_key = {(r.variant, r.fraction, r.keep_last, r.metric): r for r in records}
    assert len(by_key) == len(records) == len(expected) == 19 * 2
    for result in expected:
        row = rows[result.number]
        record = by_key[(*row.configuration, result.score.metric)]
        assert record.plan.indices == row.plan.indices
        assert record.value == pytest.approx(result.score.value)
        assert record.delta == pytest.approx(result.score.delta)
        assert list(record.values) == [sample.value for sample in result.samples]
        assert record.documents == 6


def test_what_generates_text_is_run_where_it_was_asked_for(run, tmp_path):
    records = run(["tiny_words", "tiny_choice"], tmp_path, ABOUT)
    assert {r.fraction for r in records if r.task == "tiny_words"} == {0.0, 0.33}
    assert {r.documents for r in records if r.task == "tiny_words"} == {2}
    assert {r.fraction for r in records if r.task == "tiny_choice"} == {
        0.0,
        0.10,
        0.25,
        0.33,
    }


def test_a_finished_task_is_taken_from_the_folder(run, tmp_path, nothing_computed):
    first = run(["tiny_choice", "tiny_words"], tmp_path, ABOUT)
    held = (tmp_path / BenchmarkRecord.file).read_bytes()
    nothing_computed()
    assert run(["tiny_choice", "tiny_words"], tmp_path, ABOUT | {"threads": 8}) == first
    assert (tmp_path / BenchmarkRecord.file).read_bytes() == held


def test_records_that_an_interruption_left_out_are_added_once(
    run, tmp_path, monkeypatch
):
    run(["tiny_choice"], tmp_path, ABOUT)
    path = tmp_path / BenchmarkRecord.file
    whole = path.read_bytes()
    path.write_bytes(
        b"".join(whole.splitlines(keepends=True)[:7]) + b'{"task": "tiny_ch'
    )
    with pytest.warns(UserWarning, match="torn"):
        run(["tiny_choice"], tmp_path, ABOUT)
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize(
    "change",
    [
        {"fraction": 0.5},
        {"plan": {"attention": [0], "mlp": []}},
        *({"asked": wrong} for wrong in ("tiny_words", None, ["tiny_choice"])),
        {"records": None},
    ],
)
def test_records_of_another_row_or_task_are_made_again(run, tmp_path, change):
    first = run(["tiny_choice"], tmp_path, ABOUT)
    path = tmp_path / BenchmarkRecord.file
    held = lines.read_lines(path)
    about = {name: change[name] for name in change.keys() & {"asked", "records"}}
    damaged = held[0] | {
        name: value for name, value in change.items() if name not in about
    }
    damaged["provenance"] = {
        **held[0]["provenance"],
        "what": held[0]["provenance"]["what"] | about,
    }
    path.unlink()
    lines.append(path, damaged, *held[1:])
    again = run(["tiny_choice"], tmp_path, ABOUT)
    assert sorted(record.key for record in again) == sorted(
        record.key for record in first
    )
    assert {record.key: record.value for record in again} == {
        record.key: record.value for record in first
    }


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"limits": Limits(5)}, "results with limit"),
        ({"num_fewshot": 1}, "results with asked_fewshot"),
        ({"truncate": True}, "results with truncate"),
    ],
)
def test_other_settings_want_another_folder(run, tmp_path, changes, told):
    run(["tiny_choice"], tmp_path, ABOUT)
    with pytest.raises(UsageError, match=told):
        run(["tiny_choice"], tmp_path, ABOUT, **changes)
    with pytest.raises(UsageError, match="results with model"):
        run(["tiny_choice"], tmp_path, ABOUT | {"model": "other"})


def test_a_second_run_on_the_folder_is_told_so(run, tmp_path):
    with (
        lines.lock(tmp_path),
        pytest.raises(UsageError, match="another run is working"),
    ):
        run(["tiny_choice"], tmp_path, ABOUT)


def test_tasks_on_a_locked_folder_are_told_so(model, folder, tmp_path):
    with (
        lines.lock(tmp_path),
        pytest.raises(UsageError, match="another run is working"),
    ):
        run_tasks(
            model,
            byte_tokenizer(),
            [],
            ["tiny_choice"],
            task_path=folder,
            folder=tmp_path,
        )


KILLED = """
import sys
from functools import partial
from pathlib import Path
from lm_eval.tasks import TaskManager
from api import Limits, paper_grid, tasks
from notall import locate
from test_benchmarking import run_benchmarks
from tiny_tasks import tiny_llama
tasks.TaskManager = partial(TaskManager, include_defaults=False)
model = tiny_llama()
run_benchmarks(model, paper_grid(locate(model)), ["tiny_choice", "tiny_letters"], Path(sys.argv[1]),
               {"model": "tiny", "revision": "none", "dtype": "float32"}, limits=Limits(40), task_path=sys.argv[2],
               batch_size=1)
"""


@pytest.mark.slow
@pytest.mark.any_transformers
def test_killed_in_the_middle_it_goes_on(model, folder, tmp_path):
    assert forked.run(KILLED, tmp_path / "whole", folder).returncode == 0
    answers = tmp_path / "killed" / "answers.jsonl"
    forked.kill_at(answers, 21, KILLED, tmp_path / "killed", folder)
    before = answers.read_bytes()
    assert forked.run(KILLED, tmp_path / "killed", folder).returncode == 0
    after = answers.read_bytes()
    finished = before[: before.rfind(b"\n") + 1]
    assert after.startswith(finished)
    again = lines.read_lines(answers)
    keys = [
        (key, plan)
        for line in again
        for key in line["answers"]
        for plan in line["plans"]
    ]
    assert len(keys) == len(set(keys)), "an answer was computed twice"
    whole, killed = (
        read(tmp_path / name / BenchmarkRecord.file, BenchmarkRecord)
        for name in ("whole", "killed")
    )
    assert len(whole) == len(killed) == 2 * 2 * 19
    for ours, theirs in zip(killed, whole):
        assert ours.values == theirs.values


@pytest.mark.parametrize(
    "word", ["forty", "²", "9" * 5000, "mmlu=", "=3x", "0", "mmlu=0", "-3"]
)
def test_limits_that_are_none(word):
    with pytest.raises(UsageError, match="limit"):
        Limits.parse([word])


def test_a_limit_by_name_holds_for_the_local_task_too():
    limits = Limits.parse(["40", "mmlu=2"])
    assert (limits.of("local_mmlu"), limits.of("mmlu"), limits.of("hellaswag")) == (
        2,
        2,
        40,
    )
    assert Limits.parse([]).of("mmlu") is None
