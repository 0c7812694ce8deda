"""Tables, words and progress at the terminal: of whatever width, a number or a heading
is never cut.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

from rich import progress as bars
from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions
from rich.table import Column as RichColumn, Table as RichTable
from rich.text import Text

from ..encodings import printable
from ..errors import shortened
from ..progress import CLOCK, Progress
from .table import Cell, Column, Table

FRAME = 3  # cells beside a column's text: a space on either side, and a line
TURNED = 2  # rows: so few may become columns
SILENT, PACE = (
    60.0,
    120.0,
)  # seconds without a word in a log; of whose steps the time left is told
OTHERS = 56  # letters of a line that are not the description
Pieces = tuple[
    str, ...
]  # of a heading or a cell: each stays whole, and may have a line of its own


def show(
    tables: Mapping[str, Table],
    *,
    as_json: bool,
    also: Mapping[str, object] | None = None,
    then: Iterable[str] = (),
) -> None:
    """Print tables and `then` lines of words, or as JSON the tables' facts, by their
    names, and `also` what else.
    """
    if as_json:
        found = {name: one.facts for name, one in tables.items()} | dict(also or {})
        print(
            json.dumps(
                found, indent=2, default=lambda fact: fact.model_dump(mode="json")
            )
        )
        return
    for one in tables.values():
        print_table(one)
    for line in then:
        say(line)


def say(line: str) -> None:
    """Print a line of words; the next command, which is copied from the terminal,
    without line breaks.
    """
    console, whole = Console(), line.startswith("Next:") or not sys.stdout.isatty()
    console.print(Text(printable(line, console.encoding)), soft_wrap=whole)


def next_report(folder: Path) -> str:
    return f"Next: notall report {folder} -o {folder / 'report.html'}"


def print_table(table: Table) -> None:
    """On stdout. A narrow terminal leaves out the last columns, and says so; a file or
    a pipe gets all of them.

    There a row is a line, unless COLUMNS says how wide the lines may be.
    """
    console, screen = Console(), sys.stdout.isatty()
    strips = _strips(table, console.encoding)
    if not (screen or os.environ.get("COLUMNS")):
        console.size = ConsoleDimensions(
            sum(strip.most for strip in strips) + FRAME * len(strips) + 1, 1
        )
    laid_out = _laid_out(strips, console.width)
    parts = (
        ([laid_out] if laid_out else None)
        if screen
        else _in_parts(strips, console.width)
    )
    console.print(
        Text(printable(table.title, console.encoding), style="bold"),
        soft_wrap=not screen,
    )
    if parts is None:  # each heading with what stands below it, row after row
        named = [
            [(*cells[0][:-1], f"{cells[0][-1]}:", *cell) for cell in cells[1:]]
            for cells, _ in strips
        ]
        console.print(
            Text("\n\n".join("\n".join(map(" ".join, row)) for row in zip(*named))),
            soft_wrap=True,
        )
        return
    for part in parts:
        console.print(_drawn(part))
    if screen and len(table.rows) > TURNED and len(parts[0]) < len(strips):
        left_out = [" ".join(strip.cells[0]) for strip in strips[len(parts[0]) :]]
        console.print(
            Text(
                f"also measured: {', '.join(left_out)}; see --json or a wider terminal"
            )
        )


def _drawn(laid_out: Sequence["Strip"]) -> RichTable:
    """Each piece is on a line of its own; with rules between the rows where that takes
    several lines.
    """
    headings, *rows = zip(*(strip.cells for strip in laid_out))
    drawn = RichTable(show_lines=any(len(cell) > 1 for row in rows for cell in row))
    for heading, strip in zip(headings, laid_out):
        drawn.add_column(
            Text("\n".join(heading)),
            justify="right" if strip.right else "left",
            no_wrap=True,
        )
    for row in rows:
        drawn.add_row(*(Text("\n".join(cell)) for cell in row))
    return drawn


class Strip(NamedTuple):
    """A column as text, its heading first: of a number the pieces are itself and its
    error, of a text its words.
    """

    cells: tuple[Pieces, ...]
    right: bool

    @property
    def least(self) -> int:
        """How narrow it may become."""
        return max(cell_len(piece) for cell in self.cells for piece in cell)

    @property
    def most(self) -> int:
        """How wide it is with every cell in one line."""
        return max(cell_len(" ".join(cell)) for cell in self.cells)


def _strips(table: Table, encoding: str) -> list[Strip]:
    """The columns as the terminal's encoding can write them."""

    def pieces(cell: Cell, right: bool) -> Pieces:
        value, beside = printable(cell.text, encoding), printable(cell.beside, encoding)
        return (
            *([value] if right else value.split(" ")),
            *([beside] if beside else []),
        )

    def strip(place: int, column: Column[object]) -> Strip:
        heading = pieces(Cell(None, column.heading), False)
        return Strip(
            (heading, *(pieces(row[place], column.right) for row in table.rows)),
            column.right,
        )

    return [strip(place, column) for place, column in enumerate(table.columns)]


