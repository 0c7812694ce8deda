"""Records: what is written stays, and each is of a kind: torn lines, full disks, killed
writers, two processes.
"""

import json
import math
import os
import shlex
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest

from api import (
    HOMES,
    RECORD_KINDS,
    Answers,
    AnswersRecord,
    EvaluationRecord,
    HeaderRecord,
    Ledger,
    Provenance,
    ScoresRecord,
    SearchCost,
    SweepRecord,
    UsageError,
    experiments,
    header_of,
    kind_at,
    read,
    records_lines as lines,
    refuse_foreign,
    sealed,
    this_run,
    working_in,
)
from notall import Plan
from small_disk import room_for

pytestmark = pytest.mark.any_transformers  # it writes and reads lines of JSON

RECORDS = [
    {"variant": "attention", "nll": 2.5 + i, "plan": {"attention": [i, 29], "mlp": []}}
    for i in range(3)
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "deep" / "folder" / "results.jsonl"
    for record in RECORDS:
        lines.append(path, record)
    return path


def read_quietly(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return lines.read_lines(path)


def test_records_come_back_in_order_one_a_line(path):
    assert read_quietly(path) == RECORDS
    assert [
        {**json.loads(line), "sealed": 0} for line in path.read_text().splitlines()
    ] == [{**record, "sealed": 0} for record in RECORDS]
    assert path.read_bytes().endswith(b"}\n")


def test_no_file_holds_no_records(tmp_path):
    assert read_quietly(tmp_path / "results.jsonl") == []
    (tmp_path / "results.jsonl").touch()
    assert read_quietly(tmp_path / "results.jsonl") == []


def test_floats_come_back_exactly_and_no_number_is_null(tmp_path):
    path = tmp_path / "results.jsonl"
    lines.append(
        path,
        {
            "nll": 0.1 + 0.2,
            "se": float("nan"),
            "all": [float("inf"), (1.5, {"x": float("-inf")})],
        },
    )
    assert lines.read_lines(path) == [
        {"nll": 0.1 + 0.2, "se": None, "all": [None, [1.5, {"x": None}]]}
    ]


def test_any_torn_last_line_is_dropped_with_a_warning_and_overwritten(path):
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(2, last):
        path.write_bytes(whole[:-cut])
        with pytest.warns(UserWarning, match="torn"):
            assert lines.read_lines(path) == RECORDS[:2]
        lines.append(path, RECORDS[2])
        assert path.read_bytes() == whole


def test_a_last_line_that_lacks_only_its_newline_is_kept(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert read_quietly(path) == RECORDS
    lines.append(path, {"variant": "mlp"})
    assert read_quietly(path) == [*RECORDS, {"variant": "mlp"}]
    assert path.read_bytes().startswith(whole)


@pytest.mark.parametrize("bad", [b'{"variant": "att', b"[1, 2]", b"17", b"\xff\xfe{}"])
def test_a_malformed_line_elsewhere_is_named(path, bad):
    whole = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([whole[0], b"", bad, whole[2]]) + b"\n")
    before = path.read_bytes()
    with pytest.raises(
        UsageError,
        match=r"line 3 of .*results.jsonl is no JSON record; repair or delete",
    ):
        lines.read_lines(path)
    lines.append(path, {"variant": "mlp"})
    assert path.read_bytes() == before + sealed(b'{"variant": "mlp"}') + b"\n"


def test_a_malformed_last_line_that_was_written_to_its_end_is_no_torn_one(path):
    with path.open("ab") as file:
        file.write(b'{"variant": oops}\n')
    with pytest.raises(UsageError, match="line 4"):
        lines.read_lines(path)


def quartiles(median):
    return {"median": median, "low": 0.9 * median, "high": 1.1 * median, "n": 5}


RECORD = {
    **{
        "record": "sweep",
        "provenance": {"what": {"model": "smollm2", "seed": 0}, "where": {}},
    },
    **{
        "plan": {"attention": [], "mlp": [27, 28]},
        "variant": "mlp",
        "fraction": 0.1,
        "keep_last": True,
    },
    "quality": {
        **{
            "nll": 2.9,
            "nll_se": 0.1,
            "delta_nll": 0.4,
            "delta_nll_se": None,
            "perplexity": 18.2,
        },
        **{
            "kl": 0.5,
            "kl_se": 0.1,
            "top1_agreement": 0.7,
            "top1_agreement_se": 0.02,
            "sequences": 8,
        },
    },
    "times": {
        **{"prefill_ms": quartiles(300.0), "decode_ms_per_token": quartiles(60.0)},
        **{
            "speedup_prefill": quartiles(1.1),
            "speedup_decode": quartiles(1.2),
            "peak_bytes": None,
        },
    },
    "footprint": {
        "params": 120_000_000,
        "weight_bytes": 480_000_000,
        "kv_bytes_per_token": 46_080,
    },
}


def changed(path, value, record=RECORD):
    """The record with another value at `path`, such as quality.nll."""
    name, _, rest = path.partition(".")
    return record | {name: changed(rest, value, record[name]) if rest else value}


def test_records_are_checked_by_line_and_come_back_as_they_were(tmp_path):
    path = tmp_path / "results.jsonl"
    lines.append(path, RECORD, RECORD | {"variant": "dense"})
    mlp, dense = read(path, SweepRecord)
    assert (mlp.variant, dense.variant, mlp.quality.nll) == ("mlp", "dense", 2.9)
    assert math.isnan(mlp.quality.delta_nll_se)
    assert mlp.plan == Plan(mlp=[27, 28])
    assert mlp.provenance.what == {"model": "smollm2", "seed": 0}
    again = tmp_path / "again.jsonl"
    lines.append(again, mlp.line())
    assert lines.read_lines(again) == [RECORD]
    assert read(again, SweepRecord)[0].line() == mlp.line()


def test_a_record_as_a_line_of_a_table_has_every_figure_by_its_name(tmp_path):
    lines.append(tmp_path / "results.jsonl", RECORD)
    (record,) = read(tmp_path / "results.jsonl", SweepRecord)
    figures = record.figures()
    assert (figures["skipped"], figures["nll"], figures["delta_nll_se"]) == (
        "mlp.27 mlp.28",
        2.9,
        None,
    )
    assert (
        figures["speedup_decode"],
        figures["speedup_decode_low"],
        figures["params"],
    ) == (1.2, 1.08, 120_000_000)
    assert "record" not in figures


def test_of_a_record_that_was_measured_again_the_last_one_counts(tmp_path):
    path = tmp_path / "results.jsonl"
    lines.append(
        path, RECORD, RECORD | {"variant": "dense"}, changed("quality.nll", 2.8)
    )
    assert [(one.variant, one.quality.nll) for one in read(path, SweepRecord)] == [
        ("mlp", 2.8),
        ("dense", 2.9),
    ]
    answers = tmp_path / "answers.jsonl"  # which have no key
    lines.append(
        answers,
        *[{"plans": ["a"], "answers": {"x": [answer]}} for answer in (1.5, 1.5)],
    )
    assert len(read(answers, AnswersRecord)) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("record", "bench"),
        ("variant", "atention"),
        ("fraction", 1.2),
        ("plan", {"attention": ["x"], "mlp": []}),
        ("plan", {"attention": [40_000_000], "mlp": []}),
        ("plan", [3]),
        ("plan", {"mlp": [27, 28]}),
        ("quality", None),
        ("quality.nll", "2.5"),
        ("quality.nll_se", -0.1),
        ("quality.top1_agreement", 1.5),
        ("quality.sequences", -8),
        ("quality.sequences", 2.5),
        ("times.prefill_ms.median", -300.0),
        ("times.prefill_ms.median", 1e300),
        ("times.speedup_decode.median", 0.0),
        ("times.speedup_decode.low", None),
        ("footprint.params", 2**63),
        ("footprint.params", 10**400),
        ("footprint.kv_bytes_per_token", 46_080.0),
        ("provenance", 3),
        ("speedup", 2.0),
        ("quality.speedup", 2.0),
    ],
)
def test_a_record_with_a_wrong_field_is_named_with_its_line(tmp_path, field, value):
    path = tmp_path / "results.jsonl"
    lines.append(path, RECORD)
    lines.append(path, changed(field, value))
    with pytest.raises(UsageError, match=rf"line 2 of .*results.jsonl: {field}: "):
        read(path, SweepRecord)


