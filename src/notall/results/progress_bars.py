"""How far long work is, at the terminal: what is being done, for how long, and how long it still takes, about."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from ..errors import shortened
from ..progress import Progress
from ..results.printable import printable

SILENT = 60.0  # seconds without a word, in a log
OTHERS = 56  # letters of a line that are not the description


class Clock(ProgressColumn):
    """The time that has passed and, once Rich can tell from the steps so far, the time that is left."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        passed = f"{timedelta(seconds=int(task.elapsed or 0))} elapsed"
        left = task.time_remaining
        return Text(f"{passed}, about {timedelta(seconds=int(left))} left" if left else passed)


@contextmanager
def progress_bar(doing: str = "starting") -> Iterator[Progress]:
    """A bar on stderr of what work is `doing`, gone when it ends; where stderr is no terminal, a line now and then."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn("dots" if console.encoding.startswith("utf") else "line"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=10),
        TaskProgressColumn(),
        Clock(table_column=Column(no_wrap=True)),
    )
    if not console.is_terminal:
        with _log(console, doing) as tell:
            yield tell
        return

    def fitting(doing: str) -> str:
        return shortened(printable(doing, console.encoding), max(12, console.width - OTHERS))

    with RichProgress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(fitting(doing), total=None)
        yield lambda done, total, doing: bar.update(task, completed=done, total=total, description=fitting(doing))


@contextmanager
def _log(console: Console, doing: str) -> Iterator[Progress]:
    """A line a minute, also while a single step takes longer."""
    begun = told = time.monotonic()
    share, ended = 0.0, Event()

    def tell(done: float, total: float, now_doing: str) -> None:
        nonlocal share, doing
        share, doing = done / (total or 1), now_doing
        say()

    def say() -> None:
        nonlocal told
        if (now := time.monotonic()) - told >= SILENT:
            told = now
            passed, said = timedelta(seconds=int(now - begun)), printable(doing, console.encoding)
            console.print(f"{share:.0%} after {passed}: {said}", markup=False)

    def beat() -> None:
        while not ended.wait(SILENT / 4):
            say()

    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield tell
    finally:
        ended.set()
        thread.join()
