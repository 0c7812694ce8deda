"""Which of a folder's plans is best, and what a page says of it: for verbs that measure many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from ..errors import shortened
from ..models.names import DEFAULT_TEXT
from ..plan import Plan
from ..results.facts import DELTA_NLL, SPEEDUPS, Footprint, Quality, Times
from ..results.provenance import Provenance
from ..results.record import Quartiles, is_number
from ..results.table import Column, words
from .folder import Folder
from .shown import Card, Message, in_nats
from .verdict import NAME_LETTERS, Verdict, asking_for_less, faults_of, is_usable

FASTEST, LARGEST = "Fastest usable", "Largest usable"
R = TypeVar("R")


class MeasuredPlan(Protocol):
    """A record of one of a folder's plans; `times` is None where it was not timed."""

    @property
    def name(self) -> str: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def quality(self) -> Quality: ...
    @property
    def times(self) -> Times | None: ...
    @property
    def footprint(self) -> Footprint: ...


M = TypeVar("M", bound=MeasuredPlan)


def _decode_speedup(one: MeasuredPlan) -> Quartiles | None:
    return one.times.speedup_decode if one.times else None


def fastest(records: Iterable[M]) -> M | None:
    """Of the usable ones the fastest: of those that may be as fast, by its quartiles, what loses least.

    Where nothing was timed, the smallest, then the best.
    """
    usable = [one for one in records if one.plan and is_usable(one.quality)]

    def pace(one: M) -> float:
        return speedup.median if (speedup := _decode_speedup(one)) else 0

    first = max(usable, key=lambda one: (pace(one), -one.footprint.weight_bytes, -one.quality.nats_lost), default=None)
    if first is None or not (speedup := _decode_speedup(first)):
        return first
    return min((one for one in usable if pace(one) >= speedup.low), key=lambda one: one.quality.nats_lost)


def mildest(records: Iterable[M]) -> M | None:
    """What loses least, usable or not."""
    known = (one for one in records if one.plan and is_number(one.quality.delta_nll))
    return min(known, key=lambda one: one.quality.nats_lost, default=None)


def first_shown(records: Sequence[MeasuredPlan]) -> int:
    """Where the plan is that a page is about: the fastest usable one, else the mildest, else the last."""
    best = fastest(records) or mildest(records)
    return records.index(best) if best else len(records) - 1


def judged(
    folder: Folder,
    records: Sequence[M],
    *,
    then: Callable[[M], tuple[str, str]],
    way: Callable[[M], str] = lambda one: one.name,
    dense: Footprint | None = None,
) -> Message | None:
    """The fastest usable plan and what comes `then`, or that there is none; `way` is its name in the sentence."""
    if best := fastest(records):
        verdict = Verdict(
            best.plan,
            best.quality,
            speedup=_decode_speedup(best),
            footprint=best.footprint,
            dense=dense,
            model=folder.model,
            named=way(best),
            layers=folder.layers,
        )
        return verdict.message(*then(best))
    if least := mildest(records):
        plans = sum(bool(one.plan) for one in records)
        which = f"None of the {plans} plans here leaves" if plans > 1 else "The one plan here does not leave"
        mild = f"{shortened(least.name, NAME_LETTERS)}, {' and '.join(faults_of(least.quality))}"
        said = f"{which} {shortened(folder.model, NAME_LETTERS)} usable: with the mildest, {mild}"
        return Message(f"{said}: {in_nats(least.quality)}.", False, *asking_for_less(folder.model))
    return None


def on_the_text(about: Provenance, *sizes: str) -> dict[str, object]:
    """The options that name the text of a run, where it is not what commands read by default; with it its `sizes`."""
    what = about.what
    if what.get("text", DEFAULT_TEXT) == DEFAULT_TEXT:
        return {}
    return {name: what[name] for name in ("text", *sizes) if name in what}


def fastest_card(records: Sequence[MeasuredPlan]) -> Card:
    """Of those that leave the model usable."""
    best = fastest(records)
    if best is None:
        told = "without any of these plans' sublayers, perplexity more than doubles or most first choices change"
        return Card(FASTEST, "none", f"of {len(records)} plans", told)
    text = f"{best.name}; {in_nats(best.quality)}"
    if not (speedup := _decode_speedup(best)):
        return Card(LARGEST, str(len(best.plan)), "sublayers left out", text)
    return Card(FASTEST, f"{speedup.median:.2f}×", SPEEDUPS[0].heading, text)


def mark_usable(columns: Sequence[Column[R]], quality: Callable[[R], Quality | None]) -> tuple[Column[R], ...]:
    """With a column that says whether the model is still usable, behind what it loses."""

    def usable(row: R) -> str:
        found = quality(row)
        return "" if found is None or not is_number(found.delta_nll) else "yes" if is_usable(found) else "no"

    place = 1 + next(place for place, column in enumerate(columns) if column.heading == DELTA_NLL.heading)
    return (*columns[:place], words("usable", usable), *columns[place:])
