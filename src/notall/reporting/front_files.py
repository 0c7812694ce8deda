"""A front of skipped and quantised models as files that people open, and in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..records.claims import LEAST_ROUNDS, LEAST_WINDOWS
from ..records.columns import Row, as_markdown, given, in_bytes, legend
from ..records.front import FrontRecord, best_of, goes_by_bits, loss_of, named
from .extras import FIGURES, installed


def write_front(rows: Sequence[Row], out: Path, title: str) -> None:
    """The table and the sentence, `out/table.md`, and with the extra `report` `out/front.png`, .svg and .html.

    Raises `UsageError` as plots do.
    """
    columns = given(FrontRecord.columns, rows)
    table = f"{sentence(rows)}\n\n{as_markdown(rows, columns)}\n{legend(columns)}\n"
    (out / "table.md").write_text(table, encoding="utf-8")
    if not installed(*FIGURES):
        return
    from . import plots

    plots.save(plots.quantised_chart(rows, title), out / "front")


def sentence(rows: Sequence[Row]) -> str:
    """What to take for a given speed: the front from the slowest to the fastest, and whether skipping is on it."""
    best = best_of(rows)
    if not best:
        return "No model was both scored and timed."
    by_bits = goes_by_bits(rows)
    choices = "; ".join(f"{row['speedup_decode']:.2f} times, {_choice(row, by_bits=by_bits)}" for row in best)
    said = f"What to take to decode so many times as fast as {named(rows[0])}: {choices}. {_skipping(best)}"
    return f"{said}{_caution(rows[0])}"


def _choice(row: Row, *, by_bits: bool) -> str:
    value = loss_of(row, by_bits=by_bits)
    return f"{named(row)} ({value:+.3f} {'bits a byte' if by_bits else 'nats'}, {in_bytes(row['file_bytes'])})"


def _caution(row: Row) -> str:
    """A word where it is too little to go by."""
    needed = (("rounds", "round", "", LEAST_ROUNDS), ("windows", "window", " of text", LEAST_WINDOWS))
    few = [
        f"{count} {what}{'s' if count > 1 else ''}{of}"
        for name, what, of, least in needed
        if (count := row.get(name)) is not None and count < least
    ]
    if not few:
        return ""
    return (
        f" That is of {' and '.join(few)}, too few to go by: give --rounds {LEAST_ROUNDS} and --sequences "
        f"{LEAST_WINDOWS} or more."
    )


def _skipping(best: Sequence[Row]) -> str:
    skipped = [row for row in best if row["skipped"]]
    if not skipped:
        return "Leaving sublayers out is nowhere on this front: quantising alone is better."
    return f"Leaving sublayers out pays from {skipped[0]['speedup_decode']:.2f} times on."
