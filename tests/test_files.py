"""What is written replaces what had the name, whole, and leaves alone what a link leads
to.
"""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

import notall
from api import (
    HOMES,
    TaskShelf,
    appearing,
    check_folder,
    digests,
    files,
    read_text,
    records_lines as lines,
    results_of,
    write_report,
)
from command_line import QUICK
from notall import Plan, UsageError

pytestmark = pytest.mark.any_transformers  # it writes files


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path: files.write_whole(path, "new"), id="text"),
        pytest.param(lambda path: files.write_whole(path, b"new"), id="bytes"),
        pytest.param(lambda path: Plan([1]).save(path), id="plan"),
    ],
)
def test_a_link_is_replaced_and_what_it_leads_to_stays(write, tmp_path):
    (tmp_path / "others").write_text("theirs")
    (tmp_path / "out").symlink_to(tmp_path / "others")
    write(tmp_path / "out")
    assert (tmp_path / "others").read_text() == "theirs"
    assert not (tmp_path / "out").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["others", "out"]


@pytest.mark.parametrize("name", ["out", "out[1] é"])
def test_what_a_killed_run_left_goes_and_what_another_is_writing_stays(name, tmp_path):
    out = tmp_path / name
    with (
        files.temporary(out) as ours,
        files.temporary(out) as again,
    ):  # as in two threads
        assert ours.name != again.name
    ours = ours.name.partition(f".{os.getpid()}.")[0]
    with (
        subprocess.Popen(["cat"], stdin=subprocess.PIPE) as running,
        subprocess.Popen(["true"]) as ended,
    ):
        ended.wait()
        left = [f"{ours}.{ended.pid}.{word}" for word in ("0a1b2c", "ffffff")]
        others = [
            f"{ours}.{running.pid}.0a1b2c",
            f"{ours}.{os.getpid()}.0a1b2c",
            f"{ours}.x",
            ".o",
        ]
        others += [
            f".{name}.0.{ended.pid}.0a1b2c",
            f"{ours}.{ended.pid}",
            f"{ours}.{ended.pid}.txt",
        ]  # named otherwise
        for hidden in (*left, *others):
            (tmp_path / hidden).write_text("x")
        files.write_whole(out, "new")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            [name, *others]
        )
        (tmp_path / left[0]).mkdir()
        (tmp_path / left[0] / "weights").write_text("x")
        out.unlink()
        with files.temporary(out) as scratch:
            scratch.mkdir()
            assert not (tmp_path / left[0]).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_an_export_whose_name_leaves_no_room_for_another_beside_it_is_refused(tmp_path):
    with (
        pytest.raises(UsageError, match=r"cannot write to .*too long"),
        appearing(tmp_path / ("x" * 240)),
    ):
        pass


def test_tables_and_figures_are_written_so():
    folder = Path(notall.__file__).parent
    for file in (
        *(folder / "experiments").rglob("*.py"),
        *(folder / "report").glob("*.py"),
        *(folder / "charts").glob("*.py"),
    ):
        assert not re.search(r"\.write_(text|bytes)\(", file.read_text()), file.name


@pytest.fixture(params=["pipe", "device"])
def endless(request, tmp_path):
    """Makes a pipe in which no one writes, or a link to a device; a test that waits for
    it ends by an error.
    """

    def make(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path) if request.param == "pipe" else path.symlink_to("/dev/zero")
        return path

    def give_up(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield make
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


KINDS = {
    "sweep": "sweep",
    "compare": "comparison",
    "paper": "claim",
    "pareto": "pareto",
}
READERS = {
    "config.json": lambda path: notall.load(path.parent),
    "my.json": notall.load,
    "bench.jsonl": lambda path: results_of(path.parent),
    "theirs.jsonl": lambda path: results_of(path.parent),
    "refits.jsonl": lines.read_lines,
    "plan.json": Plan.load,
    "task.yaml": lambda path: TaskShelf(path.parent),
    "text.txt": read_text,
    "prompts.jsonl": read_text,
}


@pytest.mark.parametrize("name", READERS)
def test_what_may_never_end_is_not_read(name, endless, tmp_path):
    with pytest.raises(
        UsageError, match=rf"{name} is a pipe or a device: give a regular file"
    ):
        READERS[name](endless(tmp_path / name))


def test_a_pipe_or_a_device_is_no_page(endless, tmp_path):
    with pytest.raises(
        UsageError, match="is there, and is no page of notall: choose another -o"
    ):
        write_report(tmp_path, endless(tmp_path / "page.html"))


def test_a_digest_that_is_kept_in_a_pipe_is_made_anew(endless, tmp_path, monkeypatch):
    monkeypatch.setenv("NOTALL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("a")
    found = digests.digest_of_file(tmp_path / "file")
    (note,) = (tmp_path / "cache" / "sha256").glob("*/*")
    note.unlink()
    endless(note)
    assert digests.digest_of_file(tmp_path / "file") == found


def test_a_huge_config_is_not_read(run, tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    code, _, err = run("inspect", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "config.json has more than 67,108,864 bytes" in err


@pytest.mark.parametrize("name", ["plan", "search"])
@pytest.mark.parametrize("theirs", ["a,b\n1,2\n", '{"model": 1}', "endless"])
def test_a_file_that_is_no_plan_is_not_replaced(
    name, theirs, run, folder, endless, tmp_path
):
    out = tmp_path / "theirs.json"
    endless(out) if theirs == "endless" else out.write_text(theirs)
    if out.is_symlink():
        return  # a link is replaced
    code, _, err = run(name, folder, "--skip", "mlp:1", "-o", out)
    assert (code, err.count("\n")) == (2, 1)
    assert "theirs.json is there, and is no plan: choose another -o" in err
    assert theirs == "endless" or out.read_text() == theirs


def test_a_plan_and_an_empty_file_are_replaced(tmp_path):
    for before in ('{"mlp": [1, 2]}', ""):
        (tmp_path / "plan.json").write_text(before)
        Plan([3]).save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == Plan([3])


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *(("sweep", name) for name in ("table.csv", "table.md", "tradeoff.png")),
        *(("compare", name) for name in ("table.tex", "front.svg")),
        *(("paper", name) for name in ("paper.md", "claims.csv", "similarity.html")),
        *(("pareto", name) for name in ("table.md", "pareto.png")),
    ],
)
def test_what_others_wrote_into_a_folder_is_not_replaced(command, name, tmp_path):
    theirs = tmp_path / name
    theirs.write_text("theirs")
    with pytest.raises(
        UsageError,
        match=(
            f"{theirs.name} is there, and notall did not write it: choose another"
            " folder"
        ),
    ):
        check_folder(tmp_path, command)
    lines.append(tmp_path / HOMES[KINDS[command]][0], {"record": KINDS[command]})
    check_folder(tmp_path, command)  # a folder of results is ours, with what lies in it


def test_a_csv_that_is_no_table_of_similarities_is_not_replaced(run, folder, tmp_path):
    (tmp_path / "theirs.csv").write_text("theirs")
    code, _, err = run("similarity", folder, *QUICK, "-o", tmp_path / "theirs")
    assert code == 2
    assert (
        "theirs.csv is there, and is no table of similarities: choose another -o" in err
    )
    assert (tmp_path / "theirs.csv").read_text() == "theirs"
