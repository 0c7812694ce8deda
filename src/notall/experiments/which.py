"""Which of a folder's plans is best, and what a page says of it: for verbs that measure many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ..errors import shortened
from ..models.names import DEFAULT_TEXT
from ..results.facts import DELTA_NLL, SPEEDUPS, Footprint, Quality
from ..results.provenance import Provenance
from ..results.record import is_number
from ..results.table import Column, words
from .folder import Folder
from .shown import Card, Message, nats_in_words
from .verdict import (
    NAME_LETTERS,
    M,
    MeasuredPlan,
    Outcome,
    asking_for_less,
    decode_speedup,
    fastest,
    faults_of,
    is_usable,
    loss_in_words,
    mildest,
)

R = TypeVar("R")

FASTEST, LARGEST = "Fastest usable", "Largest usable"


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
        speedup, named = decode_speedup(best), way(best)
        outcome = Outcome(best.plan, best.quality, speedup, best.footprint, dense, named=named, layers=folder.layers)
        return Message(outcome.sentence(folder.model), True, *then(best))
    if least := mildest(records):
        plans = sum(bool(one.plan) for one in records)
        which = f"None of the {plans} plans here leaves" if plans > 1 else "The one plan here does not leave"
        faults, loss = " and ".join(faults_of(least.quality)), loss_in_words(least.quality)
        mild = f"with the mildest, {shortened(least.name, NAME_LETTERS)}, {faults}: {loss}"
        return Message(
            f"{which} {shortened(folder.model, NAME_LETTERS)} usable: {mild}.", False, *asking_for_less(folder.model)
        )
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
    text = f"{best.name}; {nats_in_words(best.quality)}"
    if not (speedup := decode_speedup(best)):
        return Card(LARGEST, str(len(best.plan)), "sublayers left out", text)
    return Card(FASTEST, f"{speedup.median:.2f}×", SPEEDUPS[0].heading, text)


def mark_usable(columns: Sequence[Column[R]], quality: Callable[[R], Quality | None]) -> tuple[Column[R], ...]:
    """With a column that says whether the model is still usable, behind what it loses."""

    def usable(row: R) -> str:
        found = quality(row)
        return "" if found is None or not is_number(found.delta_nll) else "yes" if is_usable(found) else "no"

    place = 1 + next(place for place, column in enumerate(columns) if column.heading == DELTA_NLL.heading)
    return (*columns[:place], words("usable", usable), *columns[place:])