def test_a_record_without_a_field_is_named_with_its_line(tmp_path):
    path = tmp_path / "results.jsonl"
    quality = {
        name: value for name, value in RECORD["quality"].items() if name != "nll"
    }
    lines.append(path, RECORD | {"quality": quality})
    with pytest.raises(UsageError, match=r"line 1 of .*: quality.nll: Field required"):
        read(path, SweepRecord)


def test_every_figure_of_a_sweep_is_described():
    for kind in ("quality", "times", "footprint"):
        fact = SweepRecord.model_fields[kind].annotation
        assert not [
            name for name, field in fact.model_fields.items() if not field.description
        ], kind


def test_a_line_nested_deeper_than_any_record_is_named(path):
    with path.open("ab") as file:
        file.write(b"[" * 5000 + b"]" * 5000 + b"\n")
        file.write(b'{"plan":' * 5000 + b"1" + b"}" * 5000 + b"\n")
    with pytest.raises(UsageError, match=r"line 4 of .* is no JSON record"):
        lines.read_lines(path)


@pytest.mark.parametrize(
    "doubled",
    [
        '"fraction": 0.1',
        '"provenance": {"what": {"model": "a", "model": "b"}}',
        '"extra": 1e999',
    ],
)
def test_a_line_that_says_two_things_or_no_number_is_named(tmp_path, doubled):
    path = tmp_path / "results.jsonl"
    whole = json.dumps(
        {name: value for name, value in RECORD.items() if name != "provenance"}
    )
    path.write_text(f"{whole[:-1]}, {doubled}}}\n")
    with pytest.raises(
        UsageError, match=r"line 1 of .* is no JSON record; repair or delete"
    ):
        read(path, SweepRecord)


