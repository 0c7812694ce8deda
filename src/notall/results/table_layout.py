"""How a table stands in a terminal of any width: a number, a first column or a heading is never cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len

FRAME = 3  # cells beside a column's text: a space on either side, and a line
Pieces = tuple[str, ...]  # of a heading or a cell: each stays whole, and may have a line of its own


@dataclass(frozen=True)
class Strip:
    """A column as text. A number's pieces are the number and its error or spread; those of a text are its words."""

    heading: Pieces
    cells: tuple[Pieces, ...]
    right: bool

    @property
    def least(self) -> int:
        """How narrow it may become."""
        return max(cell_len(piece) for pieces in (self.heading, *self.cells) for piece in pieces)

    @property
    def most(self) -> int:
        """How wide it is with every cell in one line."""
        return max(cell_len(" ".join(pieces)) for pieces in (self.heading, *self.cells))

    def filled(self, width: int) -> Strip:
        """With as many pieces on a line as `width` takes."""
        cells = tuple(_filled(pieces, width) for pieces in self.cells)
        return replace(self, heading=_filled(self.heading, width), cells=cells)


@dataclass(frozen=True)
class Layout:
    """Strips whose pieces are lines, and the headings of those that found no room."""

    strips: Sequence[Strip]
    left_out: Sequence[str] = ()


def lay_out(strips: Sequence[Strip], width: int) -> Layout | None:
    """The table in `width` cells, or None where a list is all that fits.

    First headings take several lines, then cells. Then one row or two are turned, so that a column becomes a row; of
    more rows the last columns are left out, but never the first one nor the first with numbers after it.
    """
    turns = len(strips[0].cells) <= 2
    answer = next((place for place, strip in enumerate(strips, 1) if strip.right and place > 1), 2)
    fewest = len(strips) if turns else answer
    for count in range(len(strips), fewest - 1, -1):
        whole = [replace(strip, cells=tuple(map(_joined, strip.cells))) for strip in strips[:count]]
        unbroken = [replace(strip, heading=_joined(strip.heading)) for strip in whole]
        for broken in (unbroken, whole, strips[:count]):
            if fitting := _fitted(broken, width):
                return Layout(fitting, [" ".join(strip.heading) for strip in strips[count:]])
    turned = _fitted(_turned(strips), width) if turns else None
    return Layout(turned) if turned else None


def listed(strips: Sequence[Strip]) -> Iterator[str]:
    """The table as lines of a heading and what stands below it, row after row."""
    for row in range(len(strips[0].cells)):
        if row:
            yield ""
        yield from (" ".join((*strip.heading[:-1], f"{strip.heading[-1]}:", *strip.cells[row])) for strip in strips)


def width_of(strips: Sequence[Strip]) -> int:
    return sum(strip.most for strip in strips) + FRAME * len(strips) + 1


def _fitted(strips: Sequence[Strip], width: int) -> list[Strip] | None:
    """The strips in `width` cells, the widest narrowed first; None where they don't fit."""
    least, widths = [strip.least for strip in strips], [strip.most for strip in strips]
    room = width - FRAME * len(strips) - 1
    if sum(least) > room:
        return None
    while sum(widths) > room:
        widest = max((place for place in range(len(strips)) if widths[place] > least[place]), key=widths.__getitem__)
        widths[widest] = least[widest] if strips[widest].right else widths[widest] - 1
    return [strip.filled(width) for strip, width in zip(strips, widths)]


def _turned(strips: Sequence[Strip]) -> list[Strip]:
    """A row for each column."""
    first, *others = strips
    names = Strip(first.heading, tuple(strip.heading for strip in others), right=False)
    rows = [Strip(name, tuple(strip.cells[row] for strip in others), True) for row, name in enumerate(first.cells)]
    return [names, *rows]


def _joined(pieces: Pieces) -> Pieces:
    return (" ".join(pieces),)


def _filled(pieces: Pieces, width: int) -> Pieces:
    lines = [pieces[0]]
    for piece in pieces[1:]:
        if cell_len(lines[-1]) + 1 + cell_len(piece) <= width:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    return tuple(lines)
