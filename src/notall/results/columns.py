"""Columns of tables: the heading, and the text and the value of a row's cell, once for
every medium.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from .record import Quartiles, is_number

F = TypeVar("F")
G = TypeVar("G")

NumberForm = str | Callable[[float], str]  # of a number: a format, or a function
NOT_MEASURED = "-"  # what was not measured, or came out as no number
LARGE_NUMBER = 1e5  # from here on a number is written by its magnitude


@dataclass(frozen=True)
class Cell:
    """What a table says of one row: what rows are sorted by, if anything; its text; and
    the error of a number.
    """

    value: float | str | None
    text: str = NOT_MEASURED
    error: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.error}".rstrip()


EMPTY = Cell(None)


@dataclass(frozen=True)
class Column(Generic[F]):
    """A heading, and what stands below it; `unit` and `note` say what the heading and
    the cells take for granted.
    """

    heading: str
    cell: Callable[[F], Cell]
    right: bool = True
    unit: str = ""
    note: str = ""

    def text(self, row: F) -> str:
        """The cell of a row as text."""
        return str(self.cell(row))

    @property
    def titled(self) -> str:
        """The heading with its unit, for where there is room."""
        return f"{self.heading}, {self.unit}" if self.unit else self.heading


def _column(
    heading: str,
    get: Callable[[F], G | None],
    cell: Callable[[G], Cell],
    right: bool = True,
    **texts: str,
) -> Column[F]:
    """Of what `get` finds in a row; None is nothing."""
    return Column(
        heading,
        lambda row: EMPTY if (found := get(row)) is None else cell(found),
        right,
        **texts,
    )


def words(heading: str, get: Callable[[F], object]) -> Column[F]:
    """Text; None and "" are nothing."""
    return _column(
        heading,
        get,
        lambda found: EMPTY if found == "" else Cell(str(found), str(found)),
        right=False,
    )


def number(
    heading: str,
    get: Callable[[F], float | None],
    form: NumberForm = ".3f",
    *,
    right: bool = True,
    unit: str = "",
) -> Column[F]:
    """A number, by a format or by a function."""

    def cell(value: float) -> Cell:
        return (
            Cell(value, form(value) if callable(form) else formatted(value, form))
            if is_number(value)
            else EMPTY
        )

    return _column(heading, get, cell, right, unit=unit)


def size(heading: str, get: Callable[[F], float | None]) -> Column[F]:
    """A number of bytes, in a unit of its magnitude."""
    return number(heading, get, in_bytes)


def with_error(
    heading: str,
    get: Callable[[F], tuple[float, float] | None],
    form: str = ".3f",
    unit: str = "",
) -> Column[F]:
    """A mean and its standard error."""

    def cell(found: tuple[float, float]) -> Cell:
        mean, error = found
        return (
            Cell(mean, formatted(mean, form), f"± {formatted(error, form)}")
            if is_number(mean)
            else EMPTY
        )

    return _column(heading, get, cell, unit=unit, note="±: one standard error")


def with_quartiles(
    heading: str, get: Callable[[F], Quartiles | None], form: str = ".1f"
) -> Column[F]:
    """A median and its quartiles."""
    note = "[ ]: quartiles of the rounds"
    return _column(
        heading, get, lambda of: _between(of.median, of.low, of.high, form), note=note
    )


def with_interval(
    heading: str, get: Callable[[F], tuple[float, float, float] | None]
) -> Column[F]:
    """A share of the original model's, with the ends of its interval."""
    return _column(
        heading,
        get,
        lambda found: _between(*found, ".2f"),
        note="[ ]: 95 % interval, paired",
    )


def _between(value: float, low: float, high: float, form: str) -> Cell:
    return Cell(
        value,
        formatted(value, form),
        f"[{formatted(low, form)}, {formatted(high, form)}]",
    )


def with_delta(
    heading: str, get: Callable[[F], tuple[float, float, float] | None]
) -> Column[F]:
    """A figure with its difference to the original model and its error; nothing for
    the original model itself.
    """

    def cell(found: tuple[float, float, float]) -> Cell:
        value, delta, error = found
        difference = (
            f"({formatted(delta, '+.3f')} ± {formatted(error, '.3f')})"
            if is_number(delta)
            else ""
        )
        return (
            Cell(value, formatted(value, ".3f"), difference)
            if is_number(value)
            else EMPTY
        )

    return _column(
        heading,
        get,
        cell,
        note="( ): difference to the original model ± its standard error",
    )


def inherited(kind: type[F], columns: Iterable[Column[G]]) -> tuple[Column[F], ...]:
    """The columns of a fact as those of a `kind` that extends it."""
    return within(columns, lambda row: row)  # type: ignore[arg-type, return-value]


def within(
    columns: Iterable[Column[G]], get: Callable[[F], G | None]
) -> tuple[Column[F], ...]:
    """The columns of a fact as those of a record that holds it, where it was
    measured.
    """
    return tuple(
        _column(one.heading, get, one.cell, one.right, unit=one.unit, note=one.note)
        for one in columns
    )


def formatted(value: float, form: str) -> str:
    """By `form`; what rounds to nothing is not below it, and what is no number is
    `-`.
    """
    if not is_number(value):
        return NOT_MEASURED
    text = format(value, form)
    nothing = "0" in text and not any(digit in text for digit in "123456789")
    return format(abs(value) * 0, form) if nothing else text


def in_bytes(value: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def in_magnitude(value: float) -> str:
    """`1,351.8`, or `2.9e9` instead of a row of digits."""
    if not LARGE_NUMBER <= abs(value) < math.inf:
        return f"{value:,.1f}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}e{int(power)}"