def test_scores_and_answers_that_are_not_one_for_each_are_named(tmp_path):
    scores = {"nll": [2.5, 2.6], "kl": [0.1, 0.2], "top1_agreement": [0.5, 0.5]}
    path = tmp_path / "scores.jsonl"
    lines.append(path, {"batch": 0, "scores": {"": scores, "attn.1": scores}})
    assert read(path, ScoresRecord)[0].scores["attn.1"].kl == (0.1, 0.2)
    lines.append(
        path, {"batch": 1, "scores": {"": scores, "attn.1": scores | {"kl": [0.1]}}}
    )
    with pytest.raises(
        UsageError,
        match=(
            r"line 2 of .*scores.attn.1: .* of different numbers of sequences; repair"
        ),
    ):
        read(path, ScoresRecord)
    path = tmp_path / "answers.jsonl"
    lines.append(path, {"plans": ["a", "b"], "answers": {"x": [1.5, 2.5]}})
    assert read(path, AnswersRecord)[0].answers["x"] == (1.5, 2.5)
    for wrong in ([1.5], [1.5, 2.5, 3.5]):
        path.write_text(
            json.dumps({"plans": ["a", "b"], "answers": {"x": wrong}}) + "\n"
        )
        with pytest.raises(
            UsageError,
            match=r"line 1 of .* not one answer for each plan; repair or delete",
        ):
            read(path, AnswersRecord)


