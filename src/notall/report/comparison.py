"""The page of a comparison, or of several that are joined."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError, shortened
from ..experiments.compare.plans import plan_file
from ..experiments.compare.records import ComparisonRecord
from ..experiments.held_scores import UNREPAIRED
from ..experiments.next_commands import next_command, on_the_text
from ..experiments.verdict import is_usable
from ..plan import SET_NAMES
from ..results.record import is_number
from ..results.table import as_csv
from .comparison_tables import (
    TIMED_ONCE,
    best_first,
    columns_of,
    drawn_points,
    timed_once,
)
from .folder import Folder
from .parts import Card, Figure, PageParts, Section
from .plans import plans_page, results

if TYPE_CHECKING:
    from ..charts.points import Point
    from ..charts.style import Colours

COMPARE_COMMAND = ["notall", "compare"]


# what is the same in comparisons that are joined
SAME_IN_ONE_TABLE = (
    "revision",
    "dtype",
    "seed",
    "text_sha256",
    "held_out_sha256",
    "length",
    "sequences",
)


def join_comparisons(folders: Sequence[Folder]) -> Folder:
    """Several folders as one comparison, unpaired. Raises `UsageError` for none, or
    another model, text or windows.
    """
    records: list[ComparisonRecord] = []
    for folder in folders:
        held = folder.of(ComparisonRecord)
        if not held or folder.provenance.command[:2] != COMPARE_COMMAND:
            raise UsageError(
                f"{folder.path} holds no results of notall compare, and only those are"
                " joined"
            )
        _check_alike((records or held)[0], held[0], folders[0].path, folder.path)
        update = {"folder": str(folder.path), "behind": math.nan, "behind_se": math.nan}
        records += [one.model_copy(update=update) for one in held]
    return Folder(folders[0].path, {ComparisonRecord.kind_name: tuple(records)})


def _check_alike(
    one: ComparisonRecord, other: ComparisonRecord, first: Path, second: Path
) -> None:
    """Raise `UsageError` where the comparisons of two folders differ in what decides
    their figures.
    """
    ours, theirs = (
        record.what | {"sequences": record.quality.sequences} for record in (one, other)
    )
    for name in SAME_IN_ONE_TABLE:
        if ours.get(name) != theirs.get(name):
            both = (shortened(str(about.get(name))) for about in (ours, theirs))
            raise UsageError(
                f"{first} and {second} differ in {name}: {' and '.join(both)}"
            )


def page_parts(folder: Folder) -> PageParts:
    """The table of all choices, their figures, and the best at each space."""
    records = folder.of(ComparisonRecord)
    found = plans_page(folder, records, _sections(records), _make_again)
    is_own = folder.provenance.command[:2] == COMPARE_COMMAND
    steps = tuple(
        replace(
            step,
            order=one.order,
            again=_reproduce(folder, one) if is_own and not one.is_given else "",
        )
        for step, one in zip(found.steps, records)
    )
    return replace(found, cards=tuple(_cards(records)), steps=steps)


def _reproduce(folder: Folder, record: ComparisonRecord) -> str:
    where = record.folder or folder.path
    return next_command("reproduce", where, row=record.name, out="again")


def _make_again(folder: Folder, record: ComparisonRecord) -> tuple[str, str]:
    """What makes the model of a choice: from its plan, or else by a search for the
    same.
    """
    model, plan = folder.model, plan_file(Path(record.folder or folder.path), record)
    if record.is_given:
        return "see what that saves", next_command("bench", model, plan=plan)
    if not plan.is_file():
        return _search_for(model, record)
    if record.repair == UNREPAIRED:
        export = next_command(
            "export", model, plan=plan, repair="refit", to="hf", out="smaller"
        )
        return "repair it, and write that model", export
    # what adds matrices cannot be served
    is_refit = record.repair == "refit" or record.added_bytes
    repair = next_command(
        "repair",
        model,
        plan=plan,
        repair=None if is_refit else record.repair,
        **on_the_text(folder.provenance, "sequences", "length"),
        out="repaired",
    )
    return "repair that plan", repair


def _search_for(model: str, record: ComparisonRecord) -> tuple[str, str]:
    by_text = record.objective in ("nll", "kl", "answers")
    search = next_command(
        "search",
        model,
        skip=f"{record.space}:{record.count}",
        criterion=record.criterion if record.criterion != "search" else None,
        objective=record.objective if by_text else None,
        out="plan.json",
    )
    then = "" if record.repair == UNREPAIRED else ", then repair it"
    return f"make that plan{then}", search


def _sections(records: Sequence[ComparisonRecord]) -> Iterator[Section]:
    from ..charts.points import colours_of

    points = drawn_points(records)
    colours = colours_of(points)
    figures = [
        _by_count(space, points, colours, records)
        for space in dict.fromkeys(point.panel for point in points)
    ]
    # what skips in the prompt alone decodes as the original does
    of_prompt = {
        number
        for number, one in enumerate(records)
        if one.plan.prefill and not len(one.plan)
    }
    timed = [one for one in points if one.speedup and one.plan not in of_prompt]
    if timed:
        figures.append(_by_speedup(timed, colours))
    note = TIMED_ONCE if timed_once(records) else ""
    yield results(records, columns_of(records), best_first(records), figures, note)


def _by_count(
    space: str,
    points: Sequence[Point],
    colours: Colours,
    records: Sequence[ComparisonRecord],
) -> Figure:
    """The choices of one space."""
    from ..charts.losses import losses_by_count
    from ..charts.style import on_page

    own = [point for point in points if point.panel == space]
    return Figure(
        on_page(losses_by_count(own, colours), 340),
        f"quality lost by the number of {SET_NAMES.get(space, space)}s skipped",
        title=space,
        csv=as_csv([one for one in records if one.space == space]),
    )


def _by_speedup(points: Sequence[Point], colours: Colours) -> Figure:
    """All spaces in one figure; their shapes are of the space and of the repair."""
    from ..charts.losses import Titles, tradeoff
    from ..charts.style import on_page

    shaped = [
        replace(
            one,
            shape=one.panel + ("" if one.shape == UNREPAIRED else f", {one.shape}"),
        )
        for one in points
    ]
    chart = tradeoff(shaped, colours, Titles("criterion", "among"))
    label = "quality lost against decode speedup"
    return Figure(on_page(chart), label, title="against decode speedup")


def _cards(records: Sequence[ComparisonRecord]) -> Iterator[Card]:
    """What loses least at the largest usable count of each space."""
    known = [one for one in records if one.plan and is_number(one.quality.delta_nll)]
    for space in list(dict.fromkeys(record.space for record in known))[:4]:
        own = [record for record in known if record.space == space]
        usable = [record for record in own if is_usable(record.quality)]
        group = max(record.group for record in usable or own)
        best = min(
            (one for one in own if one.group == group),
            key=lambda one: one.quality.delta_nll,
        )
        text = best.way
        if not best.is_given:
            text += f", {best.forwards:,.1f} forward passes to find"
        if not is_usable(best.quality):
            text += "; no longer usable"
        yield Card.of_loss(f"Loses least: {best.among}", best.quality, text)
