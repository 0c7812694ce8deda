"""What pages of several verbs share: plans side by side, how much faster they are, what each sublayer costs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..plan import several
from ..results.facts import DELTA_NLL, KL, SPEEDUPS, Footprint, Similarity, Times
from ..results.ledger import header_of, read
from ..results.record import is_number
from ..results.repairs import EvaluationRecord
from ..results.table import Column, as_csv, table
from .driver import SIMILARITY_READS, LeaveOneOutRecord
from .folder import Folder
from .shown import Card, Costs, Figure, Place, Section, Shown, Step
from .verdict import M, first_shown, judged, mark_usable

if TYPE_CHECKING:
    from ..charts.losses import Point


def shown_plans(
    folder: Folder,
    records: Sequence[M],
    sections: Iterable[Section],
    cards: Iterable[Card],
    then: Callable[[Folder, M], tuple[str, str]],
    *,
    way: Callable[[M], str] = lambda one: one.name,
    dense: Footprint | None = None,
) -> Shown:
    """A page of plans that were measured; `then` says what comes next, and `way` is a plan's name in a sentence."""
    return Shown(
        message=judged(folder, records, then=lambda one: then(folder, one), way=way, dense=dense),
        cards=tuple(cards),
        steps=tuple(Step(one.name, one.plan, one.quality, one.times, one.footprint, dense) for one in records),
        first=first_shown(records),
        sections=tuple(sections),
        costs=read_costs(folder.path),
    )


def results(
    records: Sequence[M], columns: Sequence[Column[M]], order: Sequence[int], figures: Sequence[Figure], note: str = ""
) -> Section:
    """The records in this order, beside the figures of them."""
    marked = mark_usable(columns, lambda one: one.quality if one.plan else None)
    lines = table("results", marked, [records[place] for place in order])
    return Section("results", "Results", tuple(figures), lines, tuple(order), note)


def with_points(records: Sequence[M]) -> list[tuple[M, Point]]:
    """The records with a loss, each with its point in a figure; its `plan` counts the records from 0."""
    from ..charts.losses import Point

    found = []
    for number, one in enumerate(records):
        lost, speedup = one.quality, one.times.speedup_decode if one.times else None
        if is_number(lost.delta_nll):
            found.append((one, Point(one.name, lost.delta_nll, lost.delta_nll_se, speedup, plan=number)))
    return found


def similarity_section(rows: Sequence[Similarity]) -> Section:
    """What a page shows of them."""
    from ..charts.layers import similarity
    from ..charts.style import on_page

    figure = Figure(on_page(similarity(rows), 340), "change by depth", csv=as_csv(rows), note=f"{SIMILARITY_READS}.")
    return Section("similarity", "Similarity by depth", (figure,))


def speedup_cards(times: Times, told: str) -> list[Card]:
    """How many times as fast decoding and prefill are, with quartiles."""
    cells = [(column.heading.capitalize(), column.cell(times)) for column in SPEEDUPS]
    return [Card(heading, f"{cell.text}×", cell.beside, told) for heading, cell in cells]


TITLES = {"nll": DELTA_NLL.titled, "kl": f"KL added, {KL.unit}"}  # by the objective


def read_costs(folder: Path) -> Costs | None:
    """Of all that a folder's files tell, what tells of most sublayers. Raises `UsageError` on a malformed line."""
    found = []
    if rows := read(folder / LeaveOneOutRecord.file, LeaveOneOutRecord):
        windows = rows[0].sequences
        on = f"{several(windows, 'window')} of text" if windows else "some text"
        found.append(Costs({_place(row.sublayer): row.delta_nll for row in rows}, TITLES["nll"], on))
    log = folder / EvaluationRecord.file
    for file in (log, *sorted(log.with_suffix("").glob("*.jsonl"))):
        found += _evaluated(file)
    return max(found, key=lambda costs: len(costs.found), default=None)


def _evaluated(file: Path) -> Iterator[Costs]:
    """Of a search or a comparison, which may have evaluated sublayers alone on all of its text, and on parts of it."""
    header = header_of(file)
    objective = header.provenance.what.get("objective") if header else None
    by_share: dict[int | str, dict[tuple[str, ...], float]] = {}
    for row in read(file, EvaluationRecord):
        if is_number(row.cost):
            by_share.setdefault(row.batches, {})[row.skipped] = row.cost
    for share, costs in by_share.items():
        if () not in costs:
            continue
        found = {_place(names[0]): cost - costs[()] for names, cost in costs.items() if len(names) == 1}
        if found:
            part = "" if share == "all" else f", on {share} of its batches"
            title = TITLES.get(str(objective), f"rise of {objective}")
            yield Costs(found, title, f"the text that was chosen by{part}")


def _place(name: str) -> Place:
    kind, _, layer = name.partition(".")
    return "mlp" if kind == "mlp" else "attention", int(layer)
