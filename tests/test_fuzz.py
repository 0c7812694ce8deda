"""A few hundred damaged files, from seeds: each ends in one clear line, or works as
what it says. See fuzzing.py.
"""

from __future__ import annotations

import pytest

import fuzzing

KINDS = {  # so many of each
    "plan": 80,
    "a search's lines": 40,
    "a bench's lines": 40,
    "lines of text": 30,
    "lines of prompts": 30,
    "safetensors": 20,
    "repair": 40,
    "own exports": 60,
}

pytestmark = [pytest.mark.slow, pytest.mark.any_transformers]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    with fuzzing.once():
        yield fuzzing.Seeds(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTALL_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_ends_in_one_clear_line_or_works_as_it_says(seeds, kind):
    found = [
        fuzzing.try_case(fuzzing.Case(kind, number, seed=0), seeds)
        for number in range(KINDS[kind])
    ]
    assert [
        (one.case.name, one.offence, one.ended.err or one.ended.trace)
        for one in found
        if one.offence
    ] == []
    assert {one.ended.code for one in found} == {0, 2}


def ended(code=2, err="error: bad\n", grown=0):
    return fuzzing.Ended(code, "", err, 0.1, grown)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (ended(code="KeyError"), "traceback"),
        (ended(code=1), "traceback"),
        (ended(code="Hangs"), "hang"),
        (ended(grown=3 << 30), "memory"),
        (ended(err=""), "not one line"),
        (ended(err="error: bad\nerror: worse\n"), "not one line"),
        (ended(err="error: bad\nsee there\n"), "not one line"),
        (ended(err=f"error: {'x' * 300}\n"), "long line"),
        (ended(code=0, err="Traceback (most recent call last):\n"), "traceback"),
    ],
)
def test_what_offends_is_told(wrong, said):
    assert fuzzing.offence(wrong) == said


FORM = {
    "record": "row",
    "provenance": {"what": {}, "where": {}},
    "batches": "all",
    "nll": 1.5,
    "kind": "mlp",
    "n": 3,
}


@pytest.mark.parametrize(
    "change",
    [
        {"nll": "1.5"},
        {"nll": -1.5},
        {"n": 3.0},
        {"n": -3},
        {"n": 10**19},
        {"batches": -1},
        {"batches": 1.5},
        {"kind": 3},
        {"more": 1},
        {"record": 3},
    ],
)
def test_a_line_of_another_form_is_none(change):
    assert not fuzzing._is_a_line(FORM | change, [FORM], "report r")


def test_what_a_line_may_lack():
    def is_a_line(command, *lacking):
        return fuzzing._is_a_line(
            {n: v for n, v in FORM.items() if n not in lacking}, [FORM], command
        )

    assert is_a_line("sweep m")
    assert is_a_line("sweep m", "record")
    assert not is_a_line("sweep m", "provenance")
    assert is_a_line("report r", "record", "provenance")
    assert not is_a_line("report r", "nll")
    assert fuzzing._is_a_line(FORM | {"batches": 2, "nll": 10**30}, [FORM], "compare m")
    assert not fuzzing._is_a_line([FORM], [FORM], "report r")


@pytest.mark.parametrize(
    "right",
    [ended(), ended(code=0, err=""), ended(err=f"error: no {'/x' * 300}: bad\n")],
)
def test_what_is_right_does_not_offend(right):
    assert fuzzing.offence(right) is None
