"""A search: its table and its page."""

from __future__ import annotations

from dataclasses import replace

from ..errors import shortened
from ..experiments.next_commands import what_next
from ..experiments.search.one_phase import READS
from ..experiments.search.records import SearchRecord
from ..experiments.verdict import NAME_LETTERS
from ..results.facts import QUALITY, SPEED_CHECK
from ..results.table import Column, number, table, within, words
from .costs import read_costs
from .folder import Folder
from .measured import last_measured, tasks_section
from .parts import Message, PageParts, PageStep, Section
from .plans import judged_scores, step_verdict

NOTE = (
    "The objective is of the text that was chosen by; NLL and KL, where they are given,"
    " are of held-out text."
)


COLUMNS: tuple[Column[SearchRecord], ...] = (
    words("chosen", lambda one: one.chosen),
    *within(QUALITY, lambda one: one.quality),
    *within(SPEED_CHECK, lambda one: one.check),
    number("objective on its text", lambda one: one.cost, ".4f"),
    number("original model's objective", lambda one: one.dense_cost, ".4f"),
    words("search finished", lambda one: "yes" if one.in_time else "no"),
    number("forward passes", lambda one: one.forwards, ",.1f"),
    number("evaluations", lambda one: one.spent.evaluations, ",d"),
    number("CPU s", lambda one: one.spent.seconds, ",.1f"),
    number("wall s", lambda one: one.spent.wall_seconds or None, ",.1f"),
    words("missed", lambda one: one.missed),
)


def page_parts(folder: Folder) -> PageParts:
    """What was chosen last, repaired if it was, and all that was chosen before."""
    records, repaired = folder.of(SearchRecord), last_measured(folder)
    last = records[-1]
    steps = tuple(
        PageStep(
            shortened(one.chosen, NAME_LETTERS),
            one.plan,
            one.quality,
            footprint=one.footprint,
            dense=one.dense,
            order=one.order,
        )
        for one in records
    )
    verdict = replace(
        step_verdict(steps[-1], folder),
        quality=repaired.quality if repaired else last.quality,
        speedup=last.check.measured_speedup if last.check else None,
        verb=READS if last.plan.prefill else "runs",
        state=repaired.model if repaired else "skipped",
        missed=last.missed
        and f"what was asked: {shortened(last.missed, NAME_LETTERS)}",
    ).judged(judged_scores(folder, last.plan))
    made = folder.path.with_suffix(".repaired" if repaired else ".json")
    choices = Section(
        "results",
        "The choice",
        table=table("results", COLUMNS, records),
        steps=tuple(range(len(records))),
        note=NOTE,
    )
    return PageParts(
        message=Message.of(verdict, *what_next(verdict, folder.model, made)),
        steps=steps,
        first=len(records) - 1,
        sections=(choices, *tasks_section(folder, last.plan)),
        costs=read_costs(folder.path),
    )
