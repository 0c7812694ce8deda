"""What is written stays: torn lines, full disks, killed writers, two processes."""

import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest

from notall.errors import UsageError
from notall.records import ledger

RECORDS = [{"variant": "attention", "nll": 2.5 + i, "plan": {"attention": [i, 29], "mlp": []}} for i in range(3)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "deep" / "folder" / "results.jsonl"
    for record in RECORDS:
        ledger.append(path, record)
    return path


def read_quietly(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ledger.read(path)


def test_records_come_back_in_order_one_a_line(path):
    assert read_quietly(path) == RECORDS
    assert [json.loads(line) for line in path.read_text().splitlines()] == RECORDS
    assert path.read_bytes().endswith(b"}\n")


def test_no_file_holds_no_records(tmp_path):
    assert read_quietly(tmp_path / "results.jsonl") == []
    (tmp_path / "results.jsonl").touch()
    assert read_quietly(tmp_path / "results.jsonl") == []


def test_floats_come_back_exactly_and_no_number_is_null(tmp_path):
    path = tmp_path / "results.jsonl"
    ledger.append(path, {"nll": 0.1 + 0.2, "se": float("nan"), "all": [float("inf"), (1.5, {"x": float("-inf")})]})
    assert ledger.read(path) == [{"nll": 0.1 + 0.2, "se": None, "all": [None, [1.5, {"x": None}]]}]


def test_any_torn_last_line_is_dropped_with_a_warning_and_overwritten(path):
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(2, last):
        path.write_bytes(whole[:-cut])
        with pytest.warns(UserWarning, match="torn"):
            assert ledger.read(path) == RECORDS[:2]
        ledger.append(path, RECORDS[2])
        assert path.read_bytes() == whole


def test_a_last_line_that_lacks_only_its_newline_is_kept(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert read_quietly(path) == RECORDS
    ledger.append(path, {"variant": "mlp"})
    assert read_quietly(path) == [*RECORDS, {"variant": "mlp"}]
    assert path.read_bytes().startswith(whole)


@pytest.mark.parametrize("bad", [b'{"variant": "att', b"[1, 2]", b"17", b"\xff\xfe{}"])
def test_a_malformed_line_elsewhere_is_named(path, bad):
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b"", bad, lines[2]]) + b"\n")
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"line 3 of .*results.jsonl is no JSON record; repair or delete"):
        ledger.read(path)
    ledger.append(path, {"variant": "mlp"})
    assert path.read_bytes() == before + b'{"variant": "mlp"}\n'


def test_a_malformed_last_line_that_was_written_to_its_end_is_no_torn_one(path):
    with path.open("ab") as file:
        file.write(b'{"variant": oops}\n')
    with pytest.raises(UsageError, match="line 4"):
        ledger.read(path)


RECORD = {
    **{"variant": "mlp", "fraction": 0.1, "keep_last": True, "plan": {"attention": [], "mlp": [27, 28]}},
    **{"nll": 2.9, "nll_se": 0.1, "delta_nll": 0.4, "delta_nll_se": None, "perplexity": 18.2},
    **{"kl": 0.5, "kl_se": 0.1, "top1_agreement": 0.7, "top1_agreement_se": 0.02, "sequences": 8},
    **{f"prefill_ms{end}": 300.0 for end in ("", "_low", "_high")},
    **{f"decode_ms_per_token{end}": 60.0 for end in ("", "_low", "_high")},
    **{f"speedup_{what}{end}": 1.1 for what in ("prefill", "decode") for end in ("", "_low", "_high")},
    **{"peak_bytes": None, "params": 120_000_000, "weight_bytes": 480_000_000, "kv_bytes_per_token": 46_080},
    "provenance": {"model": "smollm2", "seed": 0},
}


