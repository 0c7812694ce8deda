"""Pages of results folders, made by hand: what verbs would show of them, without a
model and without records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import result_folders
from api import (
    Card,
    Column,
    Costs,
    Figure,
    Folder,
    Message,
    PageParts,
    PageStep,
    Point,
    Provenance,
    Sample,
    Section,
    Table,
    charts_layers,
    charts_losses,
    charts_points,
    charts_style,
    render,
    table,
    with_error,
    with_quartiles,
    words,
)
from notall import Plan
from result_folders import LAYERS, NASTY, quality, times

ABOUT = Provenance(
    what={
        "model": "tiny",
        "text": "t",
        "dtype": "float32",
        "sequences": 8,
        "length": 64,
        "fingerprint": "llama-10x8",
    },
    where={"command": "notall sweep tiny", "machine": {"cores": 2}},
)
DENSE = result_folders.footprint(Plan())


def dense() -> PageStep:
    return PageStep("dense", Plan(), quality(0.0), times(1.0), DENSE, DENSE)


def steps() -> tuple[PageStep, ...]:
    """Of a sweep."""
    rows = result_folders.all_records()
    return tuple(
        PageStep(one.name, one.plan, one.quality, one.times, one.footprint, DENSE)
        for one in rows
    )


def deepest(count: int, lost: float, name: str) -> PageStep:
    plan = Plan(range(LAYERS - count, LAYERS))
    return PageStep(
        name,
        plan,
        quality(lost),
        times(1 + count / 20),
        result_folders.footprint(plan),
        DENSE,
    )


def points(found: Sequence[PageStep]) -> list[Point]:
    return [
        Point(
            name=one.name,
            lost=one.quality.delta_nll,
            lost_se=one.quality.delta_nll_se,
            speedup=one.times.speedup_decode,
            count=len(one.plan),
            colour=one.name.split()[0],
            shape="kept" if "kept" in one.name else "skipped too",
            label=one.name.split()[1].strip(","),
            plan=number,
        )
        for number, one in enumerate(found)
        if one.plan
    ]


COLUMNS = (
    words("skipped", lambda one: one.name.split()[0]),
    words("last layer", lambda one: "kept" if "kept" in one.name else ""),
    with_error(
        "NLL added",
        lambda one: (one.quality.delta_nll, one.quality.delta_nll_se),
        unit="nats per token",
    ),
    with_quartiles("decode speedup", lambda one: one.times.speedup_decode, ".2f"),
    words("usable", lambda one: "yes" if one.quality.delta_nll < 0.69 else "no"),
)


def results(
    found: Sequence[PageStep], columns: Sequence[Column[PageStep]] = COLUMNS
) -> Section:
    lines = "".join(
        f"{number},{one.quality.delta_nll if one.quality else ''}\n"
        for number, one in enumerate(found)
    )
    return Section(
        "results",
        "Every plan beside the original model",
        table=replace(table("results", columns, found), csv=f"step,lost\n{lines}"),
        steps=tuple(range(len(found))),
        note="Differences are paired.",
    )


def swept(found: Sequence[PageStep] = (), **more: object) -> PageParts:
    """As of a sweep: a map, bars, quality against speed, a table."""
    found = found or steps()
    drawn = charts_losses.tradeoff(
        points(found),
        charts_style.KIND_COLOURS,
        charts_losses.Titles("skipped", "last layer"),
        paths=True,
    )
    figure = Figure(
        charts_style.on_page(drawn),
        "quality lost against speed",
        note="Lower right is better.",
    )
    return PageParts(
        message=Message(
            "Without 2 attentions, tiny is faster.",
            True,
            "look for a better set",
            "notall search tiny",
        ),
        cards=(
            Card("Original model", "12.2", "perplexity", "50 ms a token"),
            Card("Fastest", "1.12×", "", "as fast"),
        ),
        steps=tuple(found),
        first=min(4, len(found) - 1),
        sections=(
            Section("tradeoff", "Quality against measured speed", (figure,)),
            results(found),
        ),
        samples=(Sample("One, two,", (("dense", "three."), ("block 10%", "two."))),),
        **more,
    )


def wide() -> PageParts:
    """A comparison of which the table has a column for each of many benchmarks."""
    figures = [
        with_error(
            f"benchmark_{place} acc_norm",
            lambda one: (one.quality.kl, one.quality.kl_se),
        )
        for place in range(20)
    ]
    return replace(swept(), sections=(results(steps(), (*COLUMNS, *figures)),))


def alike() -> PageParts:
    """As of similarity."""
    rows = tuple(result_folders.similarity())
    figure = Figure(
        charts_style.on_page(charts_layers.similarity(rows), 340),
        "change of the stream by layer",
    )
    return PageParts(
        similarity=rows,
        sections=(Section("similarity", "How much each layer changes", (figure,)),),
    )


def costs() -> Costs:
    found = {
        (kind, layer): 0.1 * layer
        for kind in ("attention", "mlp")
        for layer in range(LAYERS)
    }
    return Costs(found, "NLL added, nats per token", "2 windows of text")


def compared(
    ways: Sequence[str] = ("search by kl", "cosine", "deepest"),
    spaces: Sequence[str] = ("attention", "mlp"),
):
    """As of a comparison: a panel for each space."""
    found = [
        (space, deepest(count, 0.1 * count * (place + 1), f"{way}: {count} {space}s"))
        for space in spaces
        for place, way in enumerate(ways)
        for count in (2, 4)
    ]
    drawn = [
        Point(
            name=one.name,
            lost=one.quality.delta_nll,
            lost_se=0.01,
            speedup=one.times.speedup_decode,
            count=len(one.plan),
            colour=one.name.partition(":")[0],
            shape=space,
            panel=space,
            plan=number,
        )
        for number, (space, one) in enumerate(found)
    ]
    colours = charts_points.colours_of(drawn)
    panels = [
        Figure(
            charts_style.on_page(charts_losses.losses_by_count(some, colours), 340),
            "loss",
            title=space,
        )
        for space in spaces
        if (
            some := [
                replace(point, shape="none") for point in drawn if point.panel == space
            ]
        )
    ]
    speed = charts_losses.tradeoff(
        drawn, colours, charts_losses.Titles("criterion", "among")
    )
    stepped = [one for _, one in found]
    return PageParts(
        message=Message(
            f"{ways[0]} loses least.",
            True,
            "make that plan",
            "notall search tiny --out plan.json",
        ),
        steps=tuple(stepped),
        sections=(
            Section("front", "What is lost by each way to choose", tuple(panels)),
            Section(
                "tradeoff",
                "Quality against measured speed",
                (Figure(charts_style.on_page(speed), "speed"),),
            ),
            results(stepped),
        ),
        costs=costs(),
    )


def repaired(chart: str = "refits") -> PageParts:
    """As of a repair, or a healing: one plan, a figure over its table, and a plan's
    row.
    """
    refit = chart == "refits"
    rows = result_folders.refits() if refit else result_folders.looks()
    drawn = charts_layers.by_depth(rows) if refit else charts_layers.training(rows)
    figure = Figure(charts_style.on_page(drawn, 300), chart, note="How far it is.")
    columns = [
        words("what", lambda one: one.kind_name),
        words("seconds", lambda one: one.seconds),
    ]
    plan = steps()[5]
    return PageParts(
        steps=(PageStep("3 attentions", plan.plan),),
        sections=(
            Section(
                "measured",
                "Before and after",
                table=table("measured", COLUMNS, [plan, plan]),
                steps=(0, 0),
            ),
            Section(chart, "What became of it", (figure,), table(chart, columns, rows)),
        ),
    )


def folder(path: Path, about: Provenance = ABOUT) -> Folder:
    """As if one was read: of one record, whose provenance it has."""
    look = result_folders.looks()[0].model_copy(update={"provenance": about})
    return Folder(path, {"healing": (look,)})


def as_words(rows: list[dict[str, object]]) -> Table:
    """A column for each name in the first of them."""
    return table("", [words(name, partial(_named, name)) for name in rows[0]], rows)


def _named(name: str, row: dict[str, object]) -> object:
    return row.get(name)


def page(
    path: Path,
    *shown: PageParts,
    about: Provenance = ABOUT,
    **tables: list[dict[str, object]],
) -> Path:
    """A page in a folder; its last sections are `tables`, by their names."""
    sections = tuple(
        Section(name, name, table=as_words(rows)) for name, rows in tables.items()
    )
    path.mkdir(parents=True, exist_ok=True)
    out = path / "report.html"
    out.write_text(
        render(folder(path, about), [*shown, PageParts(sections=sections)]),
        encoding="utf-8",
    )
    return out


def nasty(path: Path) -> Path:
    """A page of which every text is hostile."""
    found = [deepest(count, 0.1, f"{NASTY} {count}") for count in (1, 2, 3)]
    lines: list[dict[str, object]] = [
        {"name": NASTY, "value": 1.0, NASTY[:60]: NASTY},
        {"name": "=1+1", "value": None},
    ]
    shown = compared((NASTY,), (NASTY, "mlp"))
    shown = PageParts(
        message=Message(NASTY, False, NASTY, NASTY),
        cards=(Card(NASTY, "1", "", NASTY),),
        steps=(*found, *shown.steps),
        sections=(*shown.sections[:2], results(found)),
        costs=Costs(costs().found, NASTY, "text"),
        samples=(Sample(NASTY, ((NASTY, NASTY),)),),
    )
    return page(path, shown, about=result_folders.HOSTILE, other=lines)
