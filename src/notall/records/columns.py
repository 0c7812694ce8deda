"""Columns of tables: what a field is called, how it is written and how it sorts, said once for every medium.

A medium may leave columns out; the terminal, a page, Markdown and CSV take the rest from the same description.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

Row = dict[str, Any]  # plain values by the names of fields

NOTHING = "-"  # what was not measured, or came out as no number
LARGE = 1e5  # from here on a number is told by its magnitude


@dataclass(frozen=True)
class Column:
    """A heading, and what a row says below it; rows are sorted by the first of `fields`.

    `write` writes the first field, `write_beside` the others, which are the error or the spread of a number: they go
    below it where the terminal is narrow. `unit` and `note` say what the heading and the cells take for granted.
    """

    fields: tuple[str, ...]
    heading: str
    write: Callable[[Any], str] = str
    write_beside: Callable[..., str] | None = None
    right: bool = True
    unit: str = ""
    note: str = ""

    @property
    def titled(self) -> str:
        """The heading with its unit, for where there is room."""
        return f"{self.heading}, {self.unit}" if self.unit else self.heading

    def value(self, row: Row) -> str:
        value = row.get(self.fields[0])
        return NOTHING if _is_nothing(value) else self.write(value)

    def beside(self, row: Row) -> str:
        if not self.write_beside or _is_nothing(row.get(self.fields[0])):
            return ""
        return self.write_beside(*(row.get(field) for field in self.fields[1:]))

    def text(self, row: Row) -> str:
        return f"{self.value(row)} {self.beside(row)}".rstrip()

    def sorted_by(self, row: Row) -> float | str | None:
        """A number, or else text; None where there is nothing."""
        value = row.get(self.fields[0])
        return value if value is None or isinstance(value, (int, float, str)) else self.value(row)


def plain(field: str, heading: str | None = None, write: Callable[[Any], str] = str) -> Column:
    """Words."""
    return Column((field,), heading or field, write, right=False)


def number(field: str, heading: str, form: str = ".3f", unit: str = "") -> Column:
    return Column((field,), heading, lambda value: _written(value, form), unit=unit)


def magnitude(field: str, heading: str) -> Column:
    """A number that may have many digits."""
    return Column((field,), heading, in_magnitude)


def probability(field: str, heading: str) -> Column:
    """A p value; a small one is not rounded to none."""
    return Column((field,), heading, lambda value: "< 0.001" if value < 0.001 else f"{value:.3f}")


def with_error(field: str, heading: str, form: str = ".3f", unit: str = "") -> Column:
    """A mean and its standard error."""
    fields = (field, f"{field}_se")
    write = _formatted(form)
    return Column(fields, heading, write, lambda error: f"± {write(error)}", unit=unit, note="±: one standard error")


def with_spread(field: str, heading: str, form: str = ".1f") -> Column:
    """A median and its quartiles."""
    write = _formatted(form)
    fields = (field, f"{field}_low", f"{field}_high")
    spread = "[ ]: quartiles of the rounds"
    return Column(fields, heading, write, lambda low, high: f"[{write(low)}, {write(high)}]", note=spread)


def with_difference(name: str, form: str = ".3f") -> Column:
    """A figure with its difference to the dense model and that one's standard error."""
    write, signed = _formatted(form), _formatted(f"+{form}")
    fields = (f"{name} value", f"{name} delta", f"{name} delta_se")
    note = "( ): difference to the dense model ± its standard error"

    def beside(delta: Any, error: Any) -> str:  # nothing beside the dense model itself
        return "" if _is_nothing(delta) else f"({signed(delta)} ± {write(error)})"

    return Column(fields, name, write, beside, note=note)


def size(field: str, heading: str) -> Column:
    """Bytes, in the unit that suits them."""
    return Column((field,), heading, in_bytes)


def is_number(value: float | None) -> TypeGuard[float]:
    """Whether there is a value, and a finite one."""
    return value is not None and math.isfinite(value)


def in_bytes(value: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def in_magnitude(value: float) -> str:
    """`1,351.8`, or `2.9e9` instead of a row of digits."""
    if not LARGE <= abs(value) < math.inf:
        return f"{value:,.1f}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}e{int(power)}"


def given(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """The columns that a row has something in."""
    return [column for column in columns if not rows or any(row.get(column.fields[0]) is not None for row in rows)]


def legend(columns: Sequence[Column]) -> str:
    """What the signs in their cells mean; "" where there are none."""
    notes = dict.fromkeys(column.note for column in columns if column.note)
    return f"{'; '.join(notes)}." if notes else ""


def as_markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A table in Markdown."""
    rules = ["---:" if column.right else "---" for column in columns]
    cells = ([column.text(row).replace("|", r"\|") for column in columns] for row in rows)
    lines = [[column.heading for column in columns], rules, *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_csv(rows: Sequence[Row], columns: Sequence[Column] = ()) -> str:
    """Every field that is a number or text, by its name and with every digit: those of `columns` first."""
    flat = [{name: value for name, value in row.items() if not isinstance(value, (dict, list, tuple))} for row in rows]
    found = dict.fromkeys(name for row in flat for name in row)
    names = dict.fromkeys(field for column in columns for field in column.fields if field in found)
    out = io.StringIO()
    writer = csv.DictWriter(out, [*(names | found)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _formatted(form: str) -> Callable[[Any], str]:
    return lambda value: NOTHING if _is_nothing(value) else _written(value, form)


def _written(value: float, form: str) -> str:
    """By `form`; what rounds to nothing is not below it."""
    text = format(value, form)
    nothing = "0" in text and not any(digit in text for digit in "123456789")
    return format(abs(value) * 0, form) if nothing else text


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