def test_records_are_checked_by_line(tmp_path):
    path = tmp_path / "results.jsonl"
    ledger.append(path, RECORD)
    ledger.append(path, RECORD | {"variant": "dense"})
    assert ledger.read(path, ledger.Record) == [RECORD, RECORD | {"variant": "dense"}]
    assert ledger.Record(**RECORD).model_dump() == RECORD


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"variant": "atention"}, "variant"),
        ({"fraction": 1.2}, "fraction"),
        ({"plan": {"attention": ["x"], "mlp": []}}, "plan.attention.0"),
        ({"speedup": 2.0}, "speedup"),
    ],
)
def test_a_record_with_a_wrong_field_is_named_with_its_line(tmp_path, change, named):
    path = tmp_path / "results.jsonl"
    ledger.append(path, RECORD)
    ledger.append(path, RECORD | change)
    with pytest.raises(UsageError, match=rf"line 2 of .*results.jsonl: {named}: "):
        ledger.read(path, ledger.Record)


def test_a_record_without_a_field_is_named_with_its_line(tmp_path):
    path = tmp_path / "results.jsonl"
    ledger.append(path, {name: value for name, value in RECORD.items() if name != "nll"})
    with pytest.raises(UsageError, match=r"line 1 of .*: nll: Field required"):
        ledger.read(path, ledger.Record)


def test_every_field_is_described():
    assert [name for name, field in ledger.Record.model_fields.items() if not field.description] == []


def test_a_path_that_cannot_be_written_or_read_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    for act in (
        lambda: ledger.append(tmp_path / "file" / "results.jsonl", {}),
        lambda: enter(tmp_path / "file"),
    ):
        with pytest.raises(UsageError, match=r"^cannot write .*file.*choose another folder$") as caught:
            act()
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"cannot read .*: Is a directory"):
        ledger.read(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_device_is_one_clear_line():
    with pytest.raises(UsageError, match="No space left on device; make room"):
        ledger.append(Path("/dev/full"), RECORDS[0])
    assert ledger.read(Path("/dev/full")) == []


@contextmanager
def room_for(size):
    """No file may grow beyond `size` bytes: a write stops in the middle, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room", [0, 1, 20])
@pytest.mark.parametrize("torn", [b"", b'{"variant": "mlp", "nl'])
def test_a_disk_that_fills_up_in_the_middle_of_a_line_leaves_the_file_as_it_was(path, room, torn):
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with room_for(len(whole) + room), pytest.raises(UsageError, match="File too large; make room"):
        ledger.append(path, RECORDS[0])
    assert path.read_bytes() == whole
    ledger.append(path, RECORDS[0])
    assert read_quietly(path) == [*RECORDS, RECORDS[0]]


def test_a_record_that_is_no_json_writes_nothing(path):
    whole = path.read_bytes()
    with pytest.raises(TypeError):
        ledger.append(path, {"plan": object()})
    assert path.read_bytes() == whole


def python(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


WRITER = """
import sys
from pathlib import Path
from notall.records import ledger
path = Path(sys.argv[1])
start = len(ledger.read(path))
for number in range(start, start + 100_000):
    ledger.append(path, {"number": number, "text": "x" * 200_000})
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
        numbers = [record["number"] for record in ledger.read(path)]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) > reported


HOLDER = """
import sys
from pathlib import Path
from notall.records import ledger
with ledger.lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def enter(folder):
    with ledger.lock(folder):
        pass


def test_a_second_process_on_a_folder_is_told_so_and_a_killed_one_leaves_no_lock(tmp_path):
    folder = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UsageError, match=r"another run is working in .*out; wait for it"):
        enter(folder)
    enter(tmp_path / "other")
    holder.kill()
    holder.communicate()
    enter(folder)


def test_a_folder_is_free_again_after_an_error(tmp_path):
    with pytest.raises(KeyError), ledger.lock(tmp_path):
        raise KeyError
    enter(tmp_path)
    with ledger.lock(tmp_path), pytest.raises(UsageError, match="another run"):
        enter(tmp_path)
