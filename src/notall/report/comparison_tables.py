"""A comparison as tables and figures in files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ..experiments.compare.plans import save_plans
from ..experiments.compare.records import ComparisonRecord, task_heading
from ..experiments.held_scores import UNREPAIRED
from ..extras import FIGURES, installed
from ..files import write_whole
from ..results.facts import DECODE_MS, PREFILL_MS, QUALITY, SPEEDUPS
from ..results.record import RecordKey
from ..results.table import (
    Column,
    Table,
    as_csv,
    as_latex,
    number,
    size,
    table,
    with_delta,
    with_error,
    within,
    words,
)
from ..strict_json import Settings
from .plans import points_of

if TYPE_CHECKING:
    from ..charts.points import Point


BEHIND: Column[ComparisonRecord] = with_error(
    "behind the best", lambda one: (one.behind, one.behind_se)
)
FORWARDS: Column[ComparisonRecord] = number(
    "forward passes", lambda one: one.forwards, ",.1f"
)


CHOSEN: tuple[Column[ComparisonRecord], ...] = (
    words("criterion", lambda one: one.criterion),
    words("by", lambda one: one.objective if one.by_objective else ""),
    words("among", lambda one: one.space),
    # words: a part of the question, no answer that a narrow terminal would end with
    words("count", lambda one: one.count),
)


def columns_of(
    records: Sequence[ComparisonRecord],
) -> tuple[Column[ComparisonRecord], ...]:
    """The columns of a comparison; those of the tasks of `records` follow the quality.

    Milliseconds are among them where a plan skips in the prompt alone: to the first
    token, and of each further one.
    """
    of_prompt = any(one.plan.prefill for one in records)
    return (
        *CHOSEN,
        words("folder", lambda one: one.folder),
        words("repair", lambda one: one.repair if one.repair != UNREPAIRED else ""),
        *within(QUALITY, lambda one: one.quality),
        *(with_delta(name, partial(_score_of, name)) for name in _tasks_of(records)),
        BEHIND,
        size("added", lambda one: one.added_bytes or None),
        *within(SPEEDUPS, lambda one: one.times),
        *(within((PREFILL_MS, DECODE_MS), lambda one: one.times) if of_prompt else ()),
        number("evaluations", lambda one: one.spent.evaluations, ",d"),
        FORWARDS,
        number("CPU s", lambda one: one.spent.seconds, ",.1f"),
        number("wall s", lambda one: one.spent.wall_seconds or None, ",.1f"),
        number("on the text it chose by", lambda one: one.calibration_delta, "+.3f"),
        number(
            "calibration tokens",
            lambda one: one.calibration_tokens if one.spent.evaluations else None,
            ",d",
        ),
    )


def _score_of(task: str, record: ComparisonRecord) -> tuple[float, float, float] | None:
    """The value of a task, the difference to the original model and its error."""
    for score in record.tasks:
        if task_heading(score) == task:
            return score.value, score.delta, score.delta_se
    return None


def _tasks_of(records: Sequence[ComparisonRecord]) -> list[str]:
    return list(
        dict.fromkeys(task_heading(score) for one in records for score in one.tasks)
    )


HOW_TO_READ = (
    "By: the objective that a criterion goes by, if by one. NLL and KL in nats a token;"
    " behind the best: NLL beyond that of the best row that is repaired alike, paired"
    " by window. Forward passes: over the text that is chosen by."
)
TIMED_ONCE = (
    "Plans that leave equal parameters, weights and KV cache take equal time: one was"
    " timed for all of them."
)


def write_comparison(
    records: Sequence[ComparisonRecord], out: Path, title: str, made: str
) -> None:
    """`out/table.md`, .tex, .csv, each plan in `out/plans`, a figure; `made` says how
    and on what it was measured.
    """
    note = f"\n{TIMED_ONCE}\n" if timed_once(records) else ""
    texts = {
        "md": f"# {title}\n\n{made}\n\n{comparison_table(records)}{note}",
        "tex": _as_latex(records, f"{title}. {made}"),
        "csv": as_csv(records),
    }
    for suffix, text in texts.items():
        write_whole(out / f"table.{suffix}", text)
    save_plans(records, out)
    if installed(*FIGURES):
        from ..charts.losses import losses_in_panels
        from ..charts.style import save

        save(losses_in_panels(drawn_points(records), title), out / "front")


def _as_latex(records: Sequence[ComparisonRecord], title: str) -> str:
    """A table for each space and count, of the columns that a page is wide enough
    for.
    """
    wanted = {"repair", *_tasks_of(records), SPEEDUPS[0].heading}
    wanted |= {column.heading for column in (*CHOSEN[:2], BEHIND, FORWARDS)}
    wanted |= {column.heading for column in QUALITY[:3]}
    columns = [column for column in columns_of(records) if column.heading in wanted]
    return "\n".join(
        as_latex(
            part,
            caption=f"{title} {name} skipped. {HOW_TO_READ} {part.legend}",
            label=name.replace(" ", "-"),
        )
        for name, part in _parts(columns, records)
    )


def timed_once(records: Sequence[ComparisonRecord]) -> bool:
    """Whether plans of different sublayers show the same measurement of time."""
    timed = [record for record in records if record.times]
    measured = {(one.footprint, one.plan.prefill) for one in timed}
    return len({record.plan for record in timed}) > len(measured)


def comparison_table(records: Sequence[ComparisonRecord]) -> str:
    """The comparison in Markdown, a part for each space and count, what loses least
    first.
    """
    columns = [column for column in columns_of(records) if column not in CHOSEN[2:]]
    columns.append(words("skips", lambda one: one.plan or None))
    parts = [*_parts(columns, records)]
    legend = parts[0][1].legend if parts else ""
    tables = [f"### {name}\n\n{part.markdown()}" for name, part in parts]
    return "\n".join([f"{legend}\n", *tables])


def _parts(
    columns: Sequence[Column[ComparisonRecord]], records: Sequence[ComparisonRecord]
) -> Iterator[tuple[str, Table]]:
    """A table for each space and count, all of the same columns."""
    ranked = [records[place] for place in best_first(records)]
    whole = table("", columns, ranked)
    for _, rows in groupby(zip(ranked, whole.rows), key=lambda row: row[0].group):
        group, cells = zip(*rows)
        yield group[0].among, replace(whole, rows=cells)


def best_first(records: Sequence[ComparisonRecord]) -> list[int]:
    """Places of records: by space and count, then by loss; what is repaired follows
    what is not.
    """
    least: dict[RecordKey, float] = {}
    for one in records:
        least[one.run] = min(one.quality.nats_lost, least.get(one.run, math.inf))
    spaces = [*dict.fromkeys(one.space for one in records)]

    def rank(place: int) -> tuple[object, ...]:
        one = records[place]
        among = spaces.index(one.space), one.group[1]
        return *among, least[one.run], one.run, one.quality.nats_lost

    return sorted(range(len(records)), key=rank)


def drawn_points(records: Sequence[ComparisonRecord]) -> list[Point]:
    """A point for each record with a loss; a criterion is named with its objective, or
    folder, if it has several.
    """
    objectives, folders = Counter[str](), Counter[str]()
    objectives.update(one for one, _ in {(r.criterion, r.objective) for r in records})
    folders.update(one for one, _ in {(r.criterion, r.folder) for r in records})

    def look(one: ComparisonRecord) -> Settings:
        names = [one.criterion]
        if objectives[one.criterion] > 1:
            names.append(one.objective)
        if folders[one.criterion] > 1:
            names.append(str(one.folder))
        return {
            "count": one.count,
            "colour": ", ".join(names),
            "shape": one.repair,
            "panel": one.space,
        }

    return points_of(records, look)