def test_a_message_does_not_grow_with_what_it_quotes(tmp_path):
    path = tmp_path / "results.jsonl"
    lines.append(path, RECORD | {"x" * 10_000: 1})
    with pytest.raises(UsageError) as error:
        read(path, SweepRecord)
    assert len(str(error.value)) < 300 + len(str(path))


# --- kinds, and what a folder is of
# --------------------------------------------------------------------------------------


def test_each_kind_has_a_file_and_a_name_of_its_own():
    for module in walk_packages(experiments.__path__, f"{experiments.__name__}."):
        import_module(module.name)
    kinds = [kind for kind in RECORD_KINDS.values() if kind is not HeaderRecord]
    assert len({kind.file for kind in kinds}) == len(kinds) >= 23
    assert {kind.kind_name for kind in kinds} == set(HOMES)
    for kind in kinds:
        assert kind.commands
        assert set(kind.key_fields) <= kind.model_fields.keys() | set(dir(kind))


def test_a_folder_of_a_verb_that_nothing_has_imported_is_refused(tmp_path):
    lines.append(tmp_path / "drafts.jsonl", {"record": "draft"})
    told = (
        "import sys; from pathlib import Path; from api import RECORD_KINDS, kind_at,"
        " working_in\n"
    )
    told += (
        "folder = Path(sys.argv[1]); print(kind_at(folder / 'drafts.jsonl'), 'draft' in"
        " RECORD_KINDS)\n"
    )
    told += (
        "with working_in(folder, 'draft'): pass\nwith working_in(folder, 'repair'):"
        " pass"
    )
    out, said = python(told, tmp_path, stderr=subprocess.PIPE).communicate()
    assert out == "draft False\n"
    assert said.splitlines()[-1].endswith(
        "(drafts.jsonl); choose another folder for notall repair"
    )


def sweep_record(variant="mlp", **what):
    line = json.dumps(
        RECORD | {"variant": variant, "provenance": {"what": what, "where": {}}}
    )
    return SweepRecord.model_validate_json(line)


def test_a_ledger_says_what_is_missing_and_keeps_what_is_added(tmp_path):
    about = Provenance(what={"seed": 0}, where={"date": "today"})
    ledger = Ledger(tmp_path, SweepRecord, about)
    keys = [("mlp", 0.1, True), ("dense", 0.1, True), ("mlp", 0.1, True)]
    assert ledger.missing(keys) == keys[:2]
    ledger.add(sweep_record(seed=0))
    assert ledger.missing(keys) == keys[1:2]
    again = Ledger(tmp_path, SweepRecord, about)
    assert list(again) == list(ledger)
    assert keys[0] in again
    assert again[keys[0]].variant == "mlp"
    assert Ledger(
        tmp_path, SweepRecord, Provenance(what={"seed": 0}, where={"date": "tomorrow"})
    ).missing(keys)
    with pytest.raises(
        UsageError,
        match=r"holds results with seed 0, not 1; choose another folder \(--out\)",
    ):
        Ledger(tmp_path, SweepRecord, Provenance(what={"seed": 1}))
    with pytest.raises(UsageError, match=r"holds results with length None, not 8"):
        Ledger(tmp_path, SweepRecord, Provenance(what={"seed": 0, "length": 8}))
    lines.append(
        tmp_path / SweepRecord.file,
        {n: v for n, v in RECORD.items() if n != "provenance"},
    )
    with pytest.raises(
        UsageError,
        match=(
            "does not say where it comes from; delete its line, or choose another"
            " folder"
        ),
    ):
        Ledger(tmp_path, SweepRecord, about)


