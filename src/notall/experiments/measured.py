"""What a repair or a healing brings: a plan before it and after it, on text that its weights were not fitted to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from ..errors import UsageError, shortened
from ..plan import Plan
from ..results.facts import Quality
from ..results.ledger import read
from ..results.record import is_number
from ..results.repairs import (
    HEALING,
    MEASURED,
    REFITS,
    FittedText,
    HealRecord,
    MeasuredRecord,
    RefitRecord,
    State,
)
from ..results.table import table
from .folder import Folder
from .shown import Card, Figure, Section, Shown, Step, in_nats
from .verdict import Verdict

MOST_CARDS = 5
STATES: tuple[State, ...] = get_args(State)


def last_measured(folder: Folder) -> MeasuredRecord | None:
    """What was measured of a plan in its last state, on the first text that it was measured on."""
    known = [one for one in folder.of(MeasuredRecord) if one.plan]
    first = [one for one in known if one.text == known[0].text]
    return max(first, key=lambda one: STATES.index(one.model), default=None)


def warn_if_worse(measured: Sequence[MeasuredRecord]) -> None:
    """Warn where a text loses more after a repair than before it, beyond errors."""
    before = {one.text: one.quality for one in measured if one.model == "skipped"}
    for one in measured:
        if one.model != "repaired" or one.text not in before:
            continue
        lost, was = one.quality, before[one.text]
        if lost.nats_lost > was.nats_lost + sum(se for se in (lost.delta_nll_se, was.delta_nll_se) if is_number(se)):
            on = f" on {one.text}" if one.text else ""
            print(
                f"warning: the repair makes it worse{on}: {lost.nats_lost:.3f} nats where it was "
                f"{was.nats_lost:.3f}; repair with more text, in another way, or not at all",
                file=sys.stderr,
            )


def warn_of_own_text(plan: Plan, described: dict[str, Any], path: Path | None = None) -> None:
    """Say so where a plan is measured on the text that its repair was fitted to, or that it was chosen by.

    What it was chosen by is in the folder that a search leaves with the plan at `path`.
    """
    from .search import SearchRecord

    texts: Iterator[FittedText] = (text for step in getattr(plan, "history", ()) for text in step.texts)
    own = {text.text_sha256: "repaired with" for text in texts}
    found = path.with_suffix(".search") / SearchRecord.file if path else None
    if found and found.is_file():
        with suppress(UsageError):  # a damaged file is nothing to stop for
            chosen = [record for record in read(found, SearchRecord) if record.plan.indices == plan.indices]
            own = {str(record.what.get("text_sha256")): "chosen by" for record in chosen} | own
    if how := own.get(described["text_sha256"]):
        text = shortened(described["text"])
        note = f"note: the plan was {how} {text}, where it looks better than it is; measure on another --text"
        print(note, file=sys.stderr)


# --- on a page --------------------------------------------------------------------------------------------------------


def shown_measured(folder: Folder, then: Callable[[Verdict], tuple[str, str]]) -> Shown:
    """What a page says of a folder of `repair`, `heal` or `eval`: its last state, and what comes `then`."""
    measured, last = folder.of(MeasuredRecord), last_measured(folder)
    states, message = {one.model: one for one in measured}, None
    if last:
        verdict = Verdict(last.plan, last.quality, model=folder.model, state=last.model, layers=folder.layers)
        message = verdict.message(*then(verdict))
    return Shown(
        message=message,
        cards=tuple(_cards(measured)),
        steps=tuple(Step(one.plan.in_words(), one.plan) for one in list(states.values())[:1]),
        sections=tuple(_sections(folder)),
    )


SAME_WINDOWS = (
    "The same windows of text, read by the dense model, by the plan before and by the plan after; none of them was "
    "fitted or trained to. Lower is better. Differences are paired with the dense model."
)
HEALED = (
    "How far the next-word probabilities are from the dense model's, on text that is not trained on. The weights that "
    "were best there are kept."
)
REFIT = (
    "How far the stream behind each sublayer is from where it should be, over how far it would be without a refit "
    "there: squared distances, on windows that were not fitted to. 100%: it was left alone."
)


def _sections(folder: Folder) -> Iterator[Section]:
    from ..charts.layers import by_depth, training
    from ..charts.style import on_page

    if measured := folder.of(MeasuredRecord):
        yield Section("measured", "Before and after", (), table("measured", MEASURED, measured), note=SAME_WINDOWS)
    if looks := folder.of(HealRecord):
        drawn = Figure(on_page(training(looks), 300), "KL on held-out text over the training", note=HEALED)
        yield Section("healing", "How the healing went", (drawn,), table("healing", HEALING, looks))
    if refits := folder.of(RefitRecord):
        drawn = Figure(on_page(by_depth(refits), 300), "Error that each refit left, by depth", note=REFIT)
        yield Section("refits", "What became of each kept sublayer", (drawn,), table("refits", REFITS, refits))


def _cards(measured: Sequence[MeasuredRecord]) -> Iterator[Card]:
    """For each text what is lost in the end, and what was before."""
    texts: dict[str, dict[State, Quality]] = {}
    for one in measured:
        if one.plan:
            texts.setdefault(one.text, {})[one.model] = one.quality
    for text, states in list(texts.items())[:MOST_CARDS]:
        *before, last = sorted(states, key=STATES.index)
        told = [f"{last}{_beside(states[last])}"]
        told += [f"{in_nats(states[state])} {state}{_beside(states[state])}" for state in before]
        yield Card.of_loss(text, states[last], "; ".join(told))


def _beside(quality: Quality) -> str:
    """What stands next to the nats."""
    told = [f"KL {quality.kl:.2f}"] if is_number(quality.kl) else []
    told += [f"{quality.top1_agreement:.0%} of first choices stay"] if is_number(quality.top1_agreement) else []
    return f" ({', '.join(told)})" if told else ""
