"""Models in an engine: table, sentence, figure and page."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..experiments.pareto.front import (
    compares_bits,
    is_faster,
    loses_less,
    pareto_front,
)
from ..experiments.pareto.options import DEFAULT_SPEEDUPS, MORE_SPEEDUPS
from ..experiments.pareto.records import ParetoRecord
from ..extras import FIGURES, installed
from ..files import write_whole
from ..measuring.statistics import LEAST_ROUNDS, LEAST_WINDOWS
from ..plan import several
from ..results.facts import DECODE_MS, PREFILL_MS, SPEEDUPS
from ..results.table import Column, in_bytes, size, table, with_error, within, words
from .folder import Folder
from .parts import Figure, Message, PageParts, Section

if TYPE_CHECKING:
    import altair as alt

    from ..charts.points import Point


HOW_TO_READ = "Lower right is better. Bars: standard error; quartiles of the speedup."
DELTA_BITS: Column[ParetoRecord] = with_error(
    "bits added", lambda one: one.loss(by_bits=True), unit="bits per byte"
)
DELTA_NLL: Column[ParetoRecord] = with_error(
    "NLL added", lambda one: one.loss(by_bits=False), unit="nats per token"
)


def _skipped_in_words(one: ParetoRecord) -> str:
    return several(len(one.skipped.split()), "sublayer") if one.skipped else ""


COLUMNS: tuple[Column[ParetoRecord], ...] = (
    words("model", lambda one: one.model),
    words("type", lambda one: one.type),
    words("repaired", lambda one: "yes" if one.repaired else ""),
    DELTA_NLL,
    *within(SPEEDUPS, lambda one: one.times),
    words("on the Pareto front", lambda one: "yes" if one.best else ""),
    size("file", lambda one: one.file_bytes),
    size("memory", lambda one: one.memory_bytes),
    words("memory of", lambda one: one.memory_of if one.memory_of != "process" else ""),
    with_error("bits per byte", lambda one: (one.bits_per_byte, one.bits_per_byte_se)),
    DELTA_BITS,
    with_error("NLL", lambda one: (one.nll, one.nll_se), unit="nats per token"),
    *within((DECODE_MS, PREFILL_MS), lambda one: one.times),
    words("without", _skipped_in_words),
    words("not measured", lambda one: one.failed),
)


def write_pareto(records: Sequence[ParetoRecord], out: Path, title: str) -> None:
    """The table and the sentence, `out/table.md`, and with the extra `report`
    `out/pareto.png`, .svg and .html.
    """
    rows = table(title, COLUMNS, records)
    text = f"{sentence(records)}\n\n{rows.markdown()}\n{rows.legend}\n"
    write_whole(out / "table.md", text)
    if installed(*FIGURES):
        from ..charts import style

        style.save(style.framed(_drawn(records), title, HOW_TO_READ), out / "pareto")


def _drawn(records: Sequence[ParetoRecord]) -> alt.LayerChart:
    """A colour for each model, a shape for what is repaired."""
    from ..charts.losses import Titles, tradeoff
    from ..charts.points import colours_in_turn

    by_bits = compares_bits(records)
    points = [_point(one, place, by_bits) for place, one in enumerate(records)]
    colours = colours_in_turn(point.colour for point in points)
    losses = DELTA_BITS if by_bits else DELTA_NLL
    return tradeoff(
        points,
        colours,
        Titles("model", "weights", losses.titled),
        best=[point for point, one in zip(points, records) if one.best],
        dense=False,
    )


def _point(one: ParetoRecord, place: int, by_bits: bool) -> Point:
    from ..charts.points import Point

    lost, error = one.loss(by_bits=by_bits)
    return Point(
        one.named,
        lost,
        error,
        one.times.speedup_decode if one.times else None,
        colour=one.model,
        shape="repaired" if one.repaired else "as it is",
        label=one.type,
        plan=place,
    )


def sentence(records: Sequence[ParetoRecord]) -> str:
    """What to take for a given speed: the front from the slowest to the fastest, and
    whether skipping is on it.
    """
    best, by_bits = pareto_front(records), compares_bits(records)
    if not best:
        return "No model was both scored and timed."
    unit = "bits per byte" if by_bits else "nats"
    choices = []
    for one in best:
        lost, _ = one.loss(by_bits=by_bits)
        costs = f"{lost:+.3f} {unit}, {in_bytes(one.file_bytes or 0)}"
        choices.append(f"{one.faster:.2f} times, {one.named} ({costs})")
    sentences = [
        f"What to take to decode so many times as fast as {records[0].named}:"
        f" {'; '.join(choices)}.",
        f"Leaving sublayers out {_pays(records, best, by_bits)}.",
        *_too_few(records[0]),
    ]
    return " ".join(sentences)


def _too_few(record: ParetoRecord) -> Iterator[str]:
    """A sentence where rounds or windows are too few to judge by."""
    rounds = record.rounds or LEAST_ROUNDS
    windows = record.windows or LEAST_WINDOWS
    few = [several(rounds, "round")] if rounds < LEAST_ROUNDS else []
    few += [f"{several(windows, 'window')} of text"] if windows < LEAST_WINDOWS else []
    if few:
        yield (
            f"That is of {' and '.join(few)}, too few to judge by: give --rounds"
            f" {LEAST_ROUNDS} and --held-out-sequences {LEAST_WINDOWS} or more."
        )


def _pays(
    records: Sequence[ParetoRecord], best: Sequence[ParetoRecord], by_bits: bool
) -> str:
    """From which speed on skipping pays: where it is faster than each model that skips
    nothing, or loses less.
    """
    whole = [one for one in records if one.times and not one.skipped]
    skipping = [one for one in best if one.skipped]

    def beats(one: ParetoRecord, other: ParetoRecord) -> bool:
        return is_faster(one, other) or loses_less(one, other, by_bits=by_bits)

    for one in skipping:
        if all(beats(one, other) for other in whole):
            return f"pays from {one.faster:.2f} times on"
    if skipping:
        may = f"may pay from {skipping[0].faster:.2f} times on"
        return f"{may}: rounds and windows do not tell it from what skips nothing"
    return "is nowhere on this front: it is not measurably faster than what loses less"


def page_parts(folder: Folder) -> PageParts:
    """Models in an engine; their checkpoints are in the folder."""
    from ..charts.style import on_page

    records = folder.of(ParetoRecord)
    figures = []
    if any(one.times for one in records):
        drawn = on_page(_drawn(records))
        figures.append(Figure(drawn, "Loss against decode speedup in the engine"))
    section = Section(
        "pareto",
        "Skipping beside quantising",
        tuple(figures),
        table("pareto", COLUMNS, records),
    )
    purpose, command = "measure what is faster beside these", _with_faster(folder)
    message = Message(sentence(records), None, purpose, command)
    return PageParts(message=message, sections=(section,))


def _with_faster(folder: Folder) -> str:
    """The command of the folder, with plans that are faster."""
    command = folder.provenance.command
    if command[:2] != ["notall", "pareto"]:
        engine = folder.provenance.what.get("engine", "llama.cpp")
        options = ["--engine", engine, "--out", str(folder.path)]
        command = ["notall", "pareto", folder.model, *options]
    asked = {word.partition("=")[0] for word in command}
    # without any of them it finds plans of its own
    finds_own = not {"--skip", "--plan", "--speedups"} & asked
    speedups = f"{DEFAULT_SPEEDUPS},{MORE_SPEEDUPS}" if finds_own else MORE_SPEEDUPS
    return shlex.join([*command, "--speedups", speedups])
