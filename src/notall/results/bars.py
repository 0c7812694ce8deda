"""How far work is, on stderr: a bar at a terminal, a line now and then elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from rich import progress as bars
from rich.console import Console
from rich.table import Column as RichColumn
from rich.text import Text

from ..encodings import printable
from ..errors import shortened
from ..progress import CLOCK, Progress

SILENT = 60.0  # seconds without a line in a log
PACE = 120.0  # seconds of whose steps the remaining time is estimated
OTHER_LETTERS = 56  # letters of a line that are not the description


class _Elapsed(bars.ProgressColumn):
    """The time since the command began: a later part of its work begins at no time of
    its own.
    """

    def render(self, task: bars.Task) -> Text:
        return Text(str(CLOCK), style="progress.elapsed")


@contextmanager
def progress_bar(doing: str = "starting") -> Iterator[Progress]:
    """A bar on stderr of what work is `doing`, gone when it ends; where stderr is no
    terminal, a line now and then.
    """
    console = Console(stderr=True)
    columns = (
        bars.SpinnerColumn("dots" if console.encoding.startswith("utf") else "line"),
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(bar_width=10),
        bars.TaskProgressColumn(),
        _Elapsed(table_column=RichColumn(no_wrap=True)),
        bars.TextColumn("elapsed,"),
        bars.TimeRemainingColumn(table_column=RichColumn(no_wrap=True)),
        bars.TextColumn("left"),
    )
    if not console.is_terminal:
        with _log(console, doing) as tell:
            yield tell
        return

    def fitting(doing: str) -> str:
        return shortened(
            printable(doing, console.encoding), max(12, console.width - OTHER_LETTERS)
        )

    with bars.Progress(
        *columns, console=console, transient=True, speed_estimate_period=PACE
    ) as bar:
        task = bar.add_task(fitting(doing), total=None)

        def tell(done: float, total: float, doing: str) -> None:
            if (
                done < bar.tasks[0].completed
            ):  # another part of the work, which has a pace of its own
                bar.reset(task)
            bar.update(task, completed=done, total=total, description=fitting(doing))

        yield tell


@contextmanager
def _log(console: Console, doing: str) -> Iterator[Progress]:
    """A line a minute, also while a single step takes longer, or there are many short
    parts.
    """
    share, ended, me = 0.0, Event(), object()

    def tell(done: float, total: float, now_doing: str) -> None:
        nonlocal share, doing
        share, doing = done / (total or 1), now_doing
        speak()

    def speak() -> None:
        if (
            doing != "starting" and time.monotonic() - CLOCK.reported >= SILENT
        ):  # what is begun says so itself
            CLOCK.reported = time.monotonic()
            part = f", {share:.0%} of this part" if share else ""
            console.print(
                f"{CLOCK}: {printable(doing, console.encoding)}{part}", markup=False
            )

    def beat() -> None:
        while not ended.wait(SILENT / 4):
            if CLOCK.doing[-1:] == [me]:
                speak()

    thread = Thread(target=beat, daemon=True)
    CLOCK.doing.append(me)
    thread.start()
    try:
        yield tell
    finally:
        CLOCK.doing.remove(me)
        ended.set()
        thread.join()
