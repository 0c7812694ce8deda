"""Pages about plans: the best of them, and a table of all."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from ..errors import shortened
from ..experiments.next_commands import asking_for_less
from ..experiments.recovery import JudgedRecord
from ..experiments.subject import MeasuredPlan
from ..experiments.verdict import NAME_LETTERS, Verdict, faults_of, in_nats, is_usable
from ..plan import Plan, several
from ..results.facts import DELTA_NLL, PLAN_SCORES, Footprint, PlanScore
from ..results.record import is_number
from ..results.table import Column, Table, table, words
from ..strict_json import Settings
from .costs import read_costs
from .folder import Folder
from .parts import Figure, Message, PageParts, PageStep, Section

if TYPE_CHECKING:
    from ..charts.points import Point


P = TypeVar("P", bound=MeasuredPlan)


def fastest(records: Iterable[P]) -> P | None:
    """The fastest usable one: of those as fast by quartiles, what loses least; untimed:
    the smallest, then the best.
    """

    def pace(one: P) -> float:
        return one.times.speedup_decode.median if one.times else 0

    def rank(one: P) -> tuple[float, float, float]:
        return pace(one), -one.footprint.weight_bytes, -one.quality.nats_lost

    usable = [one for one in records if one.plan and is_usable(one.quality)]
    first = max(usable, key=rank, default=None)
    if first is None or not first.times:
        return first
    low = first.times.speedup_decode.low
    as_fast = [one for one in usable if pace(one) >= low]
    return min(as_fast, key=lambda one: one.quality.nats_lost)


def mildest(records: Iterable[P]) -> P | None:
    """The plan that loses least, usable or not; None where no loss is known."""
    known = (one for one in records if one.plan and is_number(one.quality.delta_nll))
    return min(known, key=lambda one: one.quality.nats_lost, default=None)


def step_verdict(step: PageStep, folder: Folder, named: str = "") -> Verdict:
    """A step of the page as a verdict; `named` says how its plan came to be."""
    verb, speedup = step.faster if step.times else ("decodes", None)
    return Verdict(
        step.plan,
        step.quality,
        speedup=speedup,
        verb=verb,
        footprint=step.footprint,
        dense=step.dense,
        model=folder.model,
        named=named,
        layers=folder.layers,
    )


def plans_page(
    folder: Folder,
    records: Sequence[P],
    sections: Iterable[Section],
    then: Callable[[Folder, P], tuple[str, str]],
    dense: Footprint | None = None,
) -> PageParts:
    """A page on the fastest usable plan, and on what comes `then`; else on the mildest,
    else the last.
    """
    steps = tuple(
        PageStep(one.name, one.plan, one.quality, one.times, one.footprint, dense)
        for one in records
    )
    best, mild = fastest(records), mildest(records)
    message = None
    if best:
        verdict = step_verdict(steps[records.index(best)], folder, best.way)
        message = Message.of(verdict, *then(folder, best))
    elif mild:
        message = _none_usable(folder, records, mild)
    return PageParts(
        message,
        steps=steps,
        first=records.index(best or mild or records[-1]),
        sections=tuple(sections),
        costs=read_costs(folder.path),
    )


def _none_usable(folder: Folder, records: Sequence[P], mild: P) -> Message:
    """That none of the plans leaves the model usable, not even the mildest."""
    count = sum(bool(one.plan) for one in records)
    plans = "The one plan here does not leave"
    if count > 1:
        plans = f"None of the {several(count, 'plan')} here leaves"
    model, name = (shortened(one, NAME_LETTERS) for one in (folder.model, mild.name))
    faults = " and ".join(faults_of(mild.quality))
    sentence = (
        f"{plans} {model} usable: with the mildest, {name}, {faults}:"
        f" {in_nats(mild.quality)}."
    )
    return Message(sentence, False, *asking_for_less(folder.model))


def results(
    records: Sequence[P],
    columns: Sequence[Column[P]],
    order: Sequence[int],
    figures: Sequence[Figure],
    note: str = "",
) -> Section:
    """The records in this order, with a column that says which models are still usable,
    and figures of them.
    """

    def usable(one: P) -> str:
        known = one.plan and is_number(one.quality.delta_nll)
        if not known:
            return ""
        return "yes" if is_usable(one.quality) else "no"

    place = 1 + [column.heading for column in columns].index(DELTA_NLL.heading)
    marked = [*columns[:place], words("usable", usable), *columns[place:]]
    lines = table("results", marked, [records[number] for number in order])
    return Section("results", "Results", tuple(figures), lines, tuple(order), note)


def points_of(records: Sequence[P], look: Callable[[P], Settings]) -> "list[Point]":
    """A point for each record with a loss, which looks as `look` says; its `plan`
    counts the records from 0.
    """
    from ..charts.points import Point

    return [
        Point(
            one.name,
            one.quality.delta_nll,
            one.quality.delta_nll_se,
            one.times.speedup_decode if one.times else None,
            plan=number,
            **look(one),
        )
        for number, one in enumerate(records)
        if is_number(one.quality.delta_nll)
    ]


def judged_scores(folder: Folder, plan: Plan | None) -> list[JudgedRecord]:
    """What a folder holds of a plan, in each of its states."""
    return [
        one
        for one in folder.of(JudgedRecord)
        if plan and one.plan.indices == plan.indices
    ]


def scores_table(scores: Sequence[PlanScore]) -> Table:
    """What plans score on tasks, compared with the original model."""
    return table(
        "benchmarks, differences paired by document; worse: p < 0.05",
        PLAN_SCORES,
        scores,
    )
