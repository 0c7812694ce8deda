"""What pages of several verbs share: the best of plans, plans side by side, what each
sublayer costs alone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import Field

from ..errors import shortened
from ..plan import several
from ..results.facts import DELTA_NLL, KL, Footprint, Quality, Similarity, Times
from ..results.ledger import header_of, read
from ..results.record import Skips, is_number
from ..results.repairs import EvaluationRecord
from ..results.table import Column, as_csv, table, words
from ..strict_json import Settings
from .driver import SIMILARITY_READS, LeaveOneOutRecord
from .folder import Costs, Figure, Folder, Message, Place, Section, Shown, Step, in_nats
from .verdict import NAME_LETTERS, Verdict, asking_for_less, faults_of, is_usable

if TYPE_CHECKING:
    from ..charts.losses import Point


class MeasuredPlan(Skips):
    """What pages ask of a plan: how much it loses, and what it saves."""

    quality: Quality
    times: Times | None = Field(None, description="where plans were timed")
    footprint: Footprint

    @property
    def way(self) -> str:
        """What a sentence calls it."""
        return self.name


P = TypeVar("P", bound=MeasuredPlan)


def fastest(records: Iterable[P]) -> P | None:
    """The fastest usable one: of those as fast by quartiles, what loses least; untimed:
    the smallest, then the best.
    """
    usable = [one for one in records if one.plan and is_usable(one.quality)]

    def pace(one: P) -> float:
        return one.times.speedup_decode.median if one.times else 0

    first = max(
        usable,
        key=lambda one: (
            pace(one),
            -one.footprint.weight_bytes,
            -one.quality.nats_lost,
        ),
        default=None,
    )
    if first is None or not first.times:
        return first
    low = first.times.speedup_decode.low
    return min(
        (one for one in usable if pace(one) >= low),
        key=lambda one: one.quality.nats_lost,
    )


def mildest(records: Iterable[P]) -> P | None:
    known = (one for one in records if one.plan and is_number(one.quality.delta_nll))
    return min(known, key=lambda one: one.quality.nats_lost, default=None)


def shown_plans(
    folder: Folder,
    records: Sequence[P],
    sections: Iterable[Section],
    then: Callable[[Folder, P], tuple[str, str]],
    dense: Footprint | None = None,
) -> Shown:
    """A page on the fastest usable plan, and on what comes `then`; else on the mildest,
    else the last.
    """
    steps = tuple(
        Step(one.name, one.plan, one.quality, one.times, one.footprint, dense)
        for one in records
    )
    best, least, message = fastest(records), mildest(records), None
    if best:
        message = Verdict.of(steps[records.index(best)], folder, best.way).message(
            *then(folder, best)
        )
    elif least:
        plans = sum(bool(one.plan) for one in records)
        which = (
            f"None of the {plans} plans here leaves"
            if plans > 1
            else "The one plan here does not leave"
        )
        mild = (
            f"{shortened(least.name, NAME_LETTERS)},"
            f" {' and '.join(faults_of(least.quality))}"
        )
        said = (
            f"{which} {shortened(folder.model, NAME_LETTERS)} usable: with the mildest,"
            f" {mild}"
        )
        message = Message(
            f"{said}: {in_nats(least.quality)}.", False, *asking_for_less(folder.model)
        )
    first = records.index(best or least or records[-1])
    return Shown(
        message, (), steps, first, tuple(sections), costs=read_costs(folder.path)
    )


def results(
    records: Sequence[P],
    columns: Sequence[Column[P]],
    order: Sequence[int],
    figures: Sequence[Figure],
    note: str = "",
) -> Section:
    """The records in this order, with a column that says which models are still usable,
    beside the figures of them.
    """

    def usable(one: P) -> str:
        known = one.plan and is_number(one.quality.delta_nll)
        return "" if not known else "yes" if is_usable(one.quality) else "no"

    place = 1 + [column.heading for column in columns].index(DELTA_NLL.heading)
    marked = [*columns[:place], words("usable", usable), *columns[place:]]
    lines = table("results", marked, [records[number] for number in order])
    return Section("results", "Results", tuple(figures), lines, tuple(order), note)


def points_of(records: Sequence[P], look: Callable[[P], Settings]) -> "list[Point]":
    """A point for each record with a loss, which looks as `look` says; its `plan`
    counts the records from 0.
    """
    from ..charts.losses import Point

    found = []
    for number, one in enumerate(records):
        lost, speedup = one.quality, one.times.speedup_decode if one.times else None
        if is_number(lost.delta_nll):
            found.append(
                Point(
                    one.name,
                    lost.delta_nll,
                    lost.delta_nll_se,
                    speedup,
                    plan=number,
                    **look(one),
                )
            )
    return found


def similarity_section(rows: Sequence[Similarity]) -> Section:
    from ..charts.layers import similarity
    from ..charts.style import on_page

    figure = Figure(
        on_page(similarity(rows), 340),
        "change by depth",
        csv=as_csv(rows),
        note=f"{SIMILARITY_READS}.",
    )
    return Section("similarity", "Similarity by depth", (figure,))


TITLES = {"nll": DELTA_NLL.titled, "kl": f"KL added, {KL.unit}"}  # by the objective


def read_costs(folder: Path) -> Costs | None:
    """Of all that a folder's files tell, what tells of most sublayers. Raises
    `UsageError` on a malformed line.
    """
    found = []
    if rows := read(folder / LeaveOneOutRecord.file, LeaveOneOutRecord):
        windows = rows[0].sequences
        on = f"{several(windows, 'window')} of text" if windows else "some text"
        found.append(
            Costs(
                {_place(row.sublayer): row.delta_nll for row in rows}, TITLES["nll"], on
            )
        )
    log = folder / EvaluationRecord.file
    for file in (log, *sorted(log.with_suffix("").glob("*.jsonl"))):
        found += _evaluated(file)
    return max(found, key=lambda costs: len(costs.found), default=None)


def _evaluated(file: Path) -> Iterator[Costs]:
    """Of a search or a comparison, which may have evaluated sublayers alone on all of
    its text, and on parts of it.
    """
    header = header_of(file)
    objective = header.provenance.what.get("objective") if header else None
    by_share: dict[int | str, dict[tuple[str, ...], float]] = {}
    for row in read(file, EvaluationRecord):
        if is_number(row.cost):
            by_share.setdefault(row.batches, {})[row.skipped] = row.cost
    for share, costs in by_share.items():
        if () not in costs:
            continue
        found = {
            _place(names[0]): cost - costs[()]
            for names, cost in costs.items()
            if len(names) == 1
        }
        if found:
            part = "" if share == "all" else f", on {share} of its batches"
            title = TITLES.get(str(objective), f"rise of {objective}")
            yield Costs(found, title, f"the text that was chosen by{part}")


def _place(name: str) -> Place:
    kind, _, layer = name.partition(".")
    return "mlp" if kind == "mlp" else "attention", int(layer)
