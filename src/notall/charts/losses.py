"""What plans lose, against what they gain or what they skip, with their errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

import altair as alt

from ..results.facts import DELTA_NLL, SPEEDUPS
from ..results.record import is_number
from .labels import PAD_OF_LOSSES, PADDING, needed_widths
from .points import (
    LINEAR_BELOW,
    NEAR,
    OTHER_WAYS,
    Point,
    Span,
    bounds,
    colours_of,
    front,
    span_of_losses,
)
from .style import GREY, INK, LIGHT, PALE, PAPER, Colours, by_colour, snug, titled

HELD_OUT = f"{DELTA_NLL.heading} on held-out text, {DELTA_NLL.unit}"


DASHES = ([1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [12, 4], [1, 3])


POINT_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")


NATS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)  # ticks of losses


@dataclass(frozen=True)
class Titles:
    """Of a figure: of the legend's colours and shapes, and of the axis of losses."""

    colour: str
    shape: str
    lost: str = HELD_OUT


def tradeoff(
    points: Sequence[Point],
    colours: Colours,
    titles: Titles,
    *,
    best: Sequence[Point] = (),
    dense: bool = True,
    paths: bool = False,
) -> alt.LayerChart:
    """What the timed points lose against their decode speedup, with the Pareto front; a
    ring follows the param `plan`.

    `best` are the points of the front where it isn't what nothing beats in both;
    `dense`: that model, at (1, 0), is none of the points; `paths` join by count.
    """
    points = [point for point in points if point.speedup and is_number(point.lost)]
    original = [(1.0, 0.0)] if dense else []
    line = sorted(point.place for point in best)
    line = line or front([*original, *(point.place for point in points)])
    span = _span_of_speedups(points)
    names = list(dict.fromkeys(point.shape for point in points))
    widths = needed_widths(points, names, span, line, dense=dense)
    rows = [
        point.row(colours, span)
        | {"needs": width, "side": "right" if names.index(point.shape) else "left"}
        for point, width in zip(points, widths)
    ]
    series, chosen = _series(
        points, rows, _speedup_axis(span), titles.lost, colours, titles.colour
    )
    joined = []
    if paths:
        dash = alt.StrokeDash("shape:N", title=titles.shape, scale=_each(names, DASHES))
        paths_of = series.mark_line(strokeWidth=1)
        joined = [paths_of.encode(order="count:Q", strokeDash=dash)]
    spread = series.mark_rule(strokeWidth=1.5).encode(
        x="speedup_from:Q", x2="speedup_to:Q"
    )
    bare = alt.Legend(symbolFillColor=GREY, symbolStrokeWidth=0)
    marks = series.mark_point(filled=True, size=75).encode(
        shape=alt.Shape(
            "shape:N", title=titles.shape, scale=_each(names, POINT_SHAPES), legend=bare
        ),
        tooltip=[
            *_tooltips(titles.colour, titles.shape),
            alt.Tooltip("speedup:Q", format=".3f"),
        ],
    )
    layers = [
        *joined,
        _errors(series),
        spread,
        *_beyond(series),
        _front_line(line),
        marks.add_params(chosen),
        *_labels(series),
        *(_dense() if dense else []),
    ]
    return _ringed(layers, series, "speedup")


def _span_of_speedups(points: Sequence[Point]) -> Span:
    times = [point.speedup for point in points if point.speedup]
    ends = [end for one in times for end in (one.low, one.high)]
    return bounds([1.0, *(one.median for one in times)], ends, NEAR)


def _speedup_axis(span: Span) -> alt.X:
    scale = alt.Scale(domain=list(span), zero=False, nice=False, padding=PADDING)
    axis = alt.Axis(
        labelExpr="format(datum.value, '.2f') + '×'", tickCount=8, labelSeparation=6
    )
    title = f"{SPEEDUPS[0].heading} over the original model"
    return alt.X("speedup:Q", title=title, axis=axis, scale=scale)


def _front_line(places: Sequence[Span]) -> alt.Chart:
    data = alt.Data(
        values=[{"speedup": speedup, "lost": lost} for speedup, lost in places]
    )
    line = alt.Chart(data).mark_line(
        strokeWidth=5, opacity=0.35, color=GREY, strokeJoin="round"
    )
    return line.encode(x="speedup:Q", y="lost:Q", order="speedup:Q")


def _labels(series: alt.Chart) -> list[alt.Chart]:
    """Those that the plot is wide enough for.

    Paths go up and to the right: there is room left of them above, and right of them
    below.
    """
    fitting = series.transform_filter("isValid(datum.needs) && datum.needs <= width")
    left = fitting.transform_filter(alt.datum.side == "left")
    right = fitting.transform_filter(alt.datum.side == "right")
    return [
        *_text(left, "label:N", "right", -7, -8),
        *_text(right, "label:N", "left", 7, 9),
    ]


def losses_by_count(points: Sequence[Point], colours: Colours) -> alt.LayerChart:
    """What points lose against how much they skip, a line a series and a dash a repair,
    none without one.
    """
    points = [point for point in points if is_number(point.lost)]
    names = list(dict.fromkeys(["none", *(point.shape for point in points)]))
    counts = alt.X(
        "count:Q",
        title="skipped",
        axis=alt.Axis(format="d", tickMinStep=1),
        scale=snug(16),
    )
    series, chosen = _series(
        points,
        [point.row(colours) for point in points],
        counts,
        HELD_OUT,
        colours,
        "criterion",
    )
    lines = series.mark_line(strokeWidth=1.5).encode(detail="colour:N")
    marks = series.mark_point(filled=True, size=50).encode(
        tooltip=_tooltips("criterion", "repair")
    )
    if len(names) > 1:
        lines = lines.encode(
            strokeDash=alt.StrokeDash(
                "shape:N", title="repair", scale=_each(names, DASHES)
            )
        )
        marks = marks.encode(
            shape=alt.Shape("shape:N", title="repair", scale=_each(names, POINT_SHAPES))
        )
    return _ringed([lines, _errors(series), marks.add_params(chosen)], series, "count")