def test_a_file_with_a_header_is_held_against_it(tmp_path):
    about = Provenance(what={"objective": "kl"})
    found = EvaluationRecord(
        skipped=("attn.1",),
        batches="all",
        cost=float("inf"),
        spent=SearchCost(evaluations=1, executions=2.0, seconds=0.1),
    )
    Ledger(tmp_path, EvaluationRecord, about).add(found)
    path = tmp_path / EvaluationRecord.file
    assert (header_of(path).provenance, header_of(path).of) == (about, "evaluation")
    assert kind_at(path) == "evaluation"
    assert [line["record"] for line in lines.read_lines(path)] == [
        "header",
        "evaluation",
    ]
    assert math.isnan(
        Ledger(tmp_path, EvaluationRecord, about)[("attn.1",), "all"].cost
    )
    with pytest.raises(UsageError, match="results with objective"):
        Ledger(tmp_path, EvaluationRecord, Provenance(what={"objective": "nll"}))
    Ledger(tmp_path, EvaluationRecord, about).add(found)
    assert len(lines.read_lines(path)) == 3  # one header


def test_a_ledger_holds_every_record_of_a_kind_without_a_key(tmp_path, monkeypatch):
    records = [
        AnswersRecord(plans=("dense",), answers={"asked": (number,)})
        for number in (1.0, 2.0, 2.0)
    ]
    ledger = Ledger(tmp_path, AnswersRecord)
    ledger.add(*records[:2])
    ledger.add(records[2])
    again = Ledger(tmp_path, AnswersRecord)
    assert [*ledger] == [*again] == records
    assert len(ledger) == len(again) == 3
    read = []
    numbered = lines.numbered
    monkeypatch.setattr(
        lines,
        "numbered",
        lambda *given, **how: read.append(given) or numbered(*given, **how),
    )
    Answers(tmp_path, "model", [Plan()])
    assert len(read) == 1


@pytest.mark.parametrize(
    ("line", "command", "says"),
    [
        (RECORD, "compare", r"holds results of notall sweep \(any.jsonl\)"),
        ({"record": "comparison"}, "sweep", "holds results of notall compare"),
        ({"record": "plan_times"}, "paper", "holds results of notall compare"),
        ({"record": "times"}, "compare", "holds results of notall paper"),
        ({"record": "bench"}, "sweep", "holds results of notall bench"),
        ({"record": "search"}, "paper", "holds results of notall search"),
        ({"record": "pareto"}, "bench", "holds results of notall pareto"),
        ({"record": "benchmark"}, "eval", "holds results of notall paper"),
        ({"record": "header", "of": "refit"}, "heal", "holds results of notall repair"),
    ],
)
def test_a_folder_of_another_command_is_refused(tmp_path, line, command, says):
    lines.append(tmp_path / "any.jsonl", line)
    with pytest.raises(UsageError, match=says), working_in(tmp_path, command):
        raise AssertionError("it went on")
    assert not (tmp_path / ".lock").exists()


def test_a_command_is_told_as_it_can_be_typed(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["notall", "pareto", "--plan", "/home/me/4 attentions.json"]
    )
    assert this_run()["command"] == "notall pareto --plan '4 attentions.json'"


@pytest.mark.parametrize(
    ("typed", "written"),
    [
        ("/home/me/out", "out"),
        ("/home/my folder/out/", "out/"),
        ("one=/home/me/plan.json", "one=plan.json"),
        ("--out=/home/me/results", "--out=results"),
        ("../shared/data", "../shared/data"),
        ("a/b=c", "a/b=c"),
        ("/", "/"),
    ],
)
def test_a_program_tells_its_files_without_the_folders_of_a_machine(
    monkeypatch, typed, written
):
    monkeypatch.setattr(sys, "argv", ["anything", typed])
    command = this_run("python", "benchmarks/costs.py")["command"]
    assert shlex.split(command) == ["python", "benchmarks/costs.py", written]


def test_a_folder_of_no_command_is_anyones(tmp_path):
    lines.append(tmp_path / "notes.jsonl", {"mine": 1})
    refuse_foreign(tmp_path, "sweep")
    refuse_foreign(tmp_path / "absent", "sweep")


