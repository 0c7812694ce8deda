"""What is written replaces what had the name, whole, and leaves alone what a link leads to."""

import os
import re
import signal
from pathlib import Path

import pytest

import notall
from api import TaskShelf, digests, files, read_text, results_of, write_report
from api import records_lines as lines
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


def test_tables_and_figures_are_written_so():
    folder = Path(notall.__file__).parent
    for file in (*(folder / "experiments").glob("*.py"), *(folder / "charts").glob("*.py")):
        assert not re.search(r"\.write_(text|bytes)\(", file.read_text()), file.name


@pytest.fixture(params=["pipe", "device"])
def endless(request, tmp_path):
    """Makes a pipe in which no one writes, or a link to a device; a test that waits for it ends by an error."""

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


READERS = {
    "config.json": lambda path: notall.load(path.parent),
    "my.json": notall.load,
    "bench.jsonl": lambda path: results_of(path.parent),
    "theirs.jsonl": lambda path: results_of(path.parent),
    "refits.jsonl": lines.read,
    "page.html": lambda path: write_report(path.parent, path),
    "plan.json": Plan.load,
    "task.yaml": lambda path: TaskShelf(path.parent),
    "text.txt": read_text,
    "prompts.jsonl": read_text,
}


@pytest.mark.parametrize("name", READERS)
def test_what_may_never_end_is_not_read(name, endless, tmp_path):
    with pytest.raises(UsageError, match=rf"{name} is a pipe or a device: give a regular file"):
        READERS[name](endless(tmp_path / name))


def test_a_digest_that_is_kept_in_a_pipe_is_made_anew(endless, tmp_path, monkeypatch):
    monkeypatch.setenv("NOTALL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("a")
    found = digests.digest_of_file(tmp_path / "file")
    (note,) = (tmp_path / "cache" / "sha256").iterdir()
    note.unlink()
    endless(note)
    assert digests.digest_of_file(tmp_path / "file") == found


def test_a_huge_config_is_not_read(run, tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    code, _, err = run("inspect", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "config.json has more than 67,108,864 bytes" in err