def losses_in_panels(points: Sequence[Point], title: str) -> alt.FacetChart:
    """`losses_by_count` to be saved: a part of the figure for each panel of the
    points.
    """
    layers = losses_by_count(points, colours_of(points)).properties(
        width=300, height=300
    )
    panels = layers.facet(
        facet=alt.Facet("panel:N", title=None), columns=2
    ).resolve_scale(x="independent")
    heading = titled(title, "Lower is better. Bars: standard error.")
    return panels.properties(title=heading, padding=16).configure(**LIGHT)


def _text(
    series: alt.Chart,
    text: str,
    align: Literal["left", "center", "right"],
    dx: int,
    dy: int,
) -> list[alt.Chart]:
    """On a white halo, to be read across lines."""
    halo = series.mark_text(
        fontSize=11, align=align, dx=dx, dy=dy, stroke=PAPER, strokeWidth=3
    )
    return [
        halo.encode(text=text),
        series.mark_text(fontSize=11, align=align, dx=dx, dy=dy).encode(text=text),
    ]


def _series(
    points: Sequence[Point],
    rows: Sequence[Mapping[str, object]],
    x: alt.X,
    title: str,
    colours: Colours,
    legend: str,
) -> tuple[alt.Chart, alt.Parameter]:
    """Losses of a series a colour, the others dim while one is chosen in the legend;
    and that choice.

    Losses of 1 nat and more get a logarithmic scale, linear near 0, where they may be
    hundredths, or below it.
    """
    low, high = span_of_losses(points)
    kind = {"zero": False} if high < 1 else {"type": "symlog", "constant": LINEAR_BELOW}
    y = alt.Y(
        "lost:Q",
        title=title,
        scale=alt.Scale(domain=[low, high], nice=False, padding=PAD_OF_LOSSES, **kind),
    )
    if high >= 1:
        ticks = sorted(
            tick for size in (0, *NATS) for tick in {size, -size} if low <= tick <= high
        )
        y = y.axis(values=ticks, format="~g")
    drawn = {
        name: colours.get(name, PALE)
        for name in (*colours, OTHER_WAYS)
        if any(row["shown"] == name for row in rows)
    }
    look, chosen = by_colour("shown", drawn, legend)
    below = sorted(rows, key=lambda row: row["shown"] != OTHER_WAYS)
    return alt.Chart(alt.Data(values=below)).encode(x=x, y=y, **look), chosen


def _errors(series: alt.Chart) -> alt.Chart:
    return series.mark_rule(strokeWidth=1.5).encode(y="lost_low:Q", y2="lost_high:Q")


def _beyond(series: alt.Chart) -> list[alt.Chart]:
    """An arrow where a bar goes on beyond the axis."""
    ends = (
        ("from", "low", "triangle-left", "<"),
        ("to", "high", "triangle-right", ">"),
    )
    return [
        series.mark_point(filled=True, size=55, shape=shape)
        .encode(
            x=f"speedup_{end}:Q",
            tooltip=[alt.Tooltip(f"speedup_{whole}:Q", title="quartile", format=".3f")],
        )
        .transform_filter(f"datum.speedup_{whole} {comparison} datum.speedup_{end}")
        for end, whole, shape, comparison in ends
    ]


def _dense() -> list[alt.Chart]:
    row = {"speedup": 1, "lost": 0, "name": "dense"}
    dense = alt.Chart(alt.Data(values=[row])).encode(
        x="speedup:Q", y="lost:Q", color=alt.value(INK)
    )
    point = dense.mark_point(shape="diamond", filled=True, size=110, opacity=1)
    return [point, *_text(dense, "name:N", "center", 0, 16)]


def _ringed(layers: Sequence[alt.Chart], series: alt.Chart, x: str) -> alt.LayerChart:
    """With a ring around the point of the plan that the param `plan` counts; at first
    there is none.
    """
    ring = alt.Chart(series.data).transform_filter("isValid(datum.plan)")
    ring = ring.mark_point(strokeWidth=2.5, stroke=INK, fill=None, opacity=1)
    size = alt.condition("datum.plan == plan", alt.value(330), alt.value(0))
    ring = ring.encode(x=f"{x}:Q", y="lost:Q", size=size)
    return alt.LayerChart(layer=[*layers, ring]).add_params(
        alt.param(name="plan", value=-1)
    )


def _tooltips(colour: str, shape: str) -> list[alt.Tooltip]:
    titles = {
        "name:N": "plan",
        "colour:N": colour,
        "shape:N": shape,
        "count:Q": "skipped",
    }
    return [
        *(alt.Tooltip(field, title=title) for field, title in titles.items()),
        alt.Tooltip("lost:Q", format=".3f"),
    ]


def _each(names: Sequence[str], values: Sequence[str | list[int]]) -> alt.Scale:
    return alt.Scale(
        domain=list(names), range=[value for _, value in zip(names, cycle(values))]
    )
