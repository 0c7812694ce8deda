"""Commands that are killed at events, from seeds, and run again: each comes to what it
comes to undisturbed.
"""

from __future__ import annotations

import json

import pytest

import killing

pytestmark = pytest.mark.any_transformers  # it is about files


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with killing.made_ready(tmp_path_factory.mktemp("kills")) as place:
        yield place


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in killing.COMMANDS if name not in killing.SHARE]
)
def test_what_is_killed_loses_nothing(place, name):
    found = [killing.try_kill(name, number, 0, place) for number in range(3)]
    assert [(one.kills, one.offence, one.said) for one in found if one.offence] == []
    assert any(one.kills for one in found)


LINES = b'{"a": 1, "ms": 5}\n{"a": 2, "ms": 6}\n'
TABLE = b"ms,cosine\n5,0.5\n"
FILES = {
    "r/x.jsonl": LINES,
    "r/plan.json": b'{"attention": [1]}',
    "r/table.md": b"5 ms",
    "r.csv": TABLE,
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        (
            {"r/x.jsonl": LINES.replace(b"5", b"7"), "r/table.md": b"7 ms"},
            None,
        ),  # times are measured anew
        ({"r.csv": TABLE.replace(b"5,", b"7,")}, None),
        ({"r.csv": TABLE.replace(b"0.5", b"0.6")}, "another content: r.csv"),
        ({"r/.x.part": b""}, "more files: r/.x.part"),
        ({"r/plan.json": None}, "lost files: r/plan.json"),
        ({"r/plan.json": b'{"attention": [2]}'}, "another content: r/plan.json"),
        ({"r/x.jsonl": LINES[:18]}, "another content: r/x.jsonl"),
        ({"r/x.jsonl": LINES + LINES[:18]}, "another content: r/x.jsonl"),
        ({"r/x.jsonl": LINES[18:] + LINES[:18]}, "lines changed: r/x.jsonl"),
        ({"r/table.md": b""}, "another content: r/table.md"),
    ],
)
def test_what_is_lost_doubled_or_changed_is_seen(changes, said):
    found = {
        name: content
        for name, content in (FILES | changes).items()
        if content is not None
    }
    killed = {"r/x.jsonl": LINES[:18] + b'{"a"'} if said and "lines" in said else {}
    assert killing.difference(found, FILES, killed) == said


def test_cases_are_shared_out():
    cases = killing.cases(["sweep", "pareto"], 22)
    assert [name for name, _ in cases].count("pareto") == 2
    assert len(set(cases)) == len(cases) == 22
    assert {name for name, _ in killing.cases([*killing.COMMANDS], 1)} == {
        *killing.COMMANDS
    }


def test_it_is_killed_before_the_event_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(
        killing,
        "run",
        lambda words, folder: killing.fuzzing.Ended(0, "", "", 0, 0, write(folder)),
    )

    def write(folder):
        for number in range(3):
            (folder / str(number)).write_text("x")
        return ""

    assert killing.in_child("any", tmp_path).events == 3
    for number in range(3):
        (tmp_path / str(number)).unlink()
    assert killing.in_child("any", tmp_path, event=2).code is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0"]
    assert (
        json.dumps(killing.content("x.json", b'{"a": {"seconds": 1, "b": 2}}'))
        == '{"a": {"b": 2}}'
    )
