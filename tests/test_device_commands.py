"""Commands on devices: on one, and with `--device-map`, print what they print on the
CPU.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch

import notall
from api import diagnostics
from command_line import FAST, QUICK
from devices import devices_of
from tiny_checkpoint import save_tiny_checkpoint
from tiny_tasks import write_tasks

pytestmark = [
    pytest.mark.devices,
    pytest.mark.usefixtures("short_prose", "own_tasks_only"),
    pytest.mark.any_transformers,  # of files and devices
]

PLACES = {"one": ["--device", "cuda:0"], "two": ["--device-map", "balanced"]}
TWICE = pytest.mark.devices(count=2)
on_each = pytest.mark.parametrize("place", ["one", pytest.param("two", marks=TWICE)])
SKIP = ["--skip", "attention:0.5"]
READ = ["--text", "prose", *QUICK]
MEND = [
    "--plan",
    "plan.json",
    "--text",
    "prose",
    "--length",
    "16",
    "--batch-size",
    "4",
    "--dtype",
    "float32",
]
QUICKEST = {
    "similarity": ["similarity", *READ],
    "eval": ["eval", *SKIP, *READ],
    "search": ["search", "--skip", "attention:2", *READ],
    "repair": ["repair", *MEND, "--sequences", "8", "--offload", "streams"],
}
OTHERS = {
    "eval with diagnostics": ["eval", *SKIP, *READ, "--diagnostics"],
    "eval with tasks": [
        "eval",
        *SKIP,
        *READ,
        "--tasks",
        "tiny_choice,tiny_words",
        "--limit",
        "4",
    ],
    "eval with own checks": [
        "eval",
        *SKIP,
        *READ,
        "--tasks",
        "passkey_256,answers",
        "--limit",
        "2",
    ],
    "search for a task": [
        "search",
        "--skip",
        "attention:1",
        *READ,
        "--objective",
        "task:tiny_choice",
    ],
    "compare": ["compare", "--skip", "attention:1", "--criterion", "cosine", *READ],
    "repair by replaceme": [
        "repair",
        *MEND,
        "--sequences",
        "16",
        "--repair",
        "replaceme",
    ],
    "heal": ["heal", *MEND, "--tokens", "256"],
    "generate": [
        "generate",
        "Hello",
        *SKIP,
        "--max-new-tokens",
        "4",
        "--dtype",
        "float32",
    ],
}
TIMED = {
    "bench": ["bench", *SKIP, *FAST],
    "draft": [
        "draft",
        *SKIP,
        *FAST,
        "--text",
        "prose",
        "--sequences",
        "1",
        "--most",
        "1",
    ],
    "sweep": ["sweep", *READ, *FAST[:-2]],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint that reads the requests of tasks."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    return save_tiny_checkpoint(path, num_hidden_layers=6, max_position_embeddings=2048)


@pytest.fixture
def typed(run, folder, tmp_path, monkeypatch):
    """Run a command on the tiny checkpoint with more words; what it printed, as JSON
    where it can.
    """

    def typed(words, *more):
        monkeypatch.chdir(tempfile.mkdtemp(dir=tmp_path))
        notall.Plan([2, 4], [3]).save("plan.json")
        name, *options = words
        given = [folder, options.pop(0)] if name == "generate" else [folder]
        if any("task" in word for word in words):
            more = [*more, "--task-path", write_tasks(Path("tasks"), 12)]
        as_json = [] if name == "generate" else ["--json"]
        code, out, err = run(name, *given, *options, *more, *as_json)
        assert code == 0, err
        return json.loads(out) if as_json else out

    monkeypatch.setattr(diagnostics, "WINDOW_TOKENS", 80)
    monkeypatch.setattr(diagnostics, "KEYS", 2)
    return typed


NEVER_THE_SAME = ("provenance", "where", "verdict", "spent", "seconds")


def numbers(found, path=()):
    """All that is measured, by its place in what is printed."""
    if isinstance(found, dict):
        for name, value in found.items():
            if name not in NEVER_THE_SAME:
                yield from numbers(value, (*path, name))
    elif isinstance(found, list):
        for place, value in enumerate(found):
            yield from numbers(value, (*path, place))
    elif isinstance(found, float):
        yield path, found


def every_command():
    """The quickest on one device and on two, the others on two."""
    for name, words in QUICKEST.items():
        yield pytest.param(words, "one", id=f"{name}-one")
        yield pytest.param(words, "two", id=f"{name}-two", marks=TWICE)
    for name, words in OTHERS.items():
        yield pytest.param(words, "two", id=name, marks=[TWICE, pytest.mark.slow])


@TWICE
def test_two_devices_are_used(folder):
    model, _ = notall.load(folder, device_map="balanced")
    assert devices_of(model) == {"cuda:0", "cuda:1"}


@pytest.mark.parametrize(("words", "place"), every_command())
def test_prints_what_it_prints_on_the_cpu(typed, words, place):
    found, expected = typed(words, *PLACES[place]), typed(words, "--device", "cpu")
    if isinstance(expected, str):
        assert found == expected
        return
    ours, theirs = dict(numbers(found)), dict(numbers(expected))
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        same = ours[path] == pytest.approx(value, rel=1e-3, abs=1e-5)
        assert same or (math.isnan(value) and math.isnan(ours[path])), path


@pytest.mark.slow
@on_each
@pytest.mark.parametrize("words", TIMED.values(), ids=TIMED)
def test_times_what_runs_on_devices(typed, words, place, tmp_path):
    found = json.dumps(typed(words, *PLACES[place], "--out", tmp_path / "out"))
    assert torch.cuda.get_device_name(0) in found