def _in_parts(strips: Sequence[Strip], width: int) -> list[list[Strip]] | None:
    """All columns, in tables of `width` cells below each other, which each begin with
    what names the rows.

    None where a list is all that fits.
    """
    parts, named = list[list[Strip]](), strips[: _naming(strips)]
    while part := _laid_out(strips, width):
        parts.append(part)
        if len(part) == len(strips) or _is_short(strips):
            return parts
        if len(part) == len(named):
            return None
        strips = [*named, *strips[len(part) :]]
    return None


def _is_short(strips: Sequence[Strip]) -> bool:
    return len(strips[0].cells) - 1 <= TURNED


def _naming(strips: Sequence[Strip]) -> int:
    """How many columns name the rows: to the first with numbers, which comes along."""
    return next(
        (place for place, strip in enumerate(strips, 1) if strip.right and place > 1), 2
    )


def _laid_out(strips: Sequence[Strip], width: int) -> list[Strip] | None:
    """The table in `width` cells, its headings in several lines, then its cells; None
    where a list is all that fits.

    Then few rows become columns; of more the last columns go, but not the first, nor
    the first with numbers after it.
    """
    turns = _is_short(strips)
    fewest = len(strips) if turns else _naming(strips)
    for count in range(len(strips), fewest - 1, -1):
        for start in (
            0,
            1,
            len(strips[0].cells),
        ):  # the first cell that stands in one line
            cells = [
                (*one.cells[:start], *((" ".join(cell),) for cell in one.cells[start:]))
                for one in strips[:count]
            ]
            if fitting := _fitted(
                [Strip(some, one.right) for some, one in zip(cells, strips)], width
            ):
                return fitting
    rows = zip(*(strip.cells for strip in strips))  # each a column
    turned = [Strip(cells, place > 0) for place, cells in enumerate(rows)]
    return _fitted(turned, width, by_words=True) if turns else None


def _fitted(
    strips: Sequence[Strip], width: int, *, by_words: bool = False
) -> list[Strip] | None:
    """The strips in `width` cells, the widest narrowed first; None where they don't
    fit.

    Columns of numbers have two widths, with errors beside and below; `by_words` they
    hold text, too.
    """
    least, widths = [strip.least for strip in strips], [strip.most for strip in strips]
    room = width - FRAME * len(strips) - 1
    if sum(least) > room:
        return None
    while sum(widths) > room:
        widest = max(
            (place for place in range(len(strips)) if widths[place] > least[place]),
            key=widths.__getitem__,
        )
        widths[widest] = (
            least[widest]
            if strips[widest].right and not by_words
            else widths[widest] - 1
        )
    return [
        Strip(tuple(_filled(cell, wide) for cell in one.cells), one.right)
        for one, wide in zip(strips, widths)
    ]


def _filled(pieces: Pieces, width: int) -> Pieces:
    """With as many pieces on a line as `width` takes."""
    lines = [pieces[0]]
    for piece in pieces[1:]:
        if cell_len(lines[-1]) + 1 + cell_len(piece) <= width:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    return tuple(lines)


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
            printable(doing, console.encoding), max(12, console.width - OTHERS)
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
