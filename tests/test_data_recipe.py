"""`make data`: files of benchmarks from rows, in the form that their checksums are
of.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from programs import program

pytestmark = pytest.mark.any_transformers  # it writes rows
fetch = program("benchmarks/data/fetch")
DATA = Path(__file__).parents[2] / "shared/data"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the data of benchmarks, ../shared/data, is absent"
)


def rows_of(folder):
    """What the hub would give: rows of the files of a folder, with columns in another
    order and one more.
    """

    def load(repository, config, *, split, streaming=False):
        (source,) = [
            one
            for one in fetch.SOURCES
            if (one.repository, one.config, one.split) == (repository, config, split)
        ]
        assert streaming == (source.file == "c4/sample300.jsonl")
        if source.is_text:
            return [
                {"text": line}
                for line in (folder / source.file).read_text().splitlines(keepends=True)
            ]
        lines = [
            line
            for path in folder.glob(source.file)
            for line in path.read_text().split("\n")
            if line
        ]
        return [
            {"more": 1, **dict(reversed(json.loads(line).items()))} for line in lines
        ]

    return load


@needs_data
def test_every_file_is_made_byte_by_byte_of_its_rows(tmp_path, capsys):
    assert fetch.main(["--data", str(tmp_path)], rows_of(DATA)) == 0
    assert capsys.readouterr().out.count(": fetched, the same\n") == len(fetch.SOURCES)
    assert fetch.main(["--data", str(tmp_path), "--check"]) == 0
    assert capsys.readouterr().out.count(": there, the same\n") == len(fetch.SOURCES)


@needs_data
def test_another_file_is_said_and_not_replaced(tmp_path, capsys):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/test.jsonl").write_text("mine")
    assert fetch.main(["--data", str(tmp_path)], rows_of(DATA)) == 1
    assert "gsm8k/test.jsonl: there, another one\n" in capsys.readouterr().out
    assert (tmp_path / "gsm8k/test.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    "error",
    [ConnectionError("no network"), ValueError("no such config"), KeyError("text")],
)
def test_what_cannot_be_fetched_lacks_and_why(tmp_path, capsys, error):
    def load(*_, **__):
        raise error

    assert fetch.main(["--data", str(tmp_path)], load) == 1
    told = capsys.readouterr().out.splitlines()
    assert len(told) == len(fetch.SOURCES)
    assert all(f": lacks: {error.args[0]}" in line.replace("'", "") for line in told)
    assert not list(tmp_path.rglob("*.*"))


def test_a_check_fetches_nothing(tmp_path, capsys):
    assert (
        fetch.main(
            ["--data", str(tmp_path), "--check"],
            lambda *_, **__: pytest.fail("it fetches"),
        )
        == 1
    )
    assert capsys.readouterr().out.count(": lacks\n") == len(fetch.SOURCES)