def test_a_path_that_cannot_be_written_or_read_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    for act in (
        lambda: lines.append(tmp_path / "file" / "results.jsonl", {}),
        lambda: enter(tmp_path / "file"),
    ):
        with pytest.raises(
            UsageError, match=r"^cannot write .*file.*choose another folder$"
        ) as caught:
            act()
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"cannot read .*: Is a directory"):
        lines.read_lines(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_device_is_one_clear_line():
    with pytest.raises(UsageError, match="No space left on device; make room"):
        lines.append(Path("/dev/full"), RECORDS[0])


def test_a_line_has_a_limit(path, monkeypatch):
    """It is not read to its end, which a reader of JSON would take minutes to
    understand.
    """
    longest = max(map(len, path.read_bytes().splitlines(keepends=True)))
    monkeypatch.setattr(lines, "MOST_BYTES", longest + 1)
    assert lines.read_lines(path) == RECORDS
    monkeypatch.setattr(lines, "MOST_BYTES", longest)
    with pytest.raises(
        UsageError, match=rf"has {longest} bytes or more; delete that line"
    ):
        lines.read_lines(path)


@pytest.mark.parametrize("room", [0, 1, 20])
@pytest.mark.parametrize("torn", [b"", b'{"variant": "mlp", "nl'])
def test_a_disk_that_fills_up_in_the_middle_of_a_line_leaves_the_file_as_it_was(
    path, room, torn
):
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with (
        room_for(len(whole) + room),
        pytest.raises(UsageError, match="File too large; make room"),
    ):
        lines.append(path, RECORDS[0])
    assert path.read_bytes() == whole
    lines.append(path, RECORDS[0])
    assert read_quietly(path) == [*RECORDS, RECORDS[0]]


def test_a_record_that_is_no_json_writes_nothing(path):
    whole = path.read_bytes()
    with pytest.raises(TypeError):
        lines.append(path, {"plan": object()})
    assert path.read_bytes() == whole


def python(code, *arguments, **streams):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, **streams
    )


WRITER = """
import sys
from pathlib import Path
from api import records_lines as lines
path = Path(sys.argv[1])
start = len(lines.read_lines(path))
for number in range(start, start + 100_000):
    lines.append(path, {"number": number, "text": "x" * 200_000})
    print(number, flush=True)
"""


@pytest.mark.filterwarnings("ignore:the last line")
def test_a_writer_killed_again_and_again_loses_nothing_that_was_written(tmp_path):
    path = tmp_path / "results.jsonl"
    reported = -1
    for attempt in range(8):
        writer = python(WRITER, path)
        for _ in range(1 + attempt % 3):
            reported = int(writer.stdout.readline())
        writer.kill()
        reported = max([reported, *map(int, writer.stdout.read().split())])
        writer.wait()
        numbers = [record["number"] for record in lines.read_lines(path)]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) > reported


HOLDER = """
import sys
from pathlib import Path
from api import records_lines as lines
with lines.lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def enter(folder):
    with lines.lock(folder):
        pass


def test_a_second_process_on_a_folder_is_told_so_and_a_killed_one_leaves_no_lock(
    tmp_path,
):
    folder = tmp_path / "out"
    command, pipe = [sys.executable, "-c", HOLDER, folder], subprocess.PIPE
    holder = subprocess.Popen(
        command, cwd=Path(__file__).parent, stdin=pipe, stdout=pipe
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(
        UsageError, match=r"another run is working in .*out; wait for it"
    ):
        enter(folder)
    enter(tmp_path / "other")
    holder.kill()
    holder.communicate()
    enter(folder)


def test_a_folder_is_free_again_after_an_error(tmp_path):
    with pytest.raises(KeyError), lines.lock(tmp_path):
        raise KeyError
    enter(tmp_path)
    with lines.lock(tmp_path), pytest.raises(UsageError, match="another run"):
        enter(tmp_path)
