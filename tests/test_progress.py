"""How far long work is: one count for its stages, and a bar that says what has passed
and what is left.
"""

import math
import re
import sys
import time

import pytest
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from api import Stages, by_the_clock, progress_bar, progress_bars, silent, tracked

pytestmark = pytest.mark.any_transformers  # it counts and draws


def test_stages_are_one_count_in_steps_of_the_whole():
    seen = []
    stages = Stages(lambda *state: seen.append(state), 10)
    first, second = stages.stage(4), stages.stage(6)
    first(1, 2, "reading")
    first(2, 2, "reading")
    second(0, 3, "writing")
    second(1, 3, "writing")
    second(0, 0, "nothing to write")
    assert seen == [
        (2, 10, "reading"),
        (4, 10, "reading"),
        (4, 10, "writing"),
        (6, 10, "writing"),
        (10, 10, "nothing to write"),
    ]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still at what is put into it, from the beginning of a command
    on.
    """
    now = [0.0]
    monkeypatch.setattr(progress_bars.time, "monotonic", lambda: now[0])
    progress_bars.CLOCK.begin()
    yield now
    monkeypatch.undo()
    progress_bars.CLOCK.begin()


def test_a_log_is_told_now_and_then(clock, capsys):
    with progress_bar() as tell:
        for done, clock[0] in enumerate((30.0, 61.0, 90.0, 200.0)):
            tell(done, 4, f"part [{done}]")
    told = [
        "0:01:01: part [1], 25% of this part",
        "0:03:20: part [3], 75% of this part",
    ]
    assert capsys.readouterr().err.splitlines() == told


def test_a_command_has_one_clock_and_is_not_silent_over_its_parts(clock, capsys):
    """Loading and reading take less than a minute each, and are told of all the same;
    later parts go on counting.
    """
    for doing, clock[0] in (("loading", 40.0), ("reading", 80.0)):
        with progress_bar(doing) as tell:
            tell(1, 2, doing)
    with progress_bar() as tell, progress_bar("reading the text") as inner:
        clock[0] = 180.0
        inner(86, 100, "answering prompts")
        clock[0] = 359.0
        tell(1, 100, "choosing")
    assert capsys.readouterr().err.splitlines() == [
        "0:01:20: reading, 50% of this part",
        "0:03:00: answering prompts, 86% of this part",
        "0:05:59: choosing, 1% of this part",
    ]


def test_the_time_of_a_bar_is_that_of_the_whole_command(terminal, clock, capsys):
    for clock[0] in (60.0, 125.0):
        with progress_bar("loading") as tell:
            tell(1, 2, "loading")
    shown = capsys.readouterr().err
    assert "0:01:00" in shown
    assert "0:02:05" in shown


def test_time_that_is_limited_moves_the_count_on(clock):
    """What takes most of its time in a few of its steps."""
    told = []
    tell = by_the_clock(
        lambda done, total, doing: told.append((done, total, doing)), clock[0] + 100
    )
    for clock[0], done in ((10.0, 1), (50.0, 2), (60.0, 9), (200.0, 9)):
        tell(done, 10, "looking")
    assert told == [
        (1, 10, "looking"),
        (5, 10, "looking"),
        (9, 10, "looking"),
        (10, 10, "looking"),
    ]
    assert by_the_clock(silent, math.inf) is silent


@pytest.fixture(autouse=True)
def _a_new_command():
    progress_bars.CLOCK.begin()


def test_a_log_is_told_also_while_a_step_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(progress_bars, "SILENT", 0.05)
    with progress_bar("reading") as tell:
        time.sleep(0.3)
        tell(1, 4, "measuring")
        time.sleep(0.3)
    lines = [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()]
    assert "reading" in lines
    assert lines.count("measuring, 25% of this part") > 1


def test_of_bars_in_bars_the_one_that_has_begun_is_told(monkeypatch, capsys):
    monkeypatch.setattr(progress_bars, "SILENT", 0.05)
    with progress_bar(), progress_bar("reading"):
        time.sleep(0.3)
    told = capsys.readouterr().err.splitlines()
    assert {line.partition(": ")[2] for line in told} == {"reading"}
    assert told


def test_stages_nest():
    seen = []
    outer = Stages(lambda *state: seen.append(state[:2]), 8)
    outer.stage(4)
    inner = Stages(outer.stage(4), 2)
    inner.stage(1)(1, 1, "")
    inner.stage(1)(1, 2, "")
    assert seen == [(6, 8), (7, 8)]


def test_what_is_tracked_reaches_its_end():
    seen = []
    assert list(tracked("abc", "spelling", lambda *state: seen.append(state))) == [
        "a",
        "b",
        "c",
    ]
    assert seen == [(number, 3, "spelling") for number in range(4)]


@pytest.fixture
def terminal(monkeypatch):
    """Standard error as a terminal of 120 columns, and what is written there."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)

    def console(**options):
        return Console(**options, force_terminal=True, width=120)

    monkeypatch.setattr(progress_bars, "Console", console)


def test_a_bar_says_what_is_done_and_leaves_nothing(terminal, capsys):
    with progress_bar() as progress:
        progress(1, 4, "evaluating [bold]this[/bold]")
    shown = capsys.readouterr().err
    assert "evaluating [bold]this[/bold]" in shown
    assert "25%" in shown
    assert "elapsed" in shown
    assert shown.endswith(
        "\x1b[2K"
    )  # the line is cleared: nothing stands there when the work is over


def test_another_part_of_the_work_is_timed_by_itself(terminal, monkeypatch):
    """Its pace is not that of the part before, and neither is the time that is left."""
    bars, made = [], Progress
    monkeypatch.setattr(
        "rich.progress.Progress",
        lambda *given, **how: bars.append(made(*given, **how)) or bars[0],
    )
    with progress_bar() as tell:
        for done in range(57):
            tell(done, 56, "refitting")
        before = bars[0].tasks[0].start_time
        tell(0, 2, "measuring")
        assert bars[0].tasks[0].start_time > before
        assert (
            bars[0].tasks[0].completed,
            bars[0].tasks[0].total,
            bars[0].tasks[0].speed,
        ) == (0, 2, None)


def test_what_tells_of_no_steps_is_shown_too(terminal, capsys):
    with progress_bar("loading tiny"):
        pass
    assert "loading tiny" in capsys.readouterr().err


def test_nothing_is_written_where_nobody_looks(capsys):
    with progress_bar() as progress:
        progress(1, 4, "evaluating")
    assert capsys.readouterr().err == ""


def test_a_line_of_80_columns_holds_the_clock_whole(terminal, capsys, monkeypatch):
    monkeypatch.setattr(
        progress_bars,
        "Console",
        lambda **options: Console(**options, force_terminal=True, width=80),
    )
    monkeypatch.setattr(
        "rich.progress.TimeRemainingColumn.render", lambda self, task: Text("12:00:01")
    )
    monkeypatch.setattr(type(progress_bars.CLOCK), "__str__", lambda _: "10:01:23")
    with progress_bar() as progress:
        progress(1, 4, "comparing with the skipped model")
    line = next(
        line for line in capsys.readouterr().err.splitlines() if "comparing" in line
    )
    assert (
        re.sub(r"\x1b\[[0-9;]*m", "", line)
        .rstrip()
        .endswith("10:01:23 elapsed, 12:00:01 left")
    )
